"""Adaptive batch repetition in axolotl, with two lines of YAML.

    plugins: [abr_trainer.integrations.axolotl.ABRPlugin]
    repeat_scheduler: abr

If a plugin cannot be imported, axolotl prints an error and trains without it. So this module imports no package that
may be missing; its methods import what they need, and an error there ends the run. A run with the plugin prints a line
that begins with "ABR Trainer:".
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

try:
    from axolotl.integrations.base import BasePlugin
except ImportError:  # so that the module can be imported without axolotl
    BasePlugin = object

CONFIG = "abr_trainer.training.config.ABRConfig"
INPUT_ARGS = f"{__name__}.ABRInputArgs"

OF_AXOLOTL = frozenset(
    {
        "early_stopping_patience",
        "early_stopping_threshold",
        "hub_base_model",
        "overwrite_output_dir",
        "scale_with_batch_size",
        "base_learning_rate",
        "base_samples",
    }
)
"""Fields of `ABRConfig` that are not keys of the YAML file: axolotl has its own, or does not use them."""


class ABRPlugin(BasePlugin):
    """Combine axolotl's trainer with `ABRMixin`, and its training arguments with `ABRConfig`.

    The trainer is that of another plugin, that of `trainer_cls`, or axolotl's own. The keys of the YAML file are the
    fields of `ABRConfig`: `repeat_scheduler`, `loss_threshold`, `max_passes` and so on.
    """

    _asks_axolotl = False

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Check the keys before the model is loaded.

        Raises:
            ValueError: One of our keys has an invalid value, or axolotl would give our trainer no model.
        """
        from ..schedulers.registry import build_row_rule, build_rule, refuse_unread

        if cfg.get("rl"):
            raise ValueError(
                f"rl: {cfg['rl']} cannot be used with {type(self).__name__}, because axolotl then gives a plugin's "
                "trainer no model. Remove the plugin, or train with ABRMixin and TRL's own trainer in Python."
            )
        for check in (build_rule, build_row_rule, refuse_unread):
            check(self.get_training_args(cfg))

    def get_input_args(self) -> str:
        return INPUT_ARGS

    def get_training_args_mixin(self) -> str:
        return CONFIG

    def get_training_args(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        return {name: cfg[name] for name in keys() if cfg.get(name) is not None}

    def get_trainer_cls(self, cfg: Any) -> type | None:
        if self._asks_axolotl:
            return None
        from axolotl.core.builders.causal import HFCausalTrainerBuilder

        self._asks_axolotl = True
        try:
            theirs = HFCausalTrainerBuilder._get_trainer_cls(SimpleNamespace(cfg=cfg))
        finally:
            self._asks_axolotl = False
        return combined(theirs)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Print that the plugin is active.

        Raises:
            ValueError: It is not active, because another plugin has set the trainer.
        """
        from ..training.trainer import ABRMixin

        if not isinstance(trainer, ABRMixin):
            raise ValueError(
                f"plugins: {type(self).__module__}.{type(self).__name__} must be the first in the list. Another "
                f"plugin has set the trainer to {type(trainer).__name__}, so no batch would be repeated or skipped."
            )
        if trainer.is_world_process_zero():
            rules = ", ".join(
                f"{name} {getattr(trainer.args, name)}" for name in ("repeat_scheduler", "skip_outliers", "skip_rows")
            )
            print(f"ABR Trainer: active in {type(trainer).__name__} with {rules}.", flush=True)


def keys() -> dict[str, Any]:
    """Return our keys of the YAML file, with their help."""
    from transformers import TrainingArguments

    from ..training.config import ABRConfig

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)} | OF_AXOLOTL
    return {field.name: field for field in dataclasses.fields(ABRConfig) if field.name not in theirs}


@functools.cache
def combined(theirs: type) -> type:
    """Return a trainer class of axolotl with repeats and skips."""
    from ..training.loss_scale import has_own_loss
    from ..training.targets import shifts_labels
    from ..training.trainer import ABRMixin

    takes_tags = _takes_dataset_tags(theirs)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if not takes_tags:  # axolotl leaves them out for its own reward trainers only
            kwargs.pop("dataset_tags", None)
        super(trainer_cls, self).__init__(*args, **kwargs)

    def loss_is_of_tokens(self: Any) -> bool:
        """Its `compute_loss` counts tokens and calls Trainer's, except for ORPO."""
        if not hasattr(self.args, "orpo_alpha") or not hasattr(theirs, "orpo_compute_loss"):
            return not has_own_loss(self) and shifts_labels(self) and self.label_smoother is None
        is_plain = self.label_smoother is None and self.compute_loss_func is None and not self.args.orpo_alpha
        return is_plain and shifts_labels(self)

    body = {"__init__": init, "_loss_is_of_tokens": property(loss_is_of_tokens)}
    trainer_cls: Any = type(f"ABR{theirs.__name__}", (ABRMixin, theirs), body)
    return trainer_cls


def _takes_dataset_tags(trainer_cls: type) -> bool:
    return any(
        "dataset_tags" in inspect.signature(vars(base)["__init__"]).parameters
        for base in trainer_cls.__mro__
        if "__init__" in vars(base) and base is not object
    )


def __getattr__(name: str) -> Any:
    """Create `ABRInputArgs` on first use: the pydantic model of our keys, all of them optional."""
    if name != "ABRInputArgs":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pydantic import Field, create_model

    fields: dict[str, Any] = {
        key: (Any, Field(default=None, description=field.metadata.get("help"))) for key, field in keys().items()
    }
    globals()[name] = model = create_model(name, __module__=__name__, **fields)
    return model
