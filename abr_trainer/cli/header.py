"""What a run says before its first batch: model, data, batch, rule, budget, and where it goes."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import has_length

from .. import __version__
from ..data.demo import DEMO_MODEL
from ..data.identity import are_blocks
from ..models.unwrapping import without_adapter
from ..schedulers import ConstantScheduler, GradNormSkip, OutlierSkip, RepeatUntil, RobustRows, RowRule
from ..schedulers.base import rules_in
from ..training.budget import limit_of
from ..training.identity import wants_row_indices
from ..training.log_table import PLAIN_WIDTH

LABEL = 11
"""Characters of a label and of the space behind it."""

SKIPPED_BY = {OutlierSkip: "loss", GradNormSkip: "gradient norm"}
"""What the rules around others compare."""

SPLITS = {"train": "train on", "validation": "evaluate on", "test": "test on", "primer": "begin with"}


def header(trainer: Any, recorded: Sequence[str], described: Sequence[str], checkpoint: str | None) -> list[str]:
    """Return the lines of the header, each `label: text`; the first is a title.

    Args:
        recorded: The command of the run.
        described: Lines on model, data and flags, beside those that follow from the trainer.
        checkpoint: What the run goes on from.
    """
    args = trainer.args
    lines = [f"ABR Trainer {__version__}, {' '.join(recorded[:2])}", f"model: {_model(trainer)}", *described]
    if args.do_train:
        lines += [f"batch: {_batch(trainer)}", *_rules(trainer), f"budget: {_budget(trainer)}"]
        if args.scale_with_batch_size:
            lines.append(f"scaled: {args.max_steps:,} batches at a learning rate of {args.learning_rate:.3g}")
    if checkpoint is not None:
        lines.append(f"resumes: {checkpoint}")
    return [*lines, f"output: {args.output_dir}"]


def show_header(lines: Sequence[str]) -> None:
    """Print a header: a title, then labels and texts, wrapped between words."""
    console = Console()
    title, *rest = lines
    _print(console, Text(title, style="bold"))
    width = console.width if console.is_terminal else PLAIN_WIDTH
    for line in rest:
        label, _, text = line.partition(": ")
        if len(label) >= LABEL:  # its first word stands for it
            label, _, text = line.partition(" ")
        wrapped = textwrap.wrap(text, max(width - LABEL, 20), break_long_words=False, break_on_hyphens=False) or [""]
        for i, part in enumerate(wrapped):
            _print(console, Text.assemble((f"{'' if i else label:{LABEL}}", "dim"), part))


def _print(console: Console, text: Text) -> None:
    if console.is_terminal:
        console.print(text, soft_wrap=True)
    else:
        print(text.plain, flush=True)


def _model(trainer: Any) -> str:
    """Return class, type and place of a model."""
    model = without_adapter(trainer.model)
    name = getattr(model.config, "_name_or_path", "") or "new"
    name = "demo" if name == str(DEMO_MODEL) else name
    args = trainer.args
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    mixed = "bf16" if args.bf16 else "fp16" if args.fp16 else ""
    device = "cpu" if args.device.type == "cpu" else args.device
    computes = f", computes in {mixed}" if mixed else ""
    return f"{name} ({type(model).__name__}), {dtype}{computes}, on {device}"


def _batch(trainer: Any) -> str:
    """Return how many rows a batch has, and how they are spread."""
    args = trainer.args
    rows = args.per_device_train_batch_size * max(args.n_gpu, 1)
    length = _length(trainer.train_dataset)
    factors = [counted(rows, "row")]
    factors += [counted(length, "token")] if length else []
    factors += [counted(args.gradient_accumulation_steps, "micro-batch"), counted(args.world_size, "rank")]
    rows *= args.gradient_accumulation_steps * args.world_size
    return f"{' x '.join(factors)} = {counted(rows * length, 'token') if length else counted(rows, 'row')}"


def _length(rows: Any) -> int | None:
    """Return how many tokens each row has, if the first, the middle and the last one have the same number."""
    is_sized: bool = has_length(rows)
    if isinstance(rows, IterableDataset) or not is_sized or not len(rows):
        return None
    some = [rows[i] for i in (0, len(rows) // 2, len(rows) - 1)]
    lengths = {len(row["input_ids"]) if "input_ids" in row else None for row in some}
    return lengths.pop() if len(lengths) == 1 else None


def _rules(trainer: Any) -> list[str]:
    """Return a line each on the rule for batches, on those that are skipped, and on rows."""
    *around, rule = rules_in(trainer.repeat_scheduler)
    ends, skips = "", []
    for each in around:
        if isinstance(each, RepeatUntil):
            ends = f", until {each.until:g} of the run is spent"
        else:
            skips.append(_skips(each))
    is_constant = isinstance(rule, ConstantScheduler)
    does = f"{counted(rule.repeats, 'update')} on each batch" if is_constant else _parameters(rule)
    return [
        f"rule: {trainer.args.repeat_scheduler}, {does}{ends}",
        f"outliers: {'; '.join(skips) or 'no batch is skipped for its loss'}",
        f"rows: {_row_rule(trainer.row_rule)}{_blocks(trainer)}",
    ]


def _row_rule(rule: RowRule | None) -> str:
    """Return which rows a rule drops, in words if it is ours."""
    if rule is None:
        return "none are dropped"
    if not isinstance(rule, RobustRows):
        return f"drops rows by {rule!r}"
    among = f" among the last {rule.window:,} rows" if rule.window != RobustRows.window else ""
    low = f", or below {rule.low:g} of that loss" if rule.low else ""
    return f"robust, drops a row whose loss is {rule.sigmas:g} spreads above the usual loss of its length{among}{low}"


def _blocks(trainer: Any) -> str:
    """Return what to know if rows are judged or ranked, and are blocks of tokens; else nothing."""
    if not wants_row_indices(trainer) or not are_blocks(trainer.train_dataset):
        return ""
    length = _length(trainer.train_dataset)
    of = f" of {counted(length, 'token')}" if length else ""
    return f". Rows are blocks{of}; abr sft judges each row of the file by itself"


def _skips(rule: Any) -> str:
    """Return which batches a rule around another one skips."""
    what = next((name for kind, name in SKIPPED_BY.items() if isinstance(rule, kind)), None)
    if what is None:
        return repr(rule)
    name = type(rule).__name__.removesuffix("OutlierSkip").lower() if isinstance(rule, OutlierSkip) else "gradients"
    return f"{name}, skips a batch whose {what} is {rule.sigmas:g} spreads above the last {rule.window}"


def _parameters(rule: Any) -> str:
    if not dataclasses.is_dataclass(rule):
        return repr(rule)
    fields = [each.name for each in dataclasses.fields(rule) if each.repr and each.name != "inner"]
    return ", ".join(f"{name} {getattr(rule, name)}" for name in fields)


def _budget(trainer: Trainer) -> str:
    """Return when a run ends."""
    args: Any = trainer.args
    limit = limit_of(args)
    if limit is not None:
        capped = f", at most {args.most_batches:,} batches" if args.most_batches > 0 else ""
        if limit.counts_seconds:
            return f"{counted(limit.most, 'second')} of training{capped}"
        return f"{limit.most:,} passes{capped}"
    if args.max_steps > 0:
        return f"{args.max_steps:,} batches"
    rows: Any = trainer.train_dataset
    micro_batches: float = len(rows) / (args.per_device_train_batch_size * max(args.n_gpu, 1) * args.world_size)
    whole = math.floor(micro_batches) if args.dataloader_drop_last else math.ceil(micro_batches)
    each = max(math.ceil(whole / args.gradient_accumulation_steps), 1)
    batches = math.ceil(args.num_train_epochs * each) + args.primer_batches
    epochs = "1 epoch" if args.num_train_epochs == 1 else f"{args.num_train_epochs:g} epochs"
    return f"{epochs} of {counted(each, 'batch')}, {batches:,} in all"


def describe_data(arguments: Any, splits: Mapping[str, Any], what: str, tokens: Mapping[str, int]) -> str:
    """Return a line on the rows of each split.

    Args:
        arguments: The flags that name the data.
        what: One of the rows.
        tokens: How many tokens a split has, where that is known.
    """
    parts = []
    for split, rows in splits.items():
        count = counted(len(rows), what) if has_length(rows) else f"a stream of {what}s"
        has = f" ({tokens[split]:,} tokens)" if split in tokens else ""
        parts.append(f"{count} to {SPLITS.get(split, split)}{has}")
    names = ("dataset_mix", "dataset_name", "task_name", "train_file", "validation_file", "test_file")
    given = [str(value) for name in names if (value := getattr(arguments, name, None))]
    return f"data: {', '.join(dict.fromkeys(given))}: {', '.join(parts)}"


def describe_blocks(blocks: Mapping[str, Any], block_size: int, arguments: Any) -> str:
    """Return a line on blocks of tokens.

    Args:
        arguments: The flags that name the data.
    """
    tokens = {split: len(rows) * block_size for split, rows in blocks.items() if split == "train" and has_length(rows)}
    line = describe_data(arguments, blocks, "block", tokens)
    return f"{line}; a block is {block_size:,} tokens"


def counted(number: int, what: str) -> str:
    """Write a number of things.

    >>> counted(1, "rank"), counted(2, "batch"), counted(1024, "row")
    ('1 rank', '2 batches', '1,024 rows')
    """
    plural = what + ("es" if what.endswith("ch") else "s")
    return f"{number:,} {what if number == 1 else plural}"
