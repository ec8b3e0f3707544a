"""Skipping batches whose loss stands out."""

from __future__ import annotations

import random

import pytest

from abr_trainer.schedulers import ConstantScheduler, Observation, Outcome, ThresholdScheduler, get_outlier_rule


def feed(scheduler, losses, first_batch=0):
    """Return the decision on each loss, the scheduler observing each outcome."""
    decisions = []
    for batch, loss in enumerate(losses, start=first_batch):
        observation = Observation(batch=batch, loss=loss, progress=0.0)
        decisions.append(scheduler.decide(observation))
        scheduler.observe(Outcome(observation, decisions[-1], (loss,), scheduler.explain(observation)))
    return decisions


@pytest.mark.parametrize("rule", ["classic", "robust"])
def test_nothing_is_an_outlier_before_ten_losses(rule):
    scheduler = get_outlier_rule(rule, ConstantScheduler())
    assert feed(scheduler, [3.0, 3.1] * 4 + [3.0, 50.0]) == [1] * 10


def test_classic_skips_above_mean_and_two_and_a_half_deviations():
    # Ten losses, 2 and 4 in turn: mean 3, sample standard deviation sqrt(10 / 9) = 1.0541; the line is 5.6353.
    scheduler = get_outlier_rule("classic", ConstantScheduler())
    feed(scheduler, [2.0, 4.0] * 5)
    assert scheduler.decide(Observation(batch=10, loss=5.63, progress=0.0)) == 1
    assert scheduler.decide(Observation(batch=10, loss=5.64, progress=0.0)) == 0


def test_robust_skips_above_median_and_four_scaled_deviations():
    # Ten losses, 2 and 4 in turn: median 3, median absolute deviation 1; the line is 3 + 4 * 1.4826 = 8.9304.
    scheduler = get_outlier_rule("robust", ConstantScheduler())
    feed(scheduler, [2.0, 4.0] * 5)
    assert scheduler.decide(Observation(batch=10, loss=8.93, progress=0.0)) == 1
    assert scheduler.decide(Observation(batch=10, loss=8.94, progress=0.0)) == 0


def test_losses_that_agree_do_not_make_the_next_one_an_outlier():
    # All 3.0: the spread is taken as 1 % of the level, the line is 3 + 4 * 0.03 = 3.12.
    scheduler = get_outlier_rule("robust", ConstantScheduler())
    feed(scheduler, [3.0] * 10)
    assert scheduler.decide(Observation(batch=10, loss=3.11, progress=0.0)) == 1
    assert scheduler.decide(Observation(batch=10, loss=3.13, progress=0.0)) == 0


def test_classic_remembers_outliers_and_robust_does_not():
    classic, robust = (get_outlier_rule(rule, ConstantScheduler()) for rule in ("classic", "robust"))
    for scheduler in (classic, robust):
        assert feed(scheduler, [3.0, 3.2] * 10 + [20.0])[-1] == 0
    assert 20.0 in classic.state_dict()["history"]
    assert 20.0 not in robust.state_dict()["history"]


def test_only_the_last_losses_count():
    scheduler = get_outlier_rule("robust", ConstantScheduler(), window=20)
    feed(scheduler, [9.0, 9.1] * 10 + [3.0, 3.1] * 10)
    assert scheduler.decide(Observation(batch=40, loss=9.0, progress=0.0)) == 0


def test_what_is_no_outlier_is_left_to_the_inner_scheduler():
    scheduler = get_outlier_rule("robust", ThresholdScheduler())
    assert feed(scheduler, [3.0, 2.5] * 6) == [3, 2] * 6
    observation = Observation(batch=12, loss=2.9, progress=0.0)
    assert (scheduler.decide(observation), scheduler.explain(observation)) == (2, "threshold")
    broken = Observation(batch=12, loss=29.0, progress=0.0)
    assert (scheduler.decide(broken), scheduler.explain(broken)) == (0, "outlier")


def test_a_shift_of_the_data_is_learnt_after_the_patience_is_spent():
    # After 10 skips in a row the history is dropped; the next losses are trained on and build a new one.
    scheduler = get_outlier_rule("robust", ConstantScheduler(), patience=10)
    feed(scheduler, [3.0, 3.1] * 50)
    assert feed(scheduler, [6.0, 6.1] * 20, first_batch=100) == [0] * 10 + [1] * 30


def test_robust_finds_what_classic_misses():
    """One batch in ten far above: the classic deviation swells with each one it keeps."""
    rng = random.Random(0)
    losses = [rng.gauss(3.0, 0.1) + (2.0 if batch % 10 == 9 else 0.0) for batch in range(20, 420)]
    caught = {}
    for rule in ("classic", "robust"):
        decisions = feed(get_outlier_rule(rule, ConstantScheduler()), losses)
        caught[rule] = sum(repeats == 0 for repeats in decisions[9::10])
        assert sum(repeats == 0 for i, repeats in enumerate(decisions) if i % 10 != 9) == 0, "a good batch was skipped"
    assert caught["robust"] >= 39  # of 40; the first ten batches are history
    assert caught["classic"] < caught["robust"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": 0.0}, "`outlier_sigmas` must be positive, got 0.0"),
        ({"window": 5}, "`outlier_window` must be at least 10, got 5"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        get_outlier_rule("robust", ConstantScheduler(), **options)
