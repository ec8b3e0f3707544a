"""What all trainings do once trainer and data are there: train, evaluate, test, save, push."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import set_seed

from ..hub.repository import PushError
from ..records.commands import command, pasted
from ..records.errors import BadRow, one_line, one_line_errors
from ..records.files import CHECKPOINT_PREFIX, RESULTS, Damaged, is_unused, read_json
from ..report.samples import sample_lines
from ..schedulers.base import BadDecision
from ..schedulers.following import BadTrace
from ..training.callbacks import last_evaluation
from ..training.checkpoints import UnfitCheckpoint
from ..training.config import ABRConfig, setting
from ..training.evaluation import NoSuchMetric
from ..training.failing import RankFailed, ending_together
from ..training.log_table import Score
from ..training.readiness import check_disk, mend_generation_config, telling_of_a_failing_disk
from ..training.row_seams import RowsUnsupported
from ..training.samples import are_sampled, cut_samples
from ..training.screen import RunScreen, show_on
from ..training.signals import NoAccuracy
from ..training.summary import cost_lines, kept_line, kept_step, perplexity_lines
from ..training.text_scores import text_score_lines
from ..training.tracking import show_history
from ..training.trainer import ABRTrainer, TooManySkips
from .defaults import describe_defaults
from .header import header, show_header
from .parsing import wanted_splits as wanted_splits
from .run_directory import clear, only_run_in, replacing_previous_run, set_aside_later_checkpoints, write_provenance

EXPECTED: tuple[type[Exception], ...] = (
    *(TooManySkips, NoSuchMetric, NoAccuracy, BadRow, UnfitCheckpoint),
    *(RowsUnsupported, BadDecision, BadTrace, Damaged),
)
"""Errors of a training whose messages say all that there is to say."""

KNOWN: tuple[type[Exception], ...] = (*EXPECTED, RankFailed, OSError, torch.OutOfMemoryError)
"""The same, and what is told elsewhere."""


class CannotBegin(ValueError):
    """A library has refused a flag or a file before the first batch of a training."""


@contextlib.contextmanager
def refusing_to_begin(trainer: ABRTrainer) -> Iterator[None]:
    """Turn an error before the first batch into one line: it is of a flag, or of a file of the checkpoint.

    The optimizer, the schedule of the learning rate and the loaders are made there, of values that only they check.

    Raises:
        CannotBegin: There was such an error.
    """
    try:
        yield
    except KNOWN:
        raise
    except (ValueError, TypeError, LookupError, RuntimeError) as error:  # others are faults of a program
        if trainer.has_begun:
            raise
        raise CannotBegin(f"Training cannot begin: {one_line(error)} ({type(error).__name__})") from error


@contextlib.contextmanager
def leaving_nothing(args: ABRConfig) -> Iterator[None]:
    """Leave an unused output directory as it was if training cannot begin."""
    directory = Path(str(args.output_dir))
    was_unused = args.process_index == 0 and is_unused(directory)
    try:
        yield
    except CannotBegin:
        if was_unused:
            clear(directory)
        raise


def begin(args: ABRConfig) -> None:
    """Seed everything; what follows is the same from run to run, and on all ranks."""
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # our models leave none out, and looking for them costs
    set_seed(args.seed)


def run_alone(
    argv: list[str] | None,
    parse: Callable[[list[str] | None], Sequence[Any]],
    train_and_evaluate: Callable[..., dict[str, float]],
) -> dict[str, float]:
    """Parse a command line, and do its work as the only run in its output directory.

    Args:
        parse: Returns the arguments, those of the trainer last.
        train_and_evaluate: Does the work, given the command line and the arguments.
    """
    with one_line_errors(ValueError, OSError):
        arguments = parse(argv)
    with (
        one_line_errors(RankFailed),
        ending_together(),
        only_run_in(arguments[-1]),
        telling_of_a_failing_disk(arguments[-1]),
    ):
        return train_and_evaluate(argv, *arguments)


def carry_out(
    trainer: ABRTrainer,
    checkpoint: str | None,
    recorded: Sequence[str],
    arguments: Sequence[Any],
    described: Sequence[str],
    test: Callable[[], Mapping[str, float]],
    also_evaluated: Mapping[str, Any] | None = None,
    score: Score = Score(),  # noqa: B008  # it cannot be changed
) -> dict[str, float]:
    """Train, evaluate and test as the arguments of the trainer say, keep all that was measured, and return it.

    Args:
        checkpoint: What to go on from.
        recorded: The command that is recorded.
        arguments: Dataclasses beside those of the trainer, for `run.json`.
        described: What the header says of model and data, a line each: `label: text`.
        test: Measures the test split.
        also_evaluated: Data sets that are evaluated at the end, by the prefix of their metrics.
        score: What the evaluations are read by.
    """
    screen = RunScreen(score, trainer.row_rule is not None, shows_bar=not trainer.args.disable_tqdm)
    show_on(trainer, screen)
    with contextlib.closing(screen):
        return _carry_out(trainer, checkpoint, recorded, arguments, described, test, also_evaluated or {})


def _carry_out(
    trainer: ABRTrainer,
    checkpoint: str | None,
    recorded: Sequence[str],
    arguments: Sequence[Any],
    described: Sequence[str],
    test: Callable[[], Mapping[str, float]],
    also_evaluated: Mapping[str, Any],
) -> dict[str, float]:
    args: Any = trainer.args
    results: dict[str, float] = {}
    with one_line_errors(ValueError):
        if args.do_train:
            check_disk(args, trainer.model)
            mend_generation_config(trainer.model)
        if checkpoint is not None:
            trainer.check_checkpoint(checkpoint)
    with replacing_previous_run(args), one_line_errors(*EXPECTED, CannotBegin), leaving_nothing(args):
        if trainer.is_world_process_zero():
            write_provenance(args, recorded, *arguments)
            trainer.is_recorded = True
            defaults = describe_defaults(recorded, args, arguments)
            show_header(header(trainer, recorded, [*described, *defaults], checkpoint))
        if checkpoint is not None:
            set_aside_later_checkpoints(args, checkpoint)
            cut_samples(args, checkpoint)
        if args.do_train:
            with refusing_to_begin(trainer):
                results |= trainer.train(resume_from_checkpoint=checkpoint).metrics
            if trainer.is_preempted:
                end_preempted(trainer)
            if not trainer.has_trained:  # what was measured when it was
                results |= read_json(Path(args.output_dir, "train_results.json")) or {}
            trainer.save_model(_internal_call=True)  # or it would push before the run is evaluated
            save_metrics(trainer, "train", results)
    if args.do_eval:
        metrics = last_evaluation(trainer.state) if args.do_train and not args.load_best_model_at_end else None
        metrics = metrics or trainer.evaluate()
        for prefix, rows in also_evaluated.items():
            metrics |= trainer.evaluate(rows, metric_key_prefix=prefix)
        if "eval_perplexity" in metrics:
            metrics["perplexity"] = metrics["eval_perplexity"]  # as run_clm.py calls it
        save_metrics(trainer, "eval", metrics)
        results |= metrics
    if args.do_train:
        trainer.save_state()  # with the last evaluation in its log
        trainer.write_summary()
    if args.do_predict:
        metrics = dict(test())
        save_metrics(trainer, "test", metrics)
        results |= metrics
    if args.do_train:
        trainer.write_card()
    return results


def end_preempted(trainer: ABRTrainer) -> NoReturn:
    """End the program after SIGTERM, without the work that a finished run needs; the status is that of the signal."""
    if trainer.is_world_process_zero():
        saved = Path(str(trainer.args.output_dir), f"{CHECKPOINT_PREFIX}{trainer.state.global_step}")
        advice = "--resume_from_checkpoint true continues from it."
        print(f"preempted: SIGTERM has ended the run. It is saved in {saved}: {advice}", file=sys.stderr)
    trainer.accelerator.wait_for_everyone()  # a launcher ends all ranks when the first one ends
    raise SystemExit(128 + signal.SIGTERM)


def save_metrics(trainer: ABRTrainer, split: str, metrics: Mapping[str, float]) -> None:
    """Save metrics as `Trainer.save_metrics` does, which adds them to a file that a kill may have cut."""
    results = Path(str(trainer.args.output_dir), RESULTS)
    if trainer.is_world_process_zero() and results.exists() and read_json(results) is None:
        results.unlink()
    trainer.save_metrics(split, metrics)


def show_results(trainer: ABRTrainer, results: dict[str, float], score: Score) -> None:
    """Print what a run has reached, and what it cost, and samples if it made some."""
    if not trainer.is_world_process_zero():
        return
    output_dir = Path(str(trainer.args.output_dir))
    if trainer.args.do_train:
        show_history(output_dir, kept_step(trainer.args, trainer.state))
    log = trainer.state.log_history
    reached = [*perplexity_lines(log, trainer.ledger, results, score), *text_score_lines(log, results)]
    show_end(trainer, sorted(reached, key=lambda line: line.startswith("test ")))  # all of a split stand together
    if are_sampled(trainer) and (lines := sample_lines(output_dir)):
        print(*lines, sep="\n")


def show_end(trainer: ABRTrainer, reached: Iterable[str]) -> None:
    """Print what a run has reached, of which model, at what cost, and where that model is."""
    kept = kept_line(trainer.args, trainer.state, trainer.ledger)
    args = trainer.args
    costs = cost_lines(trainer.ledger, Path(str(args.output_dir)), setting(args, "max_seconds"))
    print("", *reached, *kept, *costs, sep="\n")


def push_result(trainer: ABRTrainer) -> None:
    """Push what was trained, if that was asked for; if that fails, end the program and say how to do it later."""
    if not trainer.args.push_to_hub:
        return
    try:
        trainer.push_to_hub()
    except PushError as error:
        later = pasted(command("push", [str(trainer.args.output_dir)]))
        raise SystemExit(f"error: trained, but not pushed: {one_line(error)}\nFinish it with: {later}") from error


def command_of(argv: Sequence[str] | None, verb: str) -> list[str]:
    """Return the command that makes this run again. Without arguments given, they are those of the process."""
    return command(verb, sys.argv[1:] if argv is None else argv)
