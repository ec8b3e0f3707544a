"""Find the model inside an adapter, without importing PEFT."""

from __future__ import annotations

from typing import Any


def without_adapter(model: Any) -> Any:
    """Return the model inside an adapter, which hides the model's signature and attributes."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
