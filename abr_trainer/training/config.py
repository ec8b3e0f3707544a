"""The arguments of a run: those of `TrainingArguments`, and which batches to repeat or skip."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..schedulers import OUTLIER_RULES, RULE_FIELDS, RepeatScheduler, RowRule, build_row_rule, build_rule
from ..schedulers.registry import PARAMETERS, refuse_unread
from .failing import keep_time_out
from .plan import check_fields, most_affordable, refuse_best_without_saves, scale_with_batch_size
from .support import refuse_single_process_launch


@dataclass
class ABRConfig(TrainingArguments):
    """`TrainingArguments` with the fields that say which batches to repeat or skip, and what a run may spend.

    Defaults that differ from `TrainingArguments`:

    - `report_to="tensorboard"` and `logging_steps=10`.
    - `eval_on_start` is True if `do_train` and `do_eval` are.
    - `eval_strategy` is "no" without `do_eval` or beside `eval_passes`, that of `save_strategy` if the best model is
      loaded at the end, and else "epoch".
    - `greater_is_better` is False for a perplexity.

    `max_passes` or `max_seconds` sets `max_steps` to the most batches that the budget can buy. A `max_steps` given
    beside it caps the number of batches.
    """

    repeat_scheduler: str = field(
        default="baseline",
        metadata={
            "help": "How often to train on each batch: baseline, fixed, random, abr, window, gain, replay, learnable, "
            "easy, wait, follow, kl, or your own as module:Class. baseline: once. fixed: --max_repeats times, by "
            "default twice. random: 1 to --max_repeats times. abr: more often for a higher first-pass loss, see "
            "--loss_threshold. window: by the trend of the last losses. gain: while another pass gains more than a "
            "fresh batch. replay: hard batches again, some batches later. learnable: a network learns it from later "
            "losses. easy: once, but skip easy batches. wait: as often as a pass fits into the wait for the next "
            "batch. follow: as the trace of another run says, see --trace. kl: for GRPO and RLOO of TRL, while the "
            "model is close to the one that generated the batch."
        },
    )
    repeat_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Parameters of the rule as JSON: '{\"max_repeats\": 3}'. They override flags.",
            "metavar": "JSON",
        },
    )
    loss_threshold: float | str | None = field(
        default=None,
        metadata={
            "help": "Threshold of abr for the first-pass loss. A number, in nats per target token: the updates are "
            "the loss divided by it, rounded down. q0.8: the highest fifth of the recent losses get two updates, "
            "the highest fifth of these three, and so on. s1.5: one more update for each 1.5 robust standard "
            "deviations above their median. Default: 1.0."
        },
    )
    max_repeats: int | None = field(
        default=None,
        metadata={"help": "Most updates on one batch. For fixed, the number of updates. Default: the rule's own."},
    )
    repeat_until: float | None = field(
        default=None,
        metadata={"help": "Repeat until this share of the run is spent, e.g. 0.85. Then train on each batch once."},
    )
    trace: str | None = field(
        default=None,
        metadata={
            "help": "Trace for --repeat_scheduler follow: abr_trace.jsonl of a run, or its directory. Each batch is "
            "repeated, skipped and replayed as there. The rest must be the same: model, data, flags. Batches are not "
            "judged again: --skip_outliers is off, and --skip_grad_norm is refused."
        },
    )
    skip_outliers: str = field(
        default="robust",
        metadata={
            "help": "Skip batches with outlying losses: robust, classic, none. The loss is that of the first pass. "
            "robust: by level and spread of recent losses that look good. classic: by mean and standard deviation of "
            "all recent losses, as published.",
            "choices": [*sorted(OUTLIER_RULES), "none"],
        },
    )
    outlier_sigmas: float | None = field(
        default=None,
        metadata={
            "help": "Number of spreads above the level from which a loss is an outlier. Default: 4.0 (robust), 2.5 "
            "(classic)."
        },
    )
    outlier_window: int | None = field(
        default=None, metadata={"help": "Number of recent losses for finding outliers. Default: 100."}
    )
    skip_grad_norm: float | None = field(
        default=None,
        metadata={
            "help": "Skip batches whose gradient norm is this many robust standard deviations above the recent norms, "
            "on a log scale; try 6. A skip is decided after the backward pass and costs a full pass. Default: off."
        },
    )
    skip_rows: str = field(
        default="none",
        metadata={
            "help": "Drop rows with outlying losses: robust or none. Or your own rule, as module:Class. Other rows "
            "keep their weights. robust: by level and spread of recent row losses of the same length. Costs no extra "
            "pass."
        },
    )
    row_sigmas: float | None = field(
        default=None,
        metadata={"help": "Number of spreads above the level from which a row is dropped. Default: 4.25 (robust)."},
    )
    row_window: int | None = field(
        default=None, metadata={"help": "Number of recent row losses to compare with. Default: 256 (robust)."}
    )
    rank_rows: bool = field(
        default=False,
        metadata={
            "help": "Keep the last first-pass loss of every training row, for `abr rows`, in _row_losses.npz in "
            "--output_dir. Takes 12 bytes per row."
        },
    )
    max_consecutive_skips: int = field(
        default=20,
        metadata={"help": "Save a checkpoint and stop with an error after this many skipped batches in a row."},
    )
    max_passes: int | None = field(
        default=None,
        metadata={
            "help": "Compute budget, in forward-backward passes over a batch. Training ends when it is spent, after "
            "any number of epochs, and the learning rate follows the share that is spent. A skipped batch costs its "
            "forward pass: 1/3 of a pass, or 1/2 with a frozen base model. Less than one pass may be left at the end."
        },
    )
    max_seconds: int | None = field(
        default=None,
        metadata={
            "help": "Budget in seconds of training, instead of --max_passes. Batches and the wait for their data "
            "count; evaluation, logs and checkpoints do not. Training ends with the pass in which the seconds are "
            "over, after any number of epochs, and the learning rate follows the share that is spent. --warmup_steps "
            "and other lengths of the schedule are seconds then. What a run reaches depends on the machine."
        },
    )
    eval_passes: float | None = field(
        default=None,
        metadata={
            "help": "Evaluate every N passes; below 1, a share of the budget. Runs with the same budget are then "
            "evaluated at the same compute, or after the same time. The budget is --max_passes or --max_seconds."
        },
    )
    save_passes: float | None = field(
        default=None,
        metadata={
            "help": "Save a checkpoint every N passes, in addition to --save_strategy; below 1, a share of the "
            "budget: of --max_passes or --max_seconds."
        },
    )
    primer_batches: int = field(
        default=0,
        metadata={"help": "Train once on each of the first N batches, without repeats or skips."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the files of an earlier run in --output_dir."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every N batches; below 1, a share of the run."})
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
            "batch, so that runs with different batch sizes see the same number of samples. batch is the number of "
            "samples over all devices and accumulated micro-batches."
        },
    )
    base_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate for a batch of one sample, for --scale_with_batch_size."}
    )
    base_samples: int | None = field(
        default=None, metadata={"help": "Number of samples to train on, for --scale_with_batch_size."}
    )
    eval_on_start: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Also evaluate before the first batch. Default: true with both --do_train and --do_eval.",
            "nargs": "?",  # HfArgumentParser sets it only for a flag whose default is not None
            "const": True,
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after N evaluations without improvement. An improvement must exceed "
            "--early_stopping_threshold. The best checkpoint, by --metric_for_best_model, is loaded (default of the "
            "commands: perplexity, or the first score of a task). By default evaluates when --save_strategy saves. "
            "Each new best is saved."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "Least improvement for early stopping, in units of the metric."}
    )

    hub_base_model: str | None = field(
        default=None,
        metadata={"help": "Id of the base model on the Hub, if --model_name_or_path is a directory."},
    )

    def __post_init__(self) -> None:
        if self.eval_on_start is None:
            self.eval_on_start = self.do_train and self.do_eval
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        elif self.early_stopping_threshold:
            raise ValueError("--early_stopping_threshold needs --early_stopping_patience.")
        if self.eval_strategy is None:
            evaluates_with_saves = self.load_best_model_at_end and self.save_strategy in ("steps", "epoch")
            by_default = "no" if self.eval_passes else self.save_strategy if evaluates_with_saves else "epoch"
            self.eval_strategy = by_default if self.do_eval else "no"
            if evaluates_with_saves and self.eval_steps is None:
                self.eval_steps = self.save_steps
        loads_best = self.load_best_model_at_end
        if loads_best:
            refuse_best_without_saves(self)
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        if str(self.resume_from_checkpoint).lower() in ("false", "no"):
            self.resume_from_checkpoint = None
        if self.hub_token is not None:
            raise ValueError(
                "--hub_token would be written to training_args.bin in plain text. "
                "Set the environment variable HF_TOKEN or run `hf auth login` instead."
            )
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("perplexity"):
            self.greater_is_better = False
        refuse_single_process_launch()
        self.plan()
        refuse_unread(vars(self))
        self.load_best_model_at_end = False  # Trainer would require a checkpoint at each evaluation; we save each best
        super().__post_init__()
        self.load_best_model_at_end = loads_best
        scale_with_batch_size(self)
        keep_time_out(self.ddp_timeout)

    def plan(self) -> None:
        """Check the fields, and lower `max_steps` to the most batches in the budget; `most_batches` keeps its value.

        Raises:
            ValueError: A field is out of range, or a rule is unknown.
        """
        check_fields(self)
        self.most_batches = self.max_steps
        affordable = most_affordable(self)
        if affordable is not None:
            self.max_steps = min(self.max_steps, affordable) if self.max_steps > 0 else affordable

    def check_trial(self, trial: Any) -> None:
        """Refuse values of a trial of a hyperparameter search that its rule does not read.

        Fields that it has not set may be left from the trial before, of another rule.

        Raises:
            ValueError: There is one.
        """
        chosen = getattr(trial, "params", trial)
        left = {flag for flags in PARAMETERS.values() for flag in flags if flag not in chosen}
        refuse_unread({name: value for name, value in vars(self).items() if name not in left})

    def build_repeat_scheduler(self) -> RepeatScheduler:
        """Return a new scheduler built from the fields, including outlier skipping.

        Raises:
            ValueError: A name is unknown, or a parameter out of range.
        """
        return build_rule(vars(self))

    def build_row_rule(self) -> RowRule | None:
        """Return a new row rule built from the fields; None if no rows are dropped.

        Raises:
            ValueError: A name is unknown, or a parameter out of range.
        """
        return build_row_rule(vars(self))


def checkpoints_activations(args: TrainingArguments) -> bool:
    """Tell whether the backward pass recomputes activations, in any version of transformers."""
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


def refuse_fields_beside(args: Any, repeat_scheduler: RepeatScheduler | None, row_rule: RowRule | None) -> None:
    """Refuse fields that describe a rule where the trainer was given another one, which decides instead.

    Raises:
        ValueError: There is one.
    """
    of_rows = ("skip_rows", *PARAMETERS["skip_rows"])
    of_batches = [name for name in RULE_FIELDS if name not in (*of_rows, "seed")]
    given = {"repeat_scheduler": (repeat_scheduler, of_batches), "row_rule": (row_rule, of_rows)}
    for argument, (rule, names) in given.items():
        for name in names if rule is not None else ():
            value = getattr(args, name, RULE_FIELDS[name])
            if value not in (RULE_FIELDS[name], "none"):
                raise ValueError(
                    f"--{name} {value} means nothing beside `{argument}={rule!r}`, which decides instead: leave one "
                    "of them out."
                )


def setting(args: Any, name: str) -> Any:
    """Return an `ABRConfig` argument, or its default under plain `TrainingArguments`."""
    return getattr(args, name, ABRConfig.__dataclass_fields__[name].default)
