"""Whether the arguments of a run go together, and which of them follow from others."""

from __future__ import annotations

import math
from typing import Any

from ..records.errors import refuse_below
from ..schedulers.threshold import parse_threshold
from .ledger import forward_share
from .support import refuse_own_trace, refuse_pushing_inputs

LEAST_VALUES = {
    "max_repeats": 1,
    "max_consecutive_skips": 1,
    "primer_batches": 0,
    "early_stopping_patience": 1,
    "early_stopping_threshold": 0,
    "max_passes": 1,
    "max_seconds": 1,
    "learning_rate": 0,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
}

SEEDS = {"seed": (0, 2**32 - 1), "data_seed": (-(2**63), 2**64 - 1)}
"""What NumPy and torch take for a seed: the least and the most."""

CHEAPEST_BATCH = forward_share(frozen_base=False, activation_checkpointing=True)
"""The least a batch can cost, in passes."""

MOST_BATCHES_A_SECOND = 10**6
"""More than any machine can train on: the seconds end a run, not the number of its batches."""


def check_fields(args: Any) -> None:
    """Refuse fields of `ABRConfig` that are out of range.

    Raises:
        ValueError: A field is out of range, or names no rule.
    """
    refuse_below(args, LEAST_VALUES)
    for name, (least, most) in SEEDS.items():
        seed = getattr(args, name)
        if seed is not None and not (isinstance(seed, int) and least <= seed <= most):
            raise ValueError(f"--{name} must be a whole number from {least} to {most}, got {seed}.")
    for name in ("eval_passes", "save_passes"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be positive, got {value}.")
        if value is not None and value < 1 and args.max_passes is None and args.max_seconds is None:
            raise ValueError(
                f"--{name} {value} is a share of the budget, and there is none. Give --max_passes or --max_seconds."
            )
    if args.max_seconds is not None:
        check_seconds(args)
    if args.loss_threshold is not None:
        parse_threshold(args.loss_threshold)
    rule = args.build_repeat_scheduler()
    refuse_pushing_inputs(args, rule)
    refuse_own_trace(args, rule)
    args.build_row_rule()


def check_seconds(args: Any) -> None:
    """Refuse what a budget of seconds does not go with.

    Raises:
        ValueError: There is another budget, or a share of batches, whose number is not known before.
    """
    if args.max_passes is not None:
        raise ValueError(
            f"--max_passes {args.max_passes} and --max_seconds {args.max_seconds}: a run has one budget. Leave one "
            "out."
        )
    instead = {"logging_steps": "", "eval_steps": ", or use --eval_passes", "save_steps": ", or use --save_passes"}
    for name, other in instead.items():
        value = getattr(args, name)
        if value is not None and 0 < value < 1:
            shares = f"{other} {value}, a share of the seconds" if other else ""
            raise ValueError(
                f"--{name} {value} is a share of the batches, and --max_seconds does not tell how many they are. Give "
                f"a number of batches{shares}."
            )


def most_affordable(args: Any) -> int | None:
    """Return the most batches that the budget can buy; None without one."""
    if args.max_seconds is not None:
        return math.ceil(float(args.max_seconds) * MOST_BATCHES_A_SECOND)
    return None if args.max_passes is None else math.ceil(args.max_passes / CHEAPEST_BATCH)


def refuse_best_without_saves(args: Any) -> None:
    """Refuse to look for the best model without evaluations or without checkpoints.

    Raises:
        ValueError: There are none.
    """
    flag = "--load_best_model_at_end" if args.early_stopping_patience is None else "--early_stopping_patience"
    if args.eval_strategy == "no" and not args.eval_passes:
        raise ValueError(f"{flag} needs evaluations: --do_eval, and --eval_strategy steps or epoch, or --eval_passes.")
    if args.save_strategy == "no":
        raise ValueError(f"{flag} needs checkpoints: --save_strategy steps, epoch or best.")


def scale_with_batch_size(args: Any) -> None:
    """Set learning rate and number of batches by the size of a batch, which depends on the number of ranks.

    Raises:
        ValueError: A base is missing or not asked for, or another value was given for what it sets.
    """
    bases: dict[str, Any] = {name: getattr(args, name) for name in ("base_learning_rate", "base_samples")}
    if not args.scale_with_batch_size:
        for name, value in bases.items():
            if value is not None:
                raise ValueError(f"--{name} means nothing without --scale_with_batch_size.")
        return
    for name, value in bases.items():
        if value is None or value <= 0:
            raise ValueError(f"--scale_with_batch_size needs --{name}, above 0; got {value}.")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    scaled = scaled_with_batch_size(bases["base_learning_rate"], bases["base_samples"], batch)
    before = {"learning_rate": args.learning_rate, "max_steps": args.most_batches}
    defaults = {"learning_rate": type(args).learning_rate, "max_steps": -1}
    for name, value in scaled.items():
        if before[name] not in (defaults[name], value):
            raise ValueError(
                f"--{name} {before[name]:g} contradicts --scale_with_batch_size, which makes it {value:g} for a "
                f"batch of {batch}. Leave one of them out."
            )
    args.learning_rate, args.max_steps = scaled["learning_rate"], int(scaled["max_steps"])
    args.most_batches = args.max_steps


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
