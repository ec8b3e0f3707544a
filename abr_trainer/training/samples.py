"""Samples of what a model writes, before, while and after it is trained: text that people can read."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.utils import logging

from ..data.context import context_of
from ..data.prompts import NEW_TOKENS, Prompt, prompts_in
from ..models.unwrapping import without_adapter
from ..records.errors import one_line, refuse_below
from ..records.files import SAMPLES_NAME, TRAINER_STATE, cut_lines, read_json, read_lines, step_of
from ..report.text import printable
from .evaluation import same_random_numbers
from .generation import continue_prompts, why_not
from .text_scores import (
    PACKAGES,
    ScoresBefore,
    TextScores,
    refuse_missing_packages,
    together,
    warn_of_other_letters,
)

logger = logging.get_logger(__name__)

BY_DEFAULT = 3
"""Prompts of a run from the command line."""

NONE = "No samples: "

LONG = 20.0
"""Seconds from which on samples are taken for a burden."""

TEXT_WIDTH = 100

Split = str
MakePrompts = Callable[[Split, int | None], list[Prompt]]
"""From a split and a number of prompts, or None for all, to these."""


@dataclass
class GenerationArguments:
    """What the model writes in the course of a run."""

    sample_prompts: int | None = field(
        default=None,
        metadata={
            "help": "Texts of the evaluation set that the model continues. Before training, at each evaluation and at "
            "the end, greedily. Shown beside what follows in the text: at the end of the run, in TensorBoard and in "
            f"the report. 0: none. Default: {BY_DEFAULT}."
        },
    )
    generation_metrics: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Measure bleu, rouge or both of continuations. At each evaluation and on the test set, before and "
            "after training, of every row, which takes time: --max_eval_samples limits it. Needs "
            'pip install "abr-trainer[metrics]".',
            "choices": sorted(PACKAGES),
        },
    )

    def __post_init__(self) -> None:
        self.are_samples_asked_for = self.sample_prompts is not None
        refuse_below(self, {"sample_prompts": 0})
        refuse_missing_packages(self.generation_metrics)

    def fit(self, args: Any) -> None:
        """Fill in the default, and refuse what a run cannot have.

        Raises:
            ValueError: There is nothing to continue, or nothing is trained.
        """
        has_both = args.do_train and args.do_eval
        if self.sample_prompts and not has_both:
            raise ValueError("--sample_prompts needs --do_train and --do_eval: prompts are of the evaluation set.")
        if self.sample_prompts is None:
            self.sample_prompts = BY_DEFAULT if has_both else 0
        if self.generation_metrics and not (args.do_eval or args.do_predict):
            raise ValueError("--generation_metrics needs --do_eval or --do_predict: texts to continue.")


def follow_text(trainer: Any, arguments: GenerationArguments, prompts: MakePrompts) -> None:
    """Let a trainer sample and measure what its model writes, as these flags ask for.

    Raises:
        ValueError: Metrics are asked for, and the model cannot write here, or there is nothing to continue. For
            samples that nobody asked for, the latter is a warning.
    """
    args, refused = trainer.args, why_not(trainer.model)
    if arguments.generation_metrics:
        if refused:
            raise ValueError(f"--generation_metrics: {refused}.")
        splits = {"eval": ("validation", args.do_eval), "test": ("test", args.do_predict)}
        measures = {}
        for prefix, (split, is_wanted) in splits.items():
            if is_wanted:
                found = prompts(split, None)
                if not found:
                    raise ValueError(f"--generation_metrics: the {split} set has nothing to continue.")
                measures[prefix] = _scores(trainer, arguments.generation_metrics, found)
        if "eval" in measures:
            trainer.eval_measurement = together(trainer.eval_measurement, measures["eval"])
        trainer.test_measurement = measures.get("test")
        if args.do_train:
            trainer.add_callback(ScoresBefore(trainer, measures))
    if arguments.sample_prompts:
        if refused and trainer.is_world_process_zero():
            logger.warning(f"No --sample_prompts: {refused}.")
        if not refused:
            try:
                sampler = SampleCallback(trainer, prompts("validation", arguments.sample_prompts))
            except ValueError as error:
                if arguments.are_samples_asked_for:
                    raise
                if trainer.is_world_process_zero():
                    logger.warning(f"{'' if str(error).startswith(NONE) else NONE}{error}")
            else:
                trainer.add_callback(sampler)


def are_sampled(trainer: Any) -> bool:
    """Tell whether samples of what a trainer's model writes are made."""
    return any(isinstance(each, SampleCallback) for each in trainer.callback_handler.callbacks)


def cut_samples(args: Any, checkpoint: str) -> None:
    """Remove the samples of batches after a checkpoint, from which a run goes on, whether or not it makes more."""
    path, state = Path(args.output_dir, SAMPLES_NAME), read_json(Path(checkpoint, TRAINER_STATE))
    if args.process_index == 0 and state is not None and path.is_file():
        cut_lines(path, state["global_step"])


def _scores(trainer: Any, metrics: Sequence[str], prompts: Sequence[Prompt]) -> TextScores:
    if "rouge" in metrics and trainer.is_world_process_zero():
        warn_of_other_letters([prompt.reference for prompt in prompts])
    args = trainer.args
    return TextScores(metrics, prompts, trainer.processing_class, args.per_device_eval_batch_size, trainer.accelerator)


class SampleCallback(TrainerCallback):
    """Let the model continue a few prompts before training, at each evaluation and at the end.

    The texts go into `_samples.jsonl` in the output directory and to TensorBoard. The main process writes alone; it
    changes neither weights nor random numbers, and the budget is not charged. If the model fails to write, a warning
    says so, and the run goes on without samples. It is silent in a hyperparameter search.

    Args:
        trainer: To which it is to be added.
        prompts: What to continue, or how many rows of the trainer's evaluation set to take it from.

    Raises:
        ValueError: The model cannot write, or there is nothing to continue.
    """

    def __init__(self, trainer: Any, prompts: Sequence[Prompt] | int = BY_DEFAULT) -> None:
        if refused := why_not(trainer.model):
            raise ValueError(f"{NONE}{refused}.")
        if not hasattr(trainer.processing_class, "decode"):
            raise ValueError(f"{NONE}the trainer needs a tokenizer as its `processing_class`.")
        self._trainer = trainer
        self._prompts = _prompts_of(trainer, prompts) if isinstance(prompts, int) else list(prompts)
        if not self._prompts:
            raise ValueError(f"{NONE}the evaluation set has nothing to continue.")
        self._groups: dict[int, list[dict[str, Any]]] | None = None
        self._last: int | None = None
        self._has_ended = self._has_warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._groups, self._last, self._has_ended = None, None, False
        if not state.is_world_process_zero or state.is_hyper_param_search:
            return
        path = Path(args.output_dir, SAMPLES_NAME)
        cut_lines(path, state.global_step)
        self._groups = {}
        for line in read_lines(path):
            group = self._groups.setdefault(line["step"], [])
            if all(line["sample"] != each["sample"] for each in group):  # those of the kept model may stand twice
                group.append(line)
            self._last = line["step"]
        if state.global_step == 0:
            self._sample(args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sample(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._has_ended = True
        self._sample(args, state)

    def _sample(self, args: Any, state: Any) -> None:
        """Write down what the model writes now, unless that was done of these weights. The last lines are its own."""
        step = self._step_of_weights(args, state)
        if self._groups is None or step == self._last:
            return
        if step not in self._groups:
            lines = self._written(step, state.epoch)
            if lines is None:
                self._groups = None
                return
            self._groups[step] = lines
            self._show(args, step, lines)
        self._last = step
        with Path(args.output_dir, SAMPLES_NAME).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in self._groups[step]))

    def _step_of_weights(self, args: Any, state: Any) -> int:
        best = state.best_model_checkpoint
        is_best_loaded = self._has_ended and args.load_best_model_at_end and best is not None and Path(best).is_dir()
        return step_of(Path(best)) if is_best_loaded else int(state.global_step)

    def _written(self, step: int, epoch: float | None) -> list[dict[str, Any]] | None:
        start = time.perf_counter()
        try:
            texts = continue_prompts(
                self._trainer.accelerator.unwrap_model(self._trainer.model),
                self._trainer.processing_class,
                self._prompts,
                batch_size=self._trainer.args.per_device_eval_batch_size,
                most=NEW_TOKENS,
            )
        except Exception as error:  # models are other people's code, and a run must not end for want of samples
            logger.warning(f"No samples any more: the model cannot continue the prompts ({one_line(error)}).")
            return None
        seconds = time.perf_counter() - start
        logger.debug(f"{len(texts)} samples took {seconds:.2f} s.")
        if seconds > LONG and not self._has_warned:
            logger.warning(f"Samples take {seconds:.0f} s at each evaluation. --sample_prompts 0 turns them off.")
            self._has_warned = True
        return [
            {
                "step": step,
                "epoch": epoch,
                "sample": index + 1,
                "prompt": prompt.text,
                "continuation": texts[index],
                "reference": prompt.reference,
                "seconds": round(seconds / len(texts), 4),
            }
            for index, prompt in enumerate(self._prompts)
        ]

    def _show(self, args: Any, step: int, lines: Sequence[dict[str, Any]]) -> None:
        """Send samples to TensorBoard, if the run logs there and nobody pushes these logs."""
        if args.push_to_hub and not hasattr(args, "repeat_scheduler"):
            return  # `Trainer` pushes the folder of its logs, and these hold text of the data
        with _writer_of(self._trainer) as writer:
            if writer is not None:
                for line in lines:
                    writer.add_text(f"samples/{line['sample']}", as_markdown(line), step)
                writer.flush()


def _prompts_of(trainer: Any, count: int) -> list[Prompt]:
    """Return prompts from the evaluation set of a trainer, of several from the first."""
    rows = trainer.eval_dataset
    rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
    if rows is None:
        raise ValueError(f"{NONE}the trainer has no `eval_dataset` to take prompts from.")
    config = without_adapter(trainer.model).config
    with same_random_numbers():  # rows may be made when they are read
        return prompts_in(rows, trainer.processing_class, count, context_of(config))


@contextmanager
def _writer_of(trainer: Any) -> Iterator[Any]:
    """Yield what writes to the TensorBoard logs of a trainer; None if it has none."""
    callbacks = trainer.callback_handler.callbacks
    callback = next((each for each in callbacks if isinstance(each, TensorBoardCallback)), None)
    if callback is None or callback.logging_dir is None:
        yield None
    elif callback.tb_writer is not None:
        yield callback.tb_writer
    else:  # closed at the end of training
        with callback._SummaryWriter(log_dir=callback.logging_dir) as writer:
            yield writer


def as_markdown(line: dict[str, Any]) -> str:
    r"""Return a sample as TensorBoard shows it: its texts as code, in which nothing is markup.

    >>> print(as_markdown({"prompt": "Once", "continuation": "<b>a</b>", "reference": "upon\na time"}))
    **prompt**
    <BLANKLINE>
        Once
    <BLANKLINE>
    **the model writes**
    <BLANKLINE>
        <b>a</b>
    <BLANKLINE>
    **in the text**
    <BLANKLINE>
        upon ⏎ a time
    """
    parts = {"prompt": line["prompt"], "the model writes": line["continuation"], "in the text": line["reference"]}
    blocks = []
    for name, text in parts.items():
        lines = textwrap.wrap(printable(text), TEXT_WIDTH) or ["(nothing)"]
        blocks += [f"**{name}**", "\n".join(f"    {each}" for each in lines)]
    return "\n\n".join(blocks)
