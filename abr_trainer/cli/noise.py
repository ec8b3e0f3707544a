"""What is said before a command is imported, and messages of libraries that no user can act on."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings

LOGGED = {
    "bitsandbytes.backends.cpu.ops": (
        "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'. Please make sure you "
        "already `pip install kernels` and the kernels >= 0.11.1"
    ),
    "DeepSpeed": "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.",
}
"""By logger, a message that a normal run of ours makes. The header of a run says on which device it runs."""

WARNED: dict[str, type[Warning]] = {
    "`is_gradient_checkpointing` is deprecated and will be removed in v6. Use `is_activation_checkpointing` "
    "instead.": FutureWarning,
    "'pin_memory' argument is set as true but no accelerator is found, then device pinned memory won't be "
    "used.": UserWarning,
}
"""Texts of warnings in a normal run, and their kinds: PEFT reads an old name of transformers, and there is no GPU."""


def filter_noise() -> None:
    """Leave out the known messages. One that differs in a single letter is shown."""
    for name, message in LOGGED.items():
        logging.getLogger(name).addFilter(_AllBut(message))
    for text, kind in WARNED.items():
        warnings.filterwarnings("ignore", message=re.escape(text) + r"\Z", category=kind)


class _AllBut(logging.Filter):
    """Let all records pass but those of one message."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self._message = message

    def filter(self, record: logging.LogRecord) -> bool:
        return record.getMessage() != self._message

    def __eq__(self, other: object) -> bool:  # so that a second call adds nothing to a logger
        return isinstance(other, _AllBut) and other._message == self._message

    def __hash__(self) -> int:
        return hash(self._message)


def say_what_is_loaded() -> None:
    """Say on stderr that PyTorch is being imported, once on each machine: it takes seconds, and up to a minute."""
    if "torch" not in sys.modules and os.environ.get("LOCAL_RANK", "0") == "0":
        print("Loading PyTorch and Transformers ...", file=sys.stderr, flush=True)
