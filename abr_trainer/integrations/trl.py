"""Adaptive batch repetition in TRL's supervised fine-tuning: `pip install "abr-trainer[trl]"`.

`ABRGRPOTrainer` and `ABRRLOOTrainer` make several updates on what they have generated. For other offline trainers of
TRL (DPO, KTO, reward) use the mixin: `class Mine(ABRMixin, trl.DPOTrainer)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..records.errors import MissingPackage

try:
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained
except ImportError as error:
    raise MissingPackage('This needs TRL: pip install "abr-trainer[trl]".') from error

from ..training.config import ABRConfig
from ..training.targets import count_targets, first_target
from ..training.trainer import ABRMixin


def marked_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the variant of a tokenizer's chat template that marks the assistant's tokens, if TRL has one."""
    try:
        found: str | None = get_training_chat_template(tokenizer)
    except ValueError:  # TRL has none for this template
        return None
    return found


def learns_to_stop(tokenizer: PreTrainedTokenizerBase, template: str | None) -> bool:
    """Tell whether a chat template marks the end of a turn as one of the assistant's tokens.

    Args:
        template: None for the tokenizer's own.
    """
    return bool(is_chat_template_stop_token_trained(tokenizer, chat_template=template))


@dataclass
class ABRSFTConfig(SFTConfig, ABRConfig):
    """`SFTConfig` with the fields of `ABRConfig`. If both have a field, the default of `SFTConfig` is used."""


class ABRSFTTrainer(ABRMixin, SFTTrainer):
    """`trl.SFTTrainer` with adaptive batch repetition, including packing, completion-only loss and PEFT.

    `num_tokens`, `entropy` and `mean_token_accuracy` count only first passes, not repeats.
    """

    args: SFTConfig

    @property
    def _loss_is_of_tokens(self) -> bool:
        return self.label_smoother is None and self.compute_loss_func is None and self.args.loss_type == "nll"

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        takes_loss = prediction_loss_only and self._loss_is_of_tokens and self.args.world_size == 1
        if self._token_perplexity is None or not takes_loss:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # The loss is enough. SFTTrainer does not keep the logits, so they would cost another forward pass.
        loss, logits, labels = SFTTrainer.prediction_step(self, model, inputs, True, ignore_keys)
        tokens = count_targets(inputs, first_target(self))
        self._token_perplexity.add(loss.double()[None] * tokens, torch.as_tensor(tokens)[None])
        return loss, logits, labels


@dataclass
class _OfGenerated(ABRConfig):
    """`ABRConfig` for batches that are generated: the rule is "kl", and no batch is skipped for its loss."""

    repeat_scheduler: str = field(
        default="kl", metadata=dict(ABRConfig.__dataclass_fields__["repeat_scheduler"].metadata)
    )
    skip_outliers: str = field(default="none", metadata=dict(ABRConfig.__dataclass_fields__["skip_outliers"].metadata))


@dataclass
class ABRGRPOConfig(GRPOConfig, _OfGenerated):
    """`GRPOConfig` with the fields of `ABRConfig`; the rule is "kl", and no batch is skipped for its loss."""


@dataclass
class ABRRLOOConfig(RLOOConfig, _OfGenerated):
    """`RLOOConfig` with the fields of `ABRConfig`; the rule is "kl", and no batch is skipped for its loss."""


class ABRGRPOTrainer(ABRMixin, GRPOTrainer):
    """`trl.GRPOTrainer` that makes several updates on a generated batch, while the policy stays close enough.

    A repeat is one more pass over the same rows, with the ratio to the probabilities of the first pass. Metrics count
    first passes. One repeat is `GRPOTrainer`, to the last bit.
    """


class ABRRLOOTrainer(ABRMixin, RLOOTrainer):
    """`trl.RLOOTrainer` that makes several updates on a generated batch, as `ABRGRPOTrainer` does."""
