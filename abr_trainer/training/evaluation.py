"""Token-exact perplexity in every evaluation of a Trainer."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..perplexity.windows import TokenPerplexity, causal_nll
from .config import setting
from .empty_rows import find_rows_without_targets
from .targets import base_model, first_target, is_causal_model, shifts_labels

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


class NoSuchMetric(RuntimeError):
    """An evaluation has not measured what the best model is chosen by."""


def refuse_missing_perplexity(trainer: Any) -> None:
    """Refuse to choose the best model by a perplexity that no evaluation will have.

    Raises:
        ValueError: The model predicts no next token, or the evaluation set has no target.
    """
    metric = trainer.args.metric_for_best_model
    if metric not in ("perplexity", "eval_perplexity") or trainer.compute_metrics is not None:
        return
    if not shifts_labels(trainer):
        raise ValueError(
            f"--metric_for_best_model {metric}: {no_perplexity(trainer)} Use --metric_for_best_model eval_loss."
        )
    found = find_rows_without_targets(trainer.eval_dataset, trainer.data_collator, first_target(trainer))
    if found is not None and found.is_all and len(found.indices) == found.looked_at:
        raise ValueError(f"--metric_for_best_model {metric}: {no_targets('eval')} Evaluate on other data.")


def no_perplexity(trainer: Any) -> str:
    return (
        f"no perplexity is measured, because the loss of {type(base_model(trainer)).__name__} does not compare the "
        "output at a token with the next token."
    )


def no_targets(prefix: str) -> str:
    return f"no row of the {prefix} set has a target (a label other than -100), so there is no perplexity."


def capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


class PerplexityMixin(_AnyTrainer):
    """Add `*_perplexity` and `*_target_tokens` to what a Trainer of causal language models evaluates.

    Attributes:
        eval_measurement: What else is measured of the model at each evaluation, on all ranks; its numbers join the
            metrics as `eval_*`.
        test_measurement: The same where metrics are called `test_*`.
    """

    eval_measurement: Callable[[nn.Module], Mapping[str, float]] | None = None
    test_measurement: Callable[[nn.Module], Mapping[str, float]] | None = None
    _token_perplexity: TokenPerplexity | None = None
    _has_told_of_missing_perplexity = False

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `Trainer` does, and leave the random numbers of the training that goes on as they were."""
        with same_random_numbers() if self._is_active else contextlib.nullcontext():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        is_of_training = self.is_in_train and not args and kwargs.keys() <= {"ignore_keys"}
        if self._is_active and is_of_training:
            self._check_best_metric(metrics)
        return metrics

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        metrics = super()._evaluate(*args, **kwargs)
        if self._is_active:
            self.ledger.evaluation_seconds += time.perf_counter() - start
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
        self._token_perplexity = TokenPerplexity() if self._is_active and shifts_labels(self) else None
        self._warn_of_missing_perplexity()
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
        elif found is not None and found.rows and self.is_world_process_zero():
            logger.warning(capitalised(no_targets(metric_key_prefix)))
        measure = {"eval": self.eval_measurement, "test": self.test_measurement}.get(metric_key_prefix)
        if measure is not None:
            measured = measure(self._wrap_model(self.model, training=False))
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    def _warn_of_missing_perplexity(self) -> None:
        """Say why a causal language model has no perplexity, once."""
        if not self._is_active or self._token_perplexity is not None or self._has_told_of_missing_perplexity:
            return
        if is_causal_model(base_model(self)) and self.is_world_process_zero():
            logger.warning(capitalised(no_perplexity(self)))
        self._has_told_of_missing_perplexity = True

    def _check_best_metric(self, metrics: Mapping[str, float]) -> None:
        """Refuse to go on without the metric that the best model is chosen by.

        Raises:
            NoSuchMetric: It was not measured.
        """
        metric = self.args.metric_for_best_model
        is_needed = self.args.eval_strategy != "no" or setting(self.args, "eval_passes")
        if metric is None or not is_needed or f"eval_{metric.removeprefix('eval_')}" in metrics:
            return
        has_no_targets = metric.endswith("perplexity") and shifts_labels(self)
        why = f": {no_targets('eval')}" if has_no_targets else "."
        measured = ", ".join(name.removeprefix("eval_") for name in metrics)
        raise NoSuchMetric(
            f"--metric_for_best_model {metric} was not measured in the evaluation after {self.state.global_step} "
            f"batches{why} Measured: {measured}."
        )

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
