"""The arguments of a run: everything `TrainingArguments` takes, and which batches to repeat or skip."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from ..records.errors import refuse_below
from ..schedulers import OUTLIER_RULES, RepeatScheduler, build_rule, reads_flag
from ..schedulers.threshold import parse_threshold
from .ledger import forward_share
from .support import refuse_pushing_inputs, refuse_single_process_launch

logger = logging.get_logger(__name__)

LEAST_VALUES = {
    "max_repeats": 1,
    "max_consecutive_skips": 1,
    "primer_batches": 0,
    "early_stopping_patience": 1,
    "early_stopping_threshold": 0,
    "max_passes": 1,
    "learning_rate": 0,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
}

SEEDS = {"seed": (0, 2**32 - 1), "data_seed": (-(2**63), 2**64 - 1)}
"""What NumPy and torch take for a seed: the least and the most."""

CHEAPEST_BATCH = forward_share(frozen_base=False, activation_checkpointing=True)
"""The least a batch can cost, in passes."""


@dataclass
class ABRConfig(TrainingArguments):
    """`TrainingArguments` with the fields below.

    Defaults that differ from `TrainingArguments`: `report_to="tensorboard"`, `logging_steps=10`, `eval_on_start`,
    which is True where `do_train` and `do_eval` are, and `eval_strategy`, which is "epoch" where `do_eval` asks for
    evaluation (that of `save_strategy` where the best model is loaded at the end; "no" beside `eval_passes`) and "no"
    elsewhere. `greater_is_better` is False for a perplexity. `max_passes` sets `max_steps` to the most batches that
    the budget can buy; a `max_steps` given beside it caps the number of batches.
    """

    repeat_scheduler: str = field(
        default="baseline",
        metadata={
            "help": "How often to train on each batch: baseline, fixed, random, abr, window, gain, replay, learnable, "
            "easy, or your own as module:Class. baseline: once. fixed: --max_repeats times, by default twice. random: "
            "1 to --max_repeats times. abr: the more often the higher its first-pass loss, by --loss_threshold. "
            "window: by the trend of the last losses. gain: as long as another pass gains more than a fresh batch "
            "would. replay: hard batches once more, some batches later. learnable: a network learns it from the "
            "losses that follow. easy: skips easy batches."
        },
    )
    repeat_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Parameters of the rule as JSON: '{\"max_repeats\": 3}'. They win over flags.",
            "metavar": "JSON",
        },
    )
    loss_threshold: float | str | None = field(
        default=None,
        metadata={
            "help": "What abr takes for a high first-pass loss. A number: so many nats per target token buy an "
            "update. q0.8: the highest fifth of the recent losses is repeated, of these the highest fifth once more, "
            "and so on. s1.5: once more for each 1.5 robust standard deviations above their median. Default: 1.0."
        },
    )
    max_repeats: int | None = field(
        default=None,
        metadata={"help": "Most updates on one batch; fixed makes so many. Default: the rule's own."},
    )
    repeat_until: float | None = field(
        default=None,
        metadata={
            "help": "Repeat until this share of the run is spent, e.g. 0.85, and train on each batch once after that."
        },
    )
    skip_outliers: str = field(
        default="robust",
        metadata={
            "help": "Skip batches with outlying losses: robust, classic or none. The loss is that of the first pass. "
            "robust: by median and MAD of the recent losses. classic: by their mean and standard deviation, the "
            "published rule.",
            "choices": [*sorted(OUTLIER_RULES), "none"],
        },
    )
    outlier_sigmas: float | None = field(
        default=None,
        metadata={
            "help": "Spreads above the recent losses that make an outlier. Default: 4.0 (robust), 2.5 (classic)."
        },
    )
    outlier_window: int = field(default=100, metadata={"help": "Number of recent losses that outliers are judged by."})
    skip_grad_norm: float | None = field(
        default=None,
        metadata={
            "help": "Skip batches whose gradient norm stands out by so many spreads, robust standard deviations of "
            "the logarithm of the recent norms; try 6. Decided after the backward: a skip costs a whole pass. "
            "Default: off."
        },
    )
    max_consecutive_skips: int = field(
        default=20,
        metadata={"help": "Save a checkpoint and stop with an error after this many skipped batches in a row."},
    )
    max_passes: int | None = field(
        default=None,
        metadata={
            "help": "Compute budget, in forward-backward passes over a batch. Training ends when it is spent, over "
            "as many epochs as that takes, and the learning rate follows the share of it that is spent. A skipped "
            "batch costs its forward: 1/3 of a pass, 1/2 with a frozen base. Less than a pass can be left at the end."
        },
    )
    eval_passes: float | None = field(
        default=None,
        metadata={
            "help": "Evaluate every so many passes; below 1, a share of --max_passes. Runs of equal "
            "budget are then evaluated at equal compute, however often they repeat."
        },
    )
    save_passes: float | None = field(
        default=None,
        metadata={
            "help": "Save a checkpoint whenever so many more passes are spent, beside what --save_strategy says; "
            "below 1, a share of --max_passes."
        },
    )
    primer_batches: int = field(
        default=0,
        metadata={"help": "Train on this many batches at the start once each, neither repeating nor skipping them."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete what an earlier run left in --output_dir."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many batches; below 1, a share of the run."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036  # HfArgumentParser takes the second type
        default="tensorboard", metadata={"help": "Where to log: tensorboard, wandb, ..., all or none."}
    )
    eval_strategy: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "When to evaluate: no, steps or epoch. Default: epoch if --do_eval, else no."},
    )

    scale_with_batch_size: bool = field(
        default=False,
        metadata={
            "help": "Set --learning_rate to --base_learning_rate x sqrt(batch) and --max_steps to --base_samples / "
            "batch, where a batch is that of all devices and accumulated micro-batches: runs of other batch sizes "
            "then see as many samples."
        },
    )
    base_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of a batch of one sample, for --scale_with_batch_size."}
    )
    base_samples: int | None = field(
        default=None, metadata={"help": "Samples to train on, for --scale_with_batch_size."}
    )
    eval_on_start: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Evaluate before the first batch, too. Default: where --do_train and --do_eval ask for both.",
            "nargs": "?",  # as for a flag whose default is no None
            "const": True,
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations without a new best. It must be better by more than "
            "--early_stopping_threshold. The best checkpoint, by --metric_for_best_model, is loaded (default of the "
            "commands: perplexity, or the first score of a task). Evaluates whenever --save_strategy saves, unless "
            "told otherwise. Each new best is saved."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much an evaluation must be better, in units of the metric."}
    )

    hub_base_model: str | None = field(
        default=None,
        metadata={"help": "What the base model is called on the Hub, where --model_name_or_path is a directory."},
    )

    def __post_init__(self) -> None:
        if self.eval_on_start is None:
            self.eval_on_start = self.do_train and self.do_eval
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        elif self.early_stopping_threshold:
            raise ValueError("--early_stopping_threshold means nothing without --early_stopping_patience.")
        if self.eval_strategy is None:
            evaluates_with_saves = self.load_best_model_at_end and self.save_strategy in ("steps", "epoch")
            by_default = "no" if self.eval_passes else self.save_strategy if evaluates_with_saves else "epoch"
            self.eval_strategy = by_default if self.do_eval else "no"
            if evaluates_with_saves and self.eval_steps is None:
                self.eval_steps = self.save_steps
        loads_best = self.load_best_model_at_end
        if loads_best:
            self._check_that_the_best_is_saved()
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        if str(self.resume_from_checkpoint).lower() in ("false", "no"):
            self.resume_from_checkpoint = None
        if self.hub_token is not None:
            raise ValueError(
                "--hub_token would be written to training_args.bin, in clear. "
                "Set the environment variable HF_TOKEN or run `hf auth login` instead."
            )
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("perplexity"):
            self.greater_is_better = False
        refuse_single_process_launch()
        self.plan()
        self.load_best_model_at_end = False  # or each evaluation would have to fall on a checkpoint: we save each best
        super().__post_init__()
        self.load_best_model_at_end = loads_best
        self._scale_with_batch_size()

    def _check_that_the_best_is_saved(self) -> None:
        """Refuse to look for the best where there are no evaluations or no checkpoints.

        Raises:
            ValueError: There are none.
        """
        flag = "--load_best_model_at_end" if self.early_stopping_patience is None else "--early_stopping_patience"
        if self.eval_strategy == "no" and not self.eval_passes:
            raise ValueError(
                f"{flag} needs evaluations: --do_eval, and --eval_strategy steps or epoch, or --eval_passes."
            )
        if self.save_strategy == "no":
            raise ValueError(f"{flag} needs checkpoints: --save_strategy steps, epoch or best.")

    def plan(self) -> None:
        """Check the fields above, take `max_steps` for a cap that was asked for, and lower it to what the budget buys.

        Raises:
            ValueError: A field is out of range, or names no rule.
        """
        refuse_below(self, LEAST_VALUES)
        for name, (least, most) in SEEDS.items():
            seed = getattr(self, name)
            if seed is not None and not (isinstance(seed, int) and least <= seed <= most):
                raise ValueError(f"--{name} must be a whole number from {least} to {most}, got {seed}.")
        for name in ("eval_passes", "save_passes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} must be positive, got {value}.")
            if value is not None and value < 1 and self.max_passes is None:
                raise ValueError(f"--{name} {value} is a share of --max_passes, which is not given.")
        if self.loss_threshold is not None:
            parse_threshold(self.loss_threshold)
        refuse_pushing_inputs(self, self.build_repeat_scheduler())
        self._warn_of_unread_flags()
        self.most_batches = self.max_steps
        if self.max_passes is not None:
            affordable = math.ceil(self.max_passes / CHEAPEST_BATCH)
            self.max_steps = min(self.max_steps, affordable) if self.max_steps > 0 else affordable

    def _scale_with_batch_size(self) -> None:
        """Set learning rate and number of batches by the size of a batch, which is known once the ranks are.

        Raises:
            ValueError: A base is missing or not asked for, or another value was given for what it sets.
        """
        bases: dict[str, Any] = {name: getattr(self, name) for name in ("base_learning_rate", "base_samples")}
        if not self.scale_with_batch_size:
            for name, value in bases.items():
                if value is not None:
                    raise ValueError(f"--{name} means nothing without --scale_with_batch_size.")
            return
        for name, value in bases.items():
            if value is None or value <= 0:
                raise ValueError(f"--scale_with_batch_size needs --{name}, above 0; got {value}.")
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        scaled = scaled_with_batch_size(bases["base_learning_rate"], bases["base_samples"], batch)
        before = {"learning_rate": self.learning_rate, "max_steps": self.most_batches}
        defaults = {"learning_rate": type(self).learning_rate, "max_steps": -1}
        for name, value in scaled.items():
            if before[name] not in (defaults[name], value):
                raise ValueError(
                    f"--{name} {before[name]:g} contradicts --scale_with_batch_size, which makes it {value:g} for a "
                    f"batch of {batch}. Leave one of them out."
                )
        self.learning_rate, self.max_steps = scaled["learning_rate"], int(scaled["max_steps"])
        self.most_batches = self.max_steps

    def build_repeat_scheduler(self) -> RepeatScheduler:
        """Return a new scheduler as the fields describe it, outlier skipping included.

        Raises:
            ValueError: A name is unknown, or a parameter out of range.
        """
        return build_rule(vars(self))

    def _warn_of_unread_flags(self) -> None:
        for flag in ("loss_threshold", "max_repeats"):
            if getattr(self, flag) is not None and not reads_flag(self.repeat_scheduler, flag):
                logger.warning(f"--{flag} means nothing to --repeat_scheduler {self.repeat_scheduler}.")


def scaled_with_batch_size(base_learning_rate: float, samples: int, batch: int) -> dict[str, float]:
    """Return the learning rate for a batch of so many samples, by the square root, and the batches that they make.

    >>> {name: float(f"{value:.3g}") for name, value in scaled_with_batch_size(5e-6, 10_000, batch=8).items()}
    {'learning_rate': 1.41e-05, 'max_steps': 1250.0}

    Raises:
        ValueError: There are fewer samples than one batch has.
    """
    if samples < batch:
        raise ValueError(f"--base_samples {samples} is less than one batch, which has {batch}.")
    return {"learning_rate": base_learning_rate * math.sqrt(batch), "max_steps": samples // batch}


def checkpoints_activations(args: TrainingArguments) -> bool:
    """Tell whether the backward recomputes activations, by the name that this version of transformers has for it."""
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


def setting(args: Any, name: str) -> Any:
    """Return an `ABRConfig` argument, or its default under plain `TrainingArguments`."""
    return getattr(args, name, ABRConfig.__dataclass_fields__[name].default)
