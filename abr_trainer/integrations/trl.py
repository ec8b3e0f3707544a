"""Adaptive batch repetition in TRL's supervised fine-tuning: `pip install "abr-trainer[trl]"`.

Other offline trainers of TRL (DPO, KTO, reward) take the mixin as it is: `class Mine(ABRMixin, trl.DPOTrainer)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError('abr_trainer.trl needs TRL: pip install "abr-trainer[trl]".') from error

from ..training.config import ABRConfig
from ..training.targets import count_targets, first_target
from ..training.trainer import ABRMixin


@dataclass
class ABRSFTConfig(SFTConfig, ABRConfig):
    """`SFTConfig` with the fields of `ABRConfig`. Where both have a default, that of `SFTConfig` holds."""


class ABRSFTTrainer(ABRMixin, SFTTrainer):
    """`trl.SFTTrainer` with adaptive batch repetition: packing, completion-only loss and PEFT as there.

    `num_tokens`, `entropy` and `mean_token_accuracy` are those of first passes: repeats do not inflate them.
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
        # The loss says it all. The logits, which SFTTrainer does not keep, would cost another forward.
        loss, logits, labels = SFTTrainer.prediction_step(self, model, inputs, True, ignore_keys)
        tokens = count_targets(inputs, first_target(self))
        self._token_perplexity.add(loss.double()[None] * tokens, torch.as_tensor(tokens)[None])
        return loss, logits, labels
