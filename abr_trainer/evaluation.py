"""Token-exact perplexity in every evaluation of a Trainer."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from .perplexity import TokenPerplexity, causal_nll

logger = logging.get_logger(__name__)

_AnyTrainer: Any = object  # what a type checker sees: a mixin calls the Trainer that it is mixed into


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Restore the states of all random number generators at the end: a loader draws from them, and so does dropout."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


class PerplexityMixin(_AnyTrainer):
    """Add `*_perplexity` and `*_target_tokens` to what a Trainer of causal language models evaluates.

    Attributes:
        eval_measurement: What else is measured of the model at each evaluation, on all ranks; its numbers join the
            metrics as `eval_*`.
    """

    eval_measurement: Callable[[nn.Module], Mapping[str, float]] | None = None
    _token_perplexity: TokenPerplexity | None = None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `Trainer` does, and leave the random numbers of the training that goes on as they were."""
        with same_random_numbers() if self._is_active else contextlib.nullcontext():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as `Trainer` does; for a causal language model, add its token-exact perplexity to the metrics."""
        self._token_perplexity = TokenPerplexity() if self._is_active and self._loss_shifts_labels else None
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        found, self._token_perplexity = self._token_perplexity, None
        if found is not None and found.tokens:
            output.metrics[f"{metric_key_prefix}_perplexity"] = found.perplexity
            output.metrics[f"{metric_key_prefix}_target_tokens"] = found.tokens
            if found.non_finite:  # `eval_loss` may leave them out and look well
                output.metrics[f"{metric_key_prefix}_non_finite_rows"] = found.non_finite
            if found.non_finite and self.is_world_process_zero():
                logger.warning(
                    f"{found.non_finite} of {found.rows} rows of the {metric_key_prefix} set have a likelihood that "
                    "is not finite: so the perplexity is not a number."
                )
        if self.eval_measurement is not None and metric_key_prefix == "eval":
            measured = self.eval_measurement(self._wrap_model(self.model, training=False))
            output.metrics.update({f"eval_{name}": value for name, value in measured.items()})
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        has_labels = isinstance(inputs, Mapping) and isinstance(inputs.get("labels"), Tensor)
        if self._token_perplexity is None or not has_labels:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys=ignore_keys)
        token_logits = logits[0] if isinstance(logits, tuple) else logits
        if isinstance(labels, Tensor):
            self._token_perplexity.add(*self.accelerator.gather_for_metrics(causal_nll(token_logits, labels)))
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)
