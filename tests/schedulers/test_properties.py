"""Any stream of batches and rows: rules raise nothing, keep their promises, and survive a checkpoint at any point."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from abr_trainer.schedulers import (
    OUTLIER_RULES,
    ROW_RULES,
    SCHEDULERS,
    BatchTimes,
    GradNormSkip,
    Observation,
    Outcome,
    PolicyDrift,
    RepeatScheduler,
    RepeatUntil,
    Row,
    RowRule,
    get_outlier_rule,
)
from abr_trainer.schedulers.robust_rows import LEAST_ROWS, PATIENCE
from tests.properties import examples
from tests.schedulers.streams import rule_named

ORDINARY = st.floats(1.0, 6.0)
EXTREME = st.sampled_from([0.0, -0.0, 5e-324, 1e-30, 1e10, 3.4e38, 1.7e308, -1.0, -3.4e38, -1.7e308])
"""Finite losses of models in fp32 and fp64; those of reinforcement learning may be negative."""
FINITE = ORDINARY | ORDINARY | st.just(3.0) | EXTREME
LOSSES = FINITE | st.sampled_from([math.nan, math.inf, -math.inf])
SECONDS = st.floats(0.0, 100.0) | st.sampled_from([0.0, 1e9])

WRAPPERS: dict[str, Callable[[RepeatScheduler], RepeatScheduler]] = {
    "bare": lambda rule: rule,
    **{name: (lambda rule, name=name: get_outlier_rule(name, rule)) for name in OUTLIER_RULES},
    "low": lambda rule: get_outlier_rule("robust", rule, low=0.5),
    "gradient": lambda rule: GradNormSkip(rule, sigmas=4.0),
    "until": lambda rule: RepeatUntil(rule, until=0.5),
}


@st.composite
def batches(draw: Callable[[Any], Any]) -> dict[str, Any]:
    """What one batch may show to a rule, and how its passes go on."""
    return {
        "loss": draw(LOSSES),
        "accuracy": draw(st.none() | st.floats(0.0, 1.0)),
        "grad_norm": draw(st.floats(0.0, 10.0) | st.sampled_from([0.0, 1e38, math.nan])),
        "times": BatchTimes(draw(SECONDS), draw(SECONDS), draw(SECONDS), draw(st.none() | SECONDS)),
        "advantage": draw(st.none() | st.floats(0.0, 3.0)),
        "later": draw(st.lists(LOSSES, max_size=4)),
        "kl": draw(st.floats(0.0, 1.0) | st.sampled_from([0.0, 1e30, math.nan, math.inf])),
        "room": draw(st.sampled_from([100, 100, 0, 1])),
    }


STREAMS = st.lists(batches(), min_size=1, max_size=30) | st.integers(40, 200).flatmap(
    lambda count: st.lists(batches(), min_size=1, max_size=6).map(lambda few: (few * count)[:count])
)


def play(rule: RepeatScheduler, stream: Sequence[dict[str, Any]], first: int = 0, of: int = 300) -> list[Outcome]:
    """Show batches to a rule as the trainer does, and return what became of them."""
    outcomes = []
    for batch, given_ in enumerate(stream, start=first):
        seen = Observation(batch, given_["loss"], batch / of)
        if not math.isfinite(seen.loss):
            rule.observe(Outcome(seen, 0, (seen.loss,), "non-finite"))
            continue
        wanted = {name: given_[name] for name in ("accuracy", "times") if name in rule.wants}
        if "policy" in rule.wants:
            wanted["advantage"] = given_["advantage"]
        seen = Observation(batch, given_["loss"], batch / of, **wanted)
        repeats, reason = chosen(rule, seen)
        if repeats and "grad_norm" in rule.wants:
            norm = given_["grad_norm"]
            seen = Observation(batch, given_["loss"], batch / of, grad_norm=norm, **wanted)
            repeats, reason = chosen(rule, seen) if math.isfinite(norm) else (0, "non-finite")
        if repeats > given_["room"]:
            repeats, reason = given_["room"], "budget"
        outcomes.append(passed(rule, seen, repeats, reason, given_))
        rule.observe(outcomes[-1])
    return outcomes


def chosen(rule: RepeatScheduler, seen: Observation) -> tuple[int, str]:
    """Ask a rule twice, and return its decision and the reason for it."""
    repeats, reason = rule.decide(seen), rule.explain(seen)
    assert type(repeats) is int
    assert repeats >= 0
    assert (rule.decide(seen), rule.explain(seen)) == (repeats, reason)
    assert reason
    assert all(isinstance(value, int | float) for value in rule.evidence(seen).values())
    return repeats, reason


def passed(rule: RepeatScheduler, seen: Observation, repeats: int, reason: str, given_: dict[str, Any]) -> Outcome:
    """Make the passes over a batch."""
    losses = [seen.loss]
    drifts = [PolicyDrift(0.0, 0.0, 1.0)] if "policy" in rule.wants else []
    later = given_["later"] or [seen.loss]
    while len(losses) < repeats:
        goes_on = len(losses) == 1 or rule.goes_on(seen, losses, given_["accuracy"])
        if not goes_on or (drifts and not rule.may_repeat(seen, drifts)):
            repeats = len(losses)
            break
        losses.append(later[(len(losses) - 1) % len(later)])
        if drifts:
            drifts.append(PolicyDrift(given_["kl"], 0.5, 0.5))
        if not math.isfinite(losses[-1]) or (drifts and not rule.may_update(seen, drifts)):
            repeats, reason = len(losses) - 1, "non-finite"
    held = set(rule.held())
    again = tuple((index, later[0]) for index in rule.replay(seen)) if repeats == len(losses) else ()
    assert {index for index, _ in again} <= held, "it replays what it holds"
    return Outcome(seen, repeats, tuple(losses), reason, again, drifts=tuple(drifts))


def fresh(name: str, wrapper: str, directory: Path) -> RepeatScheduler:
    return WRAPPERS[wrapper](rule_named(name, directory))


def through_json(rule: Any, other: Any) -> Any:
    """Load the state of a rule into another one, as a checkpoint does."""
    state = rule.state_dict()
    other.load_state_dict(json.loads(json.dumps(state, allow_nan=False)))
    assert json.dumps(other.state_dict()) == json.dumps(state)
    return other


# ---- Rules for batches ----


@examples(60)
@given(st.sampled_from(sorted(SCHEDULERS)), st.sampled_from(sorted(WRAPPERS)), STREAMS, st.data())
def test_a_rule_restored_from_json_at_any_point_decides_the_same(name, wrapper, stream, data):
    point = data.draw(st.integers(0, len(stream)), label="checkpoint after")
    with tempfile.TemporaryDirectory() as directory:
        whole, first = (fresh(name, wrapper, Path(directory)) for _ in range(2))
        expected = play(whole, stream)
        begun = play(first, stream[:point])
        second = through_json(first, fresh(name, wrapper, Path(directory)))
        assert json.dumps(begun + play(second, stream[point:], first=point), default=repr) == json.dumps(
            expected, default=repr
        )
        assert json.dumps(second.state_dict()) == json.dumps(whole.state_dict())


@examples(30)
@given(st.sampled_from(sorted(OUTLIER_RULES)), STREAMS, st.floats(0.5, 6.0), st.integers(10, 60), st.integers(2, 12))
def test_an_outlier_rule_skips_no_more_than_it_promises(name, stream, sigmas, window, patience):
    rule = get_outlier_rule(name, rule_named("baseline", Path()), sigmas=sigmas, window=window, patience=patience)
    outcomes = play(rule, stream)
    skipped = [outcome.reason == "outlier" for outcome in outcomes]
    assert not any(skipped[: rule.min_history])
    assert all(sum(skipped[i : i + patience + 1]) <= patience for i in range(len(skipped)))
    if name == "robust":
        most = 3 * patience // 2 + 1  # more than half, and the history is forgotten
        assert all(sum(skipped[i : i + 3 * patience]) <= most + patience for i in range(len(skipped)))


@examples(60)
@given(st.sampled_from(sorted(OUTLIER_RULES)), FINITE, st.integers(1, 60))
def test_a_batch_like_all_others_is_no_outlier(name, loss, count):
    rule = get_outlier_rule(name, rule_named("baseline", Path()))
    stream = [{"loss": loss, "later": [], "room": 9, "accuracy": None}] * count
    assert all(outcome.repeats == 1 for outcome in play(rule, stream))


# ---- Rules for rows ----

TARGETS = st.sampled_from([1, 1, 2, 7, 31, 127, 127, 1023, 10**6])
ROWS = st.lists(st.tuples(FINITE, TARGETS), max_size=40)


@st.composite
def micro_batches(draw: Callable[[Any], Any]) -> list[list[tuple[float, int]]]:
    """Rows of a batch as loss and targets, by micro-batch: all alike, or some of them."""
    parts = draw(st.lists(ROWS, min_size=1, max_size=3))
    if draw(st.booleans()):
        loss = draw(ORDINARY)
        parts = [[(loss + (0.01 * i % 0.3), targets) for i, (_, targets) in enumerate(part)] for part in parts]
        odd = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 39), FINITE), max_size=4))
        for part, row, value in odd:
            if part < len(parts) and row < len(parts[part]):
                parts[part][row] = (value, parts[part][row][1])
    return parts


def show(rule: RowRule, stream: Sequence[list[list[tuple[float, int]]]], first: int = 0) -> list[list[bool]]:
    """Show batches to a rule as two ranks do, with the micro-batches dealt out to them, and return what was kept."""
    other = through_json(rule, copy.deepcopy(rule))
    kept = []
    for batch, parts in enumerate(stream, start=first):
        rows, keep = [], []
        for number, part in enumerate(parts):
            begin = len(rows)
            own = [Row(loss, targets, batch, begin + i, number) for i, (loss, targets) in enumerate(part)]
            rank = (rule, other)[number % 2]
            judge = rank.beside(own)
            keep += [checked(judge, row) for row in own]
            rows += own
        for rank in (rule, other):
            rank.observe(rows, keep)
        assert json.dumps(rule.state_dict()) == json.dumps(other.state_dict()), "ranks agree"
        kept.append(keep)
    return kept


def checked(judge: RowRule, row: Row) -> bool:
    keeps = judge.decide(row)
    evidence = judge.evidence(row)
    assert type(keeps) is bool
    assert keeps is judge.decide(row)
    if not keeps:
        beyond = (row.loss - evidence["level at this length"]) * row.targets
        assert row.loss > evidence["limit"]
        assert beyond >= evidence["row_sigmas"] ** 2 / 2 * (1 - 1e-9), "as unlikely as the rule promises"
    return keeps


@examples(30)
@given(st.sampled_from(sorted(ROW_RULES)), st.lists(micro_batches(), min_size=1, max_size=25), st.data())
def test_any_row_losses_keep_a_row_rule_within_its_promises(name, stream, data):
    point = data.draw(st.integers(0, len(stream)), label="checkpoint after")
    rule = ROW_RULES[name]()
    kept = show(rule, stream)
    known = 0
    for batch, parts in zip(kept, stream, strict=True):
        most = max(map(len, parts))
        assert all(batch) or known + most >= LEAST_ROWS
        known += len(batch)
    mostly = [2 * sum(batch) < len(batch) for batch in kept]
    assert all(sum(mostly[i : i + PATIENCE + 1]) <= PATIENCE for i in range(len(mostly)))
    first, second = ROW_RULES[name](), ROW_RULES[name]()
    begun = show(first, stream[:point])
    assert begun + show(through_json(first, second), stream[point:], first=point) == kept


@examples(60)
@given(st.sampled_from(sorted(ROW_RULES)), FINITE, st.lists(TARGETS, min_size=1, max_size=40), st.integers(1, 12))
def test_a_row_like_all_others_is_kept(name, loss, targets, count):
    kept = show(ROW_RULES[name](), [[[(loss, each) for each in targets]]] * count)
    assert all(map(all, kept))


@examples(60)
@given(st.sampled_from(sorted(ROW_RULES)), ROWS)
def test_of_the_first_batch_at_most_half_is_dropped(name, rows):
    (kept,) = show(ROW_RULES[name](), [[rows]])
    assert 2 * sum(kept) >= len(kept)
