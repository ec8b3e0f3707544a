"""Streams of losses, fed to a rule as the trainer would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from abr_trainer.schedulers import Observation, Outcome, RepeatScheduler


def seen(loss: float, batch: int = 0, progress: float = 0.0, **others: float) -> Observation:
    return Observation(batch=batch, loss=loss, progress=progress, **others)


def feed(rule: RepeatScheduler, losses: Iterable[float | Sequence[float]], first_batch: int = 0) -> list[int]:
    """Return the decision on each batch: a first-pass loss, or the losses of all passes that may be made."""
    return [outcome.repeats for outcome in played(rule, losses, first_batch)]


def played(
    rule: RepeatScheduler, losses: Iterable[float | Sequence[float]], first_batch: int = 0, **seen_too: float
) -> list[Outcome]:
    """Return what became of each batch."""
    outcomes = []
    for batch, passes in enumerate(losses, start=first_batch):
        passes = [passes] if isinstance(passes, float) else list(passes)
        observation = seen(passes[0], batch, **seen_too)
        decided = rule.decide(observation)
        made = [passes[0]]
        while len(made) < decided:
            if len(made) > 1 and not rule.goes_on(observation, made, None):
                break
            made.append(passes[min(len(made), len(passes) - 1)])
        repeats = min(decided, len(made))
        replayed = tuple((index, 1.0) for index in rule.replay(observation)) if repeats else ()
        outcomes.append(Outcome(observation, repeats, tuple(made), rule.explain(observation), replayed))
        rule.observe(outcomes[-1])
    return outcomes
