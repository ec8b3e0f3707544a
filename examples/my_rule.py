"""A rule of your own: train twice on batches that stand out, in the first half of a run.

    abr train --dataset_name demo --do_train --do_eval --learning_rate 2e-3 --use_cpu --output_dir runs/mine \
        --repeat_scheduler examples.my_rule:TwiceWhileEarly --repeat_scheduler_kwargs '{"factor": 1.1}'
    abr why runs/mine 12    # what the rule saw at batch 12

The module is found in the directory where you start `abr`, or among installed packages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from abr_trainer import Observation, Outcome, RepeatScheduler


@dataclass
class TwiceWhileEarly(RepeatScheduler):
    """Train twice on a batch whose loss is `factor` times the recent mean, until half of the run is spent.

    The public fields are the parameters. What the rule remembers is no parameter, hence `init=False, repr=False`.
    """

    factor: float = 1.1
    mean: float | None = field(default=None, init=False, repr=False)

    def decide(self, observation: Observation) -> int:
        """Return how many updates to make on this batch. This only reads, as it may be asked twice."""
        if self.mean is None or observation.progress >= 0.5:
            return 1
        return 2 if observation.loss > self.factor * self.mean else 1

    def evidence(self, observation: Observation) -> dict[str, float]:
        """Return the numbers that `decide` weighs, for `abr why`."""
        return {} if self.mean is None else {"mean": self.mean, "limit": self.factor * self.mean}

    def observe(self, outcome: Outcome) -> None:
        """Look at a batch after it is finished: only this writes. A skipped batch teaches nothing."""
        if not outcome.skipped:
            loss = outcome.losses[0]  # of the first pass
            self.mean = loss if self.mean is None else 0.9 * self.mean + 0.1 * loss

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule remembers, as JSON: it goes into each checkpoint."""
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]
