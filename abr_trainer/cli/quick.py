"""What is answered before torch and transformers are imported."""

from __future__ import annotations

from collections.abc import Sequence


def check(verb: str, argv: Sequence[str]) -> None:
    """Answer a command line that needs no more than its words; else return."""
