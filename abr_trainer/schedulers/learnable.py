"""Learn online, with small networks, which number of updates lowers the losses of later batches most."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from .base import Observation, Outcome, RepeatScheduler, check_least, is_finite
from .remarks import forbidden, made, usual_updates
from .threshold import ThresholdScheduler

if TYPE_CHECKING:
    from torch import Tensor

MEMBERS = 5
"""Number of networks. Each learns from a different half of the blocks, so their disagreement shows uncertainty."""

ROUND = 8
"""Batches between two rounds of learning, and batches per block. Each network uses a block or ignores it."""

STEPS = 3
"""Optimizer steps per round."""

RADIUS = 16
"""Number of batches on either side of a batch for computing the level of the losses around it."""

MIN_MEMORY = 6 * RADIUS
"""Number of batches to remember before the first round."""

TREND = 4
"""Number of coefficients of the smooth curve (a cubic) that losses follow without any repeats."""

LIKENESS = 0.3
"""Width of the kernel that compares losses, as a share of the spread of all losses."""

SHRINKAGE = 0.01
"""Weight decay. It keeps predicted gains at zero unless the losses show otherwise."""

MAX_DEVIATION = 3.0
"""Features are clamped to this number of spreads from the level."""

MAX_LOSS = 1e3
"""Highest loss to remember, in nats; higher losses are clamped."""

TINY = 1e-6
"""Least spread and least level, in nats, because losses may all be equal, or zero."""


@dataclass
class LearnableScheduler(RepeatScheduler):
    """Learn which number of repeats lowers the losses of later batches most, and use it.

    The inputs of a two-layer network are the loss and the perplexity of the first pass, log-scaled and relative to the
    recent level. It predicts how much more 2, 3, ... `max_repeats` updates lower later losses than one update does.
    The rule chooses the number with the largest gain over using the extra passes for fresh batches, after it subtracts
    `caution` standard deviations of the predictions of five networks. If no number gains, it chooses 1.

    It learns online, with Adam, every 8 batches. The model of the remembered first-pass losses is a smooth curve minus
    the predicted gains of all earlier updates; the networks minimise its error. The effect of an update on the loss of
    its own batch does not count. Random repeats (`exploration`) separate gains from the rule's own choices. During the
    first `warmup` batches the rule is `abr`, except for exploration.

    Costs its extra passes, and about 2 ms of one CPU core per batch, spent on every eighth; imports torch when it
    first learns. An update lowers the losses far less than they differ between batches, so learning takes several
    hundred batches. If the effect is a hundredth of that difference, the rule ends at 1, apart from noise. At equal
    passes (measured, see docs/measure/effectiveness.md), perplexity is 17 % higher than the baseline's on fresh data
    after 160 passes, which all belong to the warm-up, and 9.7 % after 500. There the mean falls from 3.0 repeats in
    the first third to 1.3 in the last.

    Attributes:
        loss_threshold: Threshold of `abr` during the warm-up.
        max_repeats: Most updates on a batch.
        warmup: Number of batches before it uses what it has learned.
        exploration: Share of batches with random repeats from 1 to `max_repeats` during the warm-up, in [0, 1].
            Afterwards the share falls with the square root of the number of batches.
        memory: Number of latest batches to learn from.
        caution: Number of standard deviations between the networks' predictions that a gain must exceed.
        hidden: Units in the hidden layer of each network.
        learning_rate: Learning rate of Adam.
        seed: Seed of the initial weights, the exploration, and the blocks that each network uses.
    """

    reason: ClassVar[str] = "learned"

    loss_threshold: float | str = 1.0
    max_repeats: int = 5
    warmup: int = 100
    exploration: float = 0.25
    memory: int = 1024
    caution: float = 2.0
    hidden: int = 8
    learning_rate: float = 0.02
    seed: int = 0
    first_rule: ThresholdScheduler = field(init=False, repr=False, compare=False)
    history: deque[tuple[float, int]] = field(init=False, repr=False, compare=False)
    observed: int = field(init=False, repr=False, compare=False, default=0)
    learner: _Learner | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        self.first_rule = ThresholdScheduler(self.loss_threshold, self.max_repeats)
        self.loss_threshold = self.first_rule.loss_threshold
        check_least(self, warmup=0, memory=MIN_MEMORY, hidden=1)
        if not 0 <= self.exploration <= 1:
            raise ValueError(f"`exploration` must be between 0 and 1, got {self.exploration}.")
        if not 0 <= self.caution < math.inf:
            raise ValueError(f"`caution` must be 0 or more, got {self.caution}.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}.")
        self.history = deque(maxlen=self.memory)

    def exploration_rate(self, batch: int) -> float:
        """Return the probability of random repeats for this batch."""
        return self.exploration * math.sqrt(max(self.warmup, 1) / max(self.warmup, batch, 1))

    def drawn(self, batch: int) -> int | None:
        """Return the random repeats of this batch, or None if it is not used for exploration."""
        coin = random.Random(f"{self.seed}-{batch}")
        return coin.randint(1, self.max_repeats) if coin.random() < self.exploration_rate(batch) else None

    def ready(self, batch: int) -> _Learner | None:
        """Return the networks after the warm-up, or None during it."""
        return self.learner if batch >= self.warmup else None

    def decide(self, observation: Observation) -> int:
        drawn = self.drawn(observation.batch)
        if drawn is not None:
            return drawn
        learner = self.ready(observation.batch)
        if learner is None:
            return self.first_rule.decide(observation)
        gains = learner.gains(observation.loss, self.observed)
        worst = [
            mean - self.caution * deviation - passes * learner.fresh
            for passes, (mean, deviation) in enumerate(gains, start=1)
        ]
        return 1 + max(range(len(gains) + 1), key=[0.0, *worst].__getitem__)  # the first of equals, so ties give 1

    def explain(self, observation: Observation) -> str:
        if self.drawn(observation.batch) is not None:
            return "explored"
        return "warmup" if self.ready(observation.batch) is None else self.reason

    def evidence(self, observation: Observation) -> dict[str, float]:
        numbers: dict[str, float] = {"exploration rate": self.exploration_rate(observation.batch)}
        learner = self.ready(observation.batch)
        if learner is None:
            return numbers | self.first_rule.evidence(observation)
        numbers |= {"level of the losses": learner.level_at(self.observed), "value of a fresh pass": learner.fresh}
        for repeats, (mean, deviation) in enumerate(learner.gains(observation.loss, self.observed), start=2):
            numbers |= {f"gain of {repeats} over 1": mean, f"doubt about {repeats}": deviation}
        return numbers

    def remark(self, outcomes: Sequence[Outcome]) -> str | None:
        if said := forbidden("learnable", self.max_repeats):
            return said
        learned = [outcome for outcome in outcomes if outcome.reason == self.reason]
        if not learned:
            needs = max(self.warmup, MIN_MEMORY)
            return (
                f"learnable decided nothing by what it has learned: its warm-up takes {needs} batches, and the run "
                f"had {len(outcomes):,}. Until then it is abr, with some repeats drawn at random. Train on more "
                "batches, or choose abr."
            )
        usual = usual_updates(learned)
        if usual is None:
            return None
        if usual[0] == 1:
            why = "it has found no number of updates that gains more than a fresh batch does. baseline costs less."
        else:
            why = "that is what gained most, whatever the loss. fixed does it without learning."
        return f"After its warm-up, {made('learnable', *usual, len(learned))}: {why}"

    def observe(self, outcome: Outcome) -> None:
        if outcome.skipped or not is_finite(outcome):
            return
        self.first_rule.observe(outcome)
        self.history.append((self._clamped(outcome.observation.loss), outcome.repeats))
        self.observed += 1
        if self.observed % ROUND == 0 and len(self.history) >= MIN_MEMORY:
            self.learner = self.learner or self._new_learner()
            self.learner.learn(self.history, self.observed)

    def _clamped(self, loss: float) -> float:
        """Clamp the loss around the level, so that one broken batch does not change the level."""
        if self.learner is None:
            return max(-MAX_LOSS, min(loss, MAX_LOSS))
        level, reach = self.learner.level_at(self.observed), 2 * MAX_DEVIATION * self.learner.spread
        return max(level - reach, min(loss, level + reach))

    def _new_learner(self) -> _Learner:
        return _Learner(self.max_repeats, self.hidden, self.learning_rate, self.seed)

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [list(record) for record in self.history],
            "observed": self.observed,
            "first_rule": self.first_rule.state_dict(),
            "learner": None if self.learner is None else self.learner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = deque(((loss, repeats) for loss, repeats in state["history"]), maxlen=self.memory)
        self.observed = state["observed"]
        self.first_rule.load_state_dict(state["first_rule"])
        self.learner = None
        if state["learner"] is not None:
            self.learner = self._new_learner()
            self.learner.load_state_dict(state["learner"])


class _Learner:
    """The networks, their optimizer, and the latest statistics of the losses.

    Shapes: M networks, N remembered batches, 2 features, H hidden units, 3 outputs. The outputs are the gain of one
    update, and the slope and the curvature of the gain of further ones, all in units of the noise.
    """

    def __init__(self, max_repeats: int, hidden: int, learning_rate: float, seed: int) -> None:
        import torch

        self.max_repeats, self.seed = max_repeats, seed
        drawn = torch.Generator(device="cpu").manual_seed(seed)
        options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        self.parameters = [
            torch.randn(MEMBERS, 2, hidden, generator=drawn, **options),
            torch.randn(MEMBERS, 1, hidden, generator=drawn, **options),
            torch.zeros(MEMBERS, hidden, 3, **options),  # predict no gain before learning
            torch.zeros(MEMBERS, 1, 3, **options),
        ]
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate)
        self.level = self.slope = self.fresh = 0.0
        self.spread = self.noise = 1.0
        self.learned_at = 0

    def level_at(self, observed: int) -> float:
        """Return the level of the losses, in nats, extrapolated to the batch after `observed` others."""
        return self.level + self.slope * (observed - self.learned_at)

    def gains(self, loss: float, observed: int) -> list[tuple[float, float]]:
        """Return mean and standard deviation of the gain of 2, 3, ... repeats over 1, in nats."""
        import torch

        with torch.no_grad():
            losses, levels = torch.tensor([[loss], [self.level_at(observed)]], dtype=torch.float64, device="cpu")
            outputs = self._predict(_features(losses, levels, self.spread))
            gains = self.noise * self._extras(outputs)[:, 0]  # (M, repeats)
        means, deviations = gains.mean(0).tolist(), gains.std(0).tolist()
        return list(zip(means, deviations, strict=True))[1:]

    def learn(self, history: deque[tuple[float, int]], observed: int) -> None:
        """Make a few optimizer steps on the remembered first-pass losses; the last is that of batch `observed`."""
        import torch

        losses, repeats = torch.tensor(list(history), dtype=torch.float64, device="cpu").T
        shape, trend = self._shape(repeats), _trend(len(losses))
        features, residual, fall = self._look(losses, shape, trend, observed)
        weights = self._shares(observed - len(losses), observed)
        for _ in range(STEPS):
            with torch.enable_grad():
                path = _path((self._predict(features) * shape).sum(-1))
                misfit = residual + path - (path @ trend) @ trend.T
                size = self.parameters[2].square().sum() + 0.1 * self.parameters[0].square().sum()
                objective = MEMBERS * (weights * misfit.square()).mean() + SHRINKAGE * size
            self.optimizer.zero_grad()
            torch.autograd.backward(objective)
            self.optimizer.step()
        with torch.no_grad():
            made = repeats.long().clamp(1, self.max_repeats) - 1
            extras = self._extras(self._predict(features)).mean(0)  # (N, repeats)
            gained = self.noise * float(extras.gather(1, made[:, None]).mean())
        # Gain of one pass over a fresh batch: the fall of the losses that repeats do not explain.
        self.fresh = max(0.0, fall - gained)

    def _look(self, losses: Tensor, shape: Tensor, trend: Tensor, observed: int) -> tuple[Tensor, Tensor, float]:
        """Return the features of every batch, its loss without the trend, and the fall of the trend per batch.

        The predicted gains of repeats are removed first, so that batches are compared as if none had been repeated.
        Features of past batches use the batches on both sides; those for a decision can only use earlier ones.
        """
        import torch

        with torch.no_grad():
            deviations = losses - _level(losses)
            spread = float(deviations.std().clamp(min=TINY))
            if self.learned_at == 0:
                path = torch.zeros_like(losses)
            else:
                rough = _features(losses, _level(losses), spread)
                path = self.noise * _path((self._predict(rough) * shape).sum(-1)).mean(0)
                path = path - path @ trend[:, :2] @ trend[:, :2].T
            undone = losses + path
            cleaned, noise = _cleaned(undone)
            levels = _level(cleaned) - path
            self.spread = float((losses - levels).std().clamp(min=TINY))
            self.noise = noise
            cleaned = cleaned - path
            fitted = trend @ (cleaned @ trend)
            tail = cleaned[-2 * RADIUS :]
            steps = torch.arange(len(tail), dtype=torch.float64, device="cpu") - (len(tail) - 1) / 2
            self.slope = float(tail @ steps / (steps @ steps))
            self.level = float(tail.mean()) + self.slope * (len(tail) + 1) / 2
            self.learned_at = observed
            fall = float(fitted[0] - fitted[-1]) / (len(losses) - 1)
        return _features(losses, levels, self.spread), (cleaned - fitted) / self.noise, fall

    def _predict(self, features: Tensor) -> Tensor:
        """Return the outputs (M, N, 3) for features (N, 2)."""
        first, first_bias, second, second_bias = self.parameters
        return (features @ first + first_bias).tanh() @ second + second_bias

    def _shape(self, repeats: Tensor) -> Tensor:
        """Return the weights of the three outputs for these repeats: (N,) -> (N, 3)."""
        import torch

        share = (repeats - 1) / max(self.max_repeats - 1, 1)
        return torch.stack([torch.ones_like(share), 2 * share, 0.8 * share * (1 - share)], dim=-1)

    def _extras(self, outputs: Tensor) -> Tensor:
        """Return the gain of 1, 2, ... repeats over 1: (M, N, 3) -> (M, N, repeats)."""
        import torch

        counts = torch.arange(1, self.max_repeats + 1, dtype=torch.float64, device="cpu")
        shape = self._shape(counts)
        return outputs @ (shape - shape[0]).T

    def _shares(self, begin: int, end: int) -> Tensor:
        """Return the weight of every batch for every network, (M, N): 2 or 0, equal within a block."""
        import torch

        def weights() -> Iterator[list[float]]:
            for block in range(begin // ROUND, (end - 1) // ROUND + 1):
                coin = random.Random(f"{self.seed}-block-{block}")
                yield [2.0 * (coin.random() < 0.5) for _ in range(MEMBERS)]

        blocks = torch.tensor(list(weights()), dtype=torch.float64, device="cpu").T
        skipped = begin % ROUND
        return blocks.repeat_interleave(ROUND, dim=1)[:, skipped : skipped + end - begin]

    def state_dict(self) -> dict[str, Any]:
        moments = self.optimizer.state_dict()["state"]
        return {
            "parameters": [parameter.tolist() for parameter in self.parameters],
            "moments": [
                [float(moments[i]["step"]), moments[i]["exp_avg"].tolist(), moments[i]["exp_avg_sq"].tolist()]
                for i in sorted(moments)
            ],
            "numbers": [self.level, self.slope, self.fresh, self.spread, self.noise],
            "learned_at": self.learned_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        import torch

        def tensor(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device="cpu")

        with torch.no_grad():
            for parameter, values in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(tensor(values))
        for parameter, (step, mean, square) in zip(self.parameters, state["moments"], strict=True):
            self.optimizer.state[parameter] = {
                "step": torch.tensor(step),
                "exp_avg": tensor(mean),
                "exp_avg_sq": tensor(square),
            }
        self.level, self.slope, self.fresh, self.spread, self.noise = state["numbers"]
        self.learned_at = state["learned_at"]


def _features(losses: Tensor, levels: Tensor, spread: float) -> Tensor:
    """Return the networks' inputs, (N, 2): log perplexity and log loss relative to the level, in spreads."""
    import torch

    heights = losses - levels  # the logarithm of a perplexity is its loss
    ratios = losses.clamp(min=TINY).log() - levels.clamp(min=TINY).log()
    both = torch.stack([heights, ratios * levels.clamp(min=TINY)], dim=-1) / spread
    return both.clamp(-MAX_DEVIATION, MAX_DEVIATION)


def _path(values: Tensor) -> Tensor:
    """Return the fall of the level at every batch by all updates before it: (M, N) -> (M, N).

    Half of the gain of a batch's own updates is counted. So a loss that is high by chance is no evidence for or
    against these updates.
    """
    return values.cumsum(-1) - values / 2


def _trend(count: int) -> Tensor:
    """Return an orthonormal basis of smooth curves, (count, TREND): polynomials of increasing degree."""
    import torch

    place = torch.linspace(-1.0, 1.0, count, dtype=torch.float64, device="cpu")
    basis: Tensor = torch.linalg.qr(torch.stack([place**degree for degree in range(TREND)], dim=1))[0]
    return basis


def _level(losses: Tensor) -> Tensor:
    """Return the moving mean of the losses, extrapolated linearly at both ends."""
    import torch

    width = 2 * RADIUS + 1
    inner = losses.unfold(0, width, 1).mean(-1)
    outside = torch.arange(1, RADIUS + 1, dtype=torch.float64, device="cpu")
    before = inner[0] - outside.flip(0) * (inner[RADIUS] - inner[0]) / RADIUS
    after = inner[-1] + outside * (inner[-1] - inner[-1 - RADIUS]) / RADIUS
    return torch.cat([before, inner, after])


def _cleaned(losses: Tensor) -> tuple[Tensor, float]:
    """Compare every loss with similar ones. Return the level that each loss implies, and their deviation, in nats.

    Easy and hard batches differ more than an update changes either. So the level is estimated from the distance of a
    loss to losses of about the same height, not to all: the efficient score for a shift of their density. If all
    losses are of one kind, they do not change.
    """
    import torch

    level = _level(losses)
    deviations = losses - level
    likes = deviations.sort().values[:: max(1, len(losses) // 64)]
    width = LIKENESS * deviations.std().clamp(min=TINY)
    weights = torch.softmax(-0.5 * ((deviations[:, None] - likes) / width) ** 2, dim=1)
    centre = weights @ likes
    kept = 1 - (weights @ likes**2 - centre**2) / width**2  # share of a shift that the distance to `likes` shows
    distance = (deviations - centre) / kept.mean().clamp(min=0.1)
    return level + distance, float(distance.std().clamp(min=TINY))
