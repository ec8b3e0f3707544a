"""The command `abr`: find the verb and call its module. Imports neither torch nor transformers."""

from __future__ import annotations

import difflib
import importlib
import os
import select
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from .. import __version__
from ..records.errors import WRONG_USAGE, MissingPackage, exit_statuses, one_line_errors
from .noise import filter_noise, say_what_is_loaded


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb of `abr`.

    Attributes:
        module: The module whose `main` runs it.
        summary: What it does, in one line.
        example: A command that works when pasted.
        needs_torch: Whether the module imports PyTorch, which takes seconds.
    """

    module: str
    summary: str
    example: str
    needs_torch: bool = False


VERBS = {
    "train": Verb(
        "run_clm_abr",
        "fine-tune a causal language model",
        "abr train --dataset_name demo --do_train --do_eval --output_dir runs/demo",
        needs_torch=True,
    ),
    "sft": Verb(
        "abr_trainer.cli.sft",
        "fine-tune on chats or instructions, with TRL",
        "abr sft --dataset_name demo --chat_template alpaca --do_train --do_eval --output_dir runs/chat",
        needs_torch=True,
    ),
    "classify": Verb(
        "abr_trainer.cli.classify",
        "fine-tune a sentence classifier: GLUE or your own rows",
        "abr classify --model_name_or_path demo --task_name demo --do_train --do_eval --output_dir runs/reports",
        needs_torch=True,
    ),
    "compare": Verb(
        "abr_trainer.cli.compare",
        "compare rules at equal compute: train each with several seeds",
        "abr compare --schedulers baseline abr --seeds 5 --out runs/cmp -- --dataset_name demo --max_passes 200",
    ),
    "compare-prompts": Verb(
        "abr_trainer.cli.compare_prompts",
        "compare prompts for a classifier: train with each and several seeds",
        "abr compare-prompts --prompts none perfect --seeds 5 --out runs/prompts -- --task_name mrpc",
    ),
    "report": Verb(
        "abr_trainer.cli.report",
        "write the report of a run or of a comparison",
        "abr report runs/demo",
    ),
    "why": Verb(
        "abr_trainer.cli.why",
        "explain why a batch was repeated or skipped",
        "abr why runs/demo 37",
    ),
    "rows": Verb(
        "abr_trainer.cli.rows",
        "list the broken rows of a run, or write a file without them",
        "abr rows runs/demo",
    ),
    "perplexity": Verb(
        "abr_trainer.cli.perplexity",
        "measure the perplexity of a model by a named definition",
        "abr perplexity --dataset_name demo --token_length 128",
        needs_torch=True,
    ),
    "prune": Verb(
        "abr_trainer.cli.prune",
        "prune a model by magnitude",
        "abr prune --output_dir runs/pruned",
        needs_torch=True,
    ),
    "export": Verb(
        "abr_trainer.cli.export",
        "merge an adapter into its base model",
        "abr export --adapter_name_or_path runs/demo --output_dir runs/whole",
        needs_torch=True,
    ),
    "push": Verb(
        "abr_trainer.cli.push",
        "push a finished run to the Hugging Face Hub",
        "abr push runs/demo",
    ),
    "evaluate": Verb(
        "abr_trainer.cli.evaluate",
        "evaluate a trained classifier",
        "abr evaluate --adapter_name_or_path runs/reports",
        needs_torch=True,
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line.

    Raises:
        SystemExit: The command line or a file that it names is wrong (status 2), the verb failed, or standard output
            is closed (both status 1).
    """
    try:
        with exit_statuses():
            _do(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        raise SystemExit(1) from None


def _stdout_is_closed() -> bool:
    """Tell whether the reader of standard output is gone, as in `abr ... | head`. If so, discard further output."""
    try:
        stdout = sys.stdout.fileno()
    except OSError:  # it is not a file
        return False
    asked = select.poll()
    asked.register(stdout, select.POLLOUT)
    is_closed = any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)  # Python flushes again when it exits
    return is_closed


def _do(argv: Sequence[str] | None) -> None:
    verb, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("--help", "-h", "help"):
        print(overview())
    elif verb == "--version":
        print(f"abr {__version__}")
    elif verb in VERBS:
        from .quick import check  # imported here, because it imports this module

        check(verb, arguments)
        filter_noise()
        if VERBS[verb].needs_torch:
            say_what_is_loaded()
        with one_line_errors(MissingPackage):
            module = importlib.import_module(VERBS[verb].module)
        module.main(arguments)
    else:
        refuse(verb)


def overview() -> str:
    """Return the text that `abr` shows: all verbs, on one screen."""
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "usage: abr VERB [flags]",
            "",
            *(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items()),
            "",
            f"Try it: {VERBS['train'].example}",
            "abr VERB --help shows the flags of a verb.",
            "On several GPUs: torchrun --nproc_per_node 8 -m abr_trainer VERB [flags]",
        ]
    )


def refuse(verb: str) -> NoReturn:
    """End the program with an error about an unknown verb."""
    if verb.startswith("-"):
        message = f"Give a verb before {verb}. `abr` lists the verbs."
    else:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        message = f"Unknown verb {verb!r}. " + (f"Did you mean {close[0]!r}?" if close else "`abr` lists the verbs.")
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(WRONG_USAGE)
