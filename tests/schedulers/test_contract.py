"""What every registered scheduler promises, bare and inside every outlier rule."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys

import pytest

from abr_trainer.schedulers import (
    OUTLIER_RULES,
    SCHEDULERS,
    Observation,
    Outcome,
    RepeatScheduler,
    get_outlier_rule,
    get_repeat_scheduler,
)
from tests.schedulers.streams import rule_named

LOSSES = [4.0, 3.9, 3.7, 3.8, 3.5, 3.6, 3.4, 3.5, 3.3, 3.2, 3.3, 3.1, 9.5, 3.0, 3.2, 12.0, 2.9, 3.0, 2.8, 0.4]


def run(scheduler: RepeatScheduler, losses: list[float], first_batch: int = 0) -> list[int]:
    """Feed a stream of losses as the trainer does, and return the decisions."""
    decisions = []
    for batch, loss in enumerate(losses, start=first_batch):
        observation = Observation(batch=batch, loss=loss, progress=batch / 100)
        decisions.append(scheduler.decide(observation))
        reason = scheduler.explain(observation)
        scheduler.observe(Outcome(observation, decisions[-1], (loss,) * max(1, decisions[-1]), reason))
    return decisions


@pytest.fixture(params=sorted(SCHEDULERS))
def name(request):
    return request.param


@pytest.fixture(params=[None, *sorted(OUTLIER_RULES)])
def rule(request):
    return request.param


@pytest.fixture
def build(tmp_path):
    def build(name: str, rule: str | None) -> RepeatScheduler:
        scheduler = rule_named(name, tmp_path)
        return scheduler if rule is None else get_outlier_rule(rule, scheduler)

    return build


def test_decisions_are_counts(build, name, rule):
    decisions = run(build(name, rule), LOSSES)
    assert all(type(repeats) is int and repeats >= 0 for repeats in decisions)


def test_deciding_and_explaining_change_nothing(build, name, rule):
    scheduler = build(name, rule)
    run(scheduler, LOSSES)
    before = copy.deepcopy(scheduler.state_dict())
    observation = Observation(batch=50, loss=99.0, progress=0.5)
    assert scheduler.decide(observation) == scheduler.decide(observation)
    assert scheduler.explain(observation) == scheduler.explain(observation)
    evidence = scheduler.evidence(observation)
    assert evidence == scheduler.evidence(observation)
    assert json.dumps(evidence)
    assert scheduler.state_dict() == before


def test_a_scheduler_restored_from_json_goes_on_as_if_nothing_had_happened(build, name, rule):
    whole, first = build(name, rule), build(name, rule)
    expected = run(whole, LOSSES + LOSSES)
    run(first, LOSSES)
    second = build(name, rule)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert run(second, LOSSES, first_batch=len(LOSSES)) == expected[len(LOSSES) :]


@pytest.mark.parametrize(
    ("loss", "reason"), [(math.nan, "non-finite"), (math.inf, "non-finite"), (math.nan, "no targets")]
)
def test_a_loss_that_is_not_finite_enters_no_history(build, name, rule, loss, reason):
    scheduler = build(name, rule)
    run(scheduler, LOSSES)
    before = copy.deepcopy(scheduler.state_dict())
    observation = Observation(batch=len(LOSSES), loss=loss, progress=0.3)
    scheduler.observe(Outcome(observation, 0, (loss,), reason))
    assert scheduler.state_dict() == before


def test_every_decision_has_a_reason(build, name, rule):
    reason = build(name, rule).explain(Observation(batch=0, loss=3.0, progress=0.0))
    assert reason
    assert " " not in reason


@pytest.mark.parametrize("mean", [1.0, 1.46, 2.0, 3.7])
def test_controls_spend_the_mean_they_are_given(mean):
    batches = [Observation(batch=batch, loss=3.0, progress=0.0) for batch in range(2000)]
    even = [get_repeat_scheduler("fixed", repeats=mean).decide(batch) for batch in batches]
    assert sum(even) == pytest.approx(2000 * mean, abs=1)
    assert set(even) == {int(mean), -int(-mean // 1)}
    drawn = [get_repeat_scheduler("random", mean_repeats=mean, seed=3).decide(batch) for batch in batches]
    assert sum(drawn) / 2000 == pytest.approx(mean, abs=0.08)  # 4 standard errors of a binomial with 4 tosses
    assert set(drawn) <= {1, 2, 3, 4, 5}


def test_schedulers_need_neither_torch_nor_transformers():
    modules = "abr_trainer.schedulers, abr_trainer.training.ledger"
    code = f"import sys, {modules}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
