"""The model inside what is wrapped around it; needs no PEFT."""

from __future__ import annotations

from typing import Any


def without_adapter(model: Any) -> Any:
    """Return the model inside an adapter: it says what it takes and what it has, which the adapter around it hides."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
