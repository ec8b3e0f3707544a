"""Bars of libraries that a command shows only while they move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.utils.logging import set_tqdm_hook

WEIGHTS = "Loading weights"
"""What transformers writes before the bar of a model that is being loaded."""


def take_bars_away() -> None:
    """Remove the bar of the weights once they are loaded, and draw none where there is no terminal."""
    set_tqdm_hook(_made)


def _made(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("desc") == WEIGHTS:
        kwargs = {**kwargs, "leave": False, "disable": None}
    return factory(*args, **kwargs)
