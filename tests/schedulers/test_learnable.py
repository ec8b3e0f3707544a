"""The rule that learns, on streams of losses whose answer is known."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys

import pytest
import torch

from abr_trainer.schedulers import Observation, Outcome, ThresholdScheduler
from abr_trainer.schedulers.learnable import MIN_MEMORY, LearnableScheduler

pytestmark = pytest.mark.slow

BATCHES = 600
APART = 0.8
"""Nats between the two kinds of batch."""


def stream(scheduler, gain, batches=BATCHES, seed=0, memorised=0.0, first_batch=0, level=20.0):
    """Train on hard and easy batches in random order; return kind, repeats and reason of each, as (hard, n, why).

    All share a level, which `gain(hard, repeats)` nats are taken from after each batch. A first-pass loss is the
    level, 0.8 nats more for a hard batch, and noise of 0.1 nats; each further pass over the batch itself shows
    `memorised` nats less. The level begins at 20 nats to stay positive as it falls.
    """
    rng, trace = random.Random(f"stream-{seed}-{first_batch}"), []
    for batch in range(first_batch, first_batch + batches):
        hard = rng.random() < 0.5
        loss = level + APART * hard + rng.gauss(0.0, 0.1)
        observation = Observation(batch=batch, loss=loss, progress=0.0)
        repeats, reason = scheduler.decide(observation), scheduler.explain(observation)
        losses = tuple(loss - memorised * i for i in range(repeats))
        scheduler.observe(Outcome(observation, repeats, losses, reason))
        level -= gain(hard, repeats)
        trace.append((hard, repeats, reason))
    return trace


def mean_repeats(trace, hard=None):
    """Return the mean over the last 100 decisions, of one kind if told, exploration left out."""
    return statistics.fmean(n for kind, n, why in trace[-100:] if why == "learned" and hard in (None, kind))


def build(**options):
    """Build a rule whose warm-up gives 1 or 2 repeats on the streams above."""
    return LearnableScheduler(**{"loss_threshold": 10.0, **options})


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("hard_pays", [True, False])
def test_within_600_batches_it_repeats_the_one_kind_that_pays(hard_pays, seed):
    """Every update on the kind that pays lowers the level by 0.02 nats; the other kind gives 0.004 once.

    A fresh pass is then worth (0.02 + 0.004) / 2 = 0.012 on average, and repeating gains 0.008 a pass.
    """
    trace = stream(build(seed=seed), lambda hard, n: 0.02 * n if hard == hard_pays else 0.004, seed=seed)
    assert mean_repeats(trace, hard=hard_pays) >= 2.0
    assert mean_repeats(trace, hard=not hard_pays) <= 1.4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_within_600_batches_it_settles_at_1_where_repeats_never_pay(seed):
    """One update lowers the level by 0.01 nats, four more together by 0.003."""
    trace = stream(build(seed=seed), lambda hard, n: 0.01 + 0.003 * (n > 1), seed=seed)
    assert mean_repeats(trace) <= 1.1
    assert {why for _, _, why in trace[:100]} == {"warmup", "explored"}
    # Exploring goes on: sqrt(100 / 550) * 0.25 = 0.11 of the batches, 3 repeats each.
    assert statistics.fmean(n for _, n, _ in trace[-100:]) <= 1.1 + 0.11 * 3


def test_what_was_never_tried_is_worth_nothing_and_ties_go_to_1():
    scheduler = build(exploration=0.0, caution=0.0)
    for batch in range(200):
        observation = Observation(batch=batch, loss=5.0 + 0.01 * batch + 0.1 * (batch % 3), progress=0.0)
        scheduler.observe(Outcome(observation, 1, (observation.loss,)))
    observation = Observation(batch=200, loss=7.5, progress=0.0)
    assert scheduler.learner.fresh == 0.0  # the losses rise
    assert scheduler.learner.gains(7.5, 200) == [(0.0, 0.0)] * 4
    assert (scheduler.decide(observation), scheduler.explain(observation)) == (1, "learned")


def test_within_600_batches_it_settles_at_1_where_repeats_only_memorise():
    """Each pass lowers the loss of its own batch by 0.5 nats, and the level not at all after the first."""
    assert mean_repeats(stream(build(seed=3), lambda hard, n: 0.01, seed=3, memorised=0.5)) <= 1.1


def test_the_loss_of_a_batch_after_its_updates_is_no_credit():
    one, other = build(), build()
    for scheduler, memorised in ((one, 0.0), (other, 0.9)):
        stream(scheduler, lambda hard, n: 0.01 * n, batches=200, memorised=memorised)
    assert one.state_dict() == other.state_dict()


def test_what_was_made_counts_not_what_was_decided():
    def cut(decided):
        scheduler = build()
        for batch in range(MIN_MEMORY + 8):
            observation = Observation(batch=batch, loss=5.0 - 0.01 * batch + 0.1 * (batch % 3), progress=0.0)
            assert not decided or scheduler.decide(observation)
            scheduler.observe(Outcome(observation, 1 + batch % 2, (5.0,) * (1 + batch % 2), "budget"))
        return scheduler

    made = cut(decided=True)
    assert made.state_dict() == cut(decided=False).state_dict()
    assert {repeats for _, repeats in made.history} == {1, 2}
    before = made.state_dict()
    made.observe(Outcome(Observation(batch=200, loss=99.0, progress=0.0), 0, (99.0,), "outlier"))
    assert made.state_dict() == before


def test_restored_in_mid_run_it_goes_on_as_if_nothing_had_happened():
    def gain(hard, n):
        return 0.01 * n

    whole, first, second = build(), build(), build()
    for scheduler in (whole, first):
        stream(scheduler, gain, batches=149)  # between two rounds of learning
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.state_dict() == whole.state_dict()
    later = [stream(scheduler, gain, batches=60, first_batch=149, level=17.0) for scheduler in (whole, second)]
    assert later[0] == later[1]
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("losses", [[3.0], [0.0], [-1.0, 1.0], [3.0] * 50 + [1e308] + [2.0] * 50])
def test_odd_losses_leave_a_state_that_json_can_hold(losses):
    scheduler = build()
    for batch in range(2 * MIN_MEMORY):
        observation = Observation(batch=batch, loss=losses[batch % len(losses)], progress=0.0)
        repeats = scheduler.decide(observation)
        assert 1 <= repeats <= 5
        assert json.dumps(scheduler.evidence(observation), allow_nan=False)
        scheduler.observe(Outcome(observation, repeats, (observation.loss,) * repeats))
    assert scheduler.learner is not None
    assert json.dumps(scheduler.state_dict(), allow_nan=False)


def test_no_random_state_but_its_own_is_touched():
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    stream(build(), lambda hard, n: 0.01, batches=120)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_the_same_losses_give_the_same_state_whatever_is_drawn_elsewhere():
    one, other, another = build(), build(), build(seed=1)
    for scheduler in (one, other, another):
        torch.rand(3)
        random.random()
        stream(scheduler, lambda hard, n: 0.01 * n, batches=120)
    assert one.state_dict() == other.state_dict()
    assert one.state_dict() != another.state_dict()


def test_in_the_warm_up_it_is_abr_but_for_the_draws():
    scheduler, abr = LearnableScheduler(seed=2), ThresholdScheduler()
    reasons = []
    for batch in range(100):
        observation = Observation(batch=batch, loss=3.5, progress=0.0)
        reasons.append(scheduler.explain(observation))
        if reasons[-1] == "warmup":
            assert scheduler.decide(observation) == abr.decide(observation)
    assert set(reasons) == {"warmup", "explored"}
    assert abs(reasons.count("explored") - 25) <= 4 * math.sqrt(100 * 0.25 * 0.75)  # 4 standard deviations


def test_evidence_shows_what_is_weighed():
    scheduler = build(exploration=0.0)
    early = scheduler.evidence(Observation(batch=0, loss=3.0, progress=0.0))
    assert early["exploration rate"] == 0.0
    assert early["loss_threshold"] == 10.0
    stream(scheduler, lambda hard, n: 0.01, batches=120)
    late = scheduler.evidence(Observation(batch=120, loss=19.0, progress=0.0))
    assert late["value of a fresh pass"] == pytest.approx(0.01, abs=0.01)
    assert late["level of the losses"] == pytest.approx(19.2, abs=0.3)  # 20 - 120 * 0.01, and half of 0.8
    assert {f"gain of {n} over 1" for n in (2, 3, 4, 5)} <= set(late)


def test_its_name_holds_its_parameters_only():
    scheduler = LearnableScheduler(seed=7)
    name = repr(scheduler)
    stream(scheduler, lambda hard, n: 0.01, batches=120)
    assert repr(scheduler) == name
    assert "seed=7" in name
    assert "history" not in name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_threshold": 0.0}, "`loss_threshold` must be positive, got 0.0"),
        ({"max_repeats": 0}, "`max_repeats` must be at least 1, got 0"),
        ({"warmup": -1}, "`warmup` must be at least 0, got -1"),
        ({"memory": 10}, "`memory` must be at least 96, got 10"),
        ({"hidden": 0}, "`hidden` must be at least 1, got 0"),
        ({"exploration": 1.5}, "`exploration` must be between 0 and 1, got 1.5"),
        ({"exploration": math.nan}, "`exploration` must be between 0 and 1, got nan"),
        ({"caution": -1.0}, "`caution` must be 0 or more, got -1.0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive, got 0.0"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        LearnableScheduler(**options)
    assert "\n" not in str(caught.value)


def test_torch_is_imported_when_it_first_learns():
    code = """
import sys
from abr_trainer.schedulers import Observation, Outcome
from abr_trainer.schedulers.learnable import LearnableScheduler
scheduler = LearnableScheduler()
for batch in range(20):
    observation = Observation(batch, 3.0, 0.0)
    scheduler.observe(Outcome(observation, scheduler.decide(observation), (3.0,)))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
