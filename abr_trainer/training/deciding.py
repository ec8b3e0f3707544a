"""What the rule of a run decides about a batch: by its first pass, and by its gradient if the rule wants that."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..schedulers import Observation
from ..schedulers.base import decided_by
from .config import setting
from .passes import Passes
from .signals import accuracy_of, gradient_norm

AGAIN = "again"
"""Why a first pass has no backward: some rows are broken, and it is made once more without them."""

NON_FINITE = "non-finite"

BUDGET = "budget"
"""Why a batch gets fewer repeats than the rule asked for."""

NO_ROOM = "no room"
"""Why a batch with broken rows is skipped: the budget has no room for the pass without them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What a rule saw, and what it decided; the learning rate is that of the first update."""

    observation: Observation
    repeats: int
    reason: str
    learning_rate: float


def decide(trainer: Any, loss: float, hits: list[float], reason: str | None = None) -> Decision:
    """Return a decision by the rule; or to skip the batch, for a reason that is no rule's."""
    observation = Observation(
        batch=trainer._run.ledger.batches,
        loss=loss,
        progress=trainer._run.budget.progress(trainer.state.global_step, trainer.state.max_steps),
        accuracy=accuracy_of(*hits) if hits else None,
        advantage=trainer._run.policy.advantage if trainer._run.policy else None,
        times=trainer._run.times if "times" in trainer.repeat_scheduler.wants else None,
    )
    repeats, reason = _choose(trainer, observation) if reason is None else (0, reason)
    return Decision(observation, repeats, reason, trainer._get_learning_rate())


def _choose(trainer: Any, observation: Observation) -> tuple[int, str]:
    """Return the repeats that the budget has room for, and the reason."""
    rule, most = trainer.repeat_scheduler, trainer._run.budget.most_repeats
    if not math.isfinite(observation.loss):
        repeats, reason = 0, NON_FINITE
    elif observation.batch < setting(trainer.args, "primer_batches"):
        repeats, reason = 1, "primer"
    else:
        repeats = decided_by(rule, observation)
        reason = rule.explain(observation)
    return (int(most), BUDGET) if repeats > most else (repeats, reason)


def look_at_gradient(passes: Passes, decision: Decision) -> Decision:
    """Decide again after the backward, if the rule wants the gradient norm and has not skipped the batch."""
    trainer = passes.trainer
    is_open = decision.repeats > 0 and decision.reason != "primer"
    if not is_open or "grad_norm" not in trainer.repeat_scheduler.wants:
        return decision
    scaler = trainer.accelerator.scaler
    norm = gradient_norm(passes.model) / (1.0 if scaler is None else scaler.get_scale())
    (total,) = trainer._run.consensus.begin_sum(norm)()
    mean = total / trainer.args.world_size  # the same on all ranks, to the last bit
    observation = dataclasses.replace(decision.observation, grad_norm=mean)
    if math.isfinite(mean):
        repeats, reason = _choose(trainer, observation)
    elif scaler is None:
        repeats, reason = 0, NON_FINITE
    else:
        return decision  # the scaler withholds this update, and lowers its scale
    return dataclasses.replace(decision, observation=observation, repeats=repeats, reason=reason)
