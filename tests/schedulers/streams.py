"""Streams of losses, fed to a rule as the trainer would."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from abr_trainer.schedulers import Observation, Outcome, RepeatScheduler, get_repeat_scheduler


def seen(loss: float, batch: int = 0, progress: float = 0.0, **others: float) -> Observation:
    return Observation(batch=batch, loss=loss, progress=progress, **others)


def batch_of_trace(step: int, repeats: int = 1, **others: Any) -> dict[str, Any]:
    """A line of a trace, as far as a rule that follows it reads it."""
    losses = [3.0] * max(1, repeats)
    return {"step": step, "loss": losses[0], "losses": losses, "repeats": repeats, "reason": "random"} | others


def trace_in(directory: Path, batches: Iterable[dict[str, Any]]) -> str:
    """Write a trace into a directory, and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "abr_trace.jsonl"
    path.write_text("".join(json.dumps(batch) + "\n" for batch in batches))
    return str(path)


def rule_named(name: str, directory: Path, **parameters: Any) -> RepeatScheduler:
    """A registered rule with its defaults; `follow` follows a trace of 200 batches in that directory."""
    if name == "follow":
        batches = (batch_of_trace(step, repeats=step % 4) for step in range(1, 201))
        parameters["trace"] = trace_in(directory / "followed", batches)
    return get_repeat_scheduler(name, **parameters)


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
