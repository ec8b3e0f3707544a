"""The rules that look at one batch at a time."""

from __future__ import annotations

from collections import Counter

import pytest

from abr_trainer.schedulers import ConstantScheduler, Observation, ThresholdScheduler, UniformScheduler
from tests.schedulers.streams import feed


def decide(scheduler, loss, batch=0):
    return scheduler.decide(Observation(batch=batch, loss=loss, progress=0.0))


@pytest.mark.parametrize(
    ("loss", "repeats"),
    [(0.3, 1), (1.0, 1), (1.99, 1), (2.0, 2), (3.7, 3), (5.0, 5), (80.0, 5), (1e308, 5)],
)
def test_threshold_repeats_once_for_every_whole_threshold(loss, repeats):
    # min(int(loss / 1.0), 5), at least 1
    assert decide(ThresholdScheduler(), loss) == repeats


def test_threshold_scales_with_its_threshold():
    # 3.7 / 0.5 = 7.4, 3.7 / 2 = 1.85
    assert decide(ThresholdScheduler(loss_threshold=0.5, max_repeats=9), 3.7) == 7
    assert decide(ThresholdScheduler(loss_threshold=2.0), 3.7) == 1


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_threshold_must_be_positive(threshold):
    with pytest.raises(ValueError, match="`loss_threshold` must be positive, got"):
        ThresholdScheduler(loss_threshold=threshold)


def test_constant_looks_at_nothing():
    assert {decide(ConstantScheduler(repeats=3), loss, batch) for loss in (0.1, 9.0) for batch in range(5)} == {3}


def test_constant_cannot_skip_everything():
    with pytest.raises(ValueError, match="`repeats` must be at least 1, got 0"):
        ConstantScheduler(repeats=0)


def test_uniform_draws_every_count_about_equally_often():
    draws = Counter(decide(UniformScheduler(max_repeats=4, seed=1), 3.0, batch) for batch in range(4000))
    assert sorted(draws) == [1, 2, 3, 4]
    # Standard deviation of a count: sqrt(4000 * 1/4 * 3/4) = 27.
    assert all(abs(count - 1000) < 5 * 27 for count in draws.values())


def test_uniform_tosses_the_same_coin_for_a_batch_whatever_was_asked_before():
    one, other = UniformScheduler(seed=7), UniformScheduler(seed=7)
    for batch in range(20):
        decide(other, 3.0, batch)
    assert [decide(one, 3.0, batch) for batch in range(20)] == [decide(other, 1.0, batch) for batch in range(20)]
    assert [decide(one, 3.0, b) for b in range(20)] != [decide(UniformScheduler(seed=8), 3.0, b) for b in range(20)]


def test_a_quantile_repeats_the_highest_losses_the_highest_of_them_more_often():
    # 24 losses from 3.00 to 3.23 in any order, and this one: the highest 5 of 25 are 20 %, 1 is 4 %, 20 % of these.
    rule = ThresholdScheduler("q0.8", window=24)
    feed(rule, [3.0 + 0.01 * (7 * i % 24) for i in range(24)])
    assert [decide(rule, loss) for loss in (3.0, 3.19, 3.24, 3.3, 99.0)] == [1, 1, 2, 3, 3]


@pytest.mark.parametrize("slope", [-0.02, 0.0, 0.02])
def test_relative_thresholds_find_the_same_batches_while_losses_fall_or_rise(slope):
    noise = [0.01 * (7 * i % 24) for i in range(400)]
    for threshold in ("q0.8", "s1"):
        level, moving = ([9 + each + i * k for i, each in enumerate(noise)] for k in (0.0, slope))
        assert feed(ThresholdScheduler(threshold), level) == feed(ThresholdScheduler(threshold), moving)


def test_a_quantile_spends_the_same_at_any_level_of_the_losses():
    for level in (0.5, 3.0, 9.0):
        losses = [level + 0.001 * ((7919 * i) % 1009) for i in range(1000)]
        assert sum(feed(ThresholdScheduler("q0.8"), losses)) / 1000 == pytest.approx(1.22, abs=0.04)


def test_sigmas_repeat_once_more_for_each_so_many_deviations():
    # Eleven losses that scatter by about 0.15, through which 3.31 makes the line rise: it lies 1.4 spreads above it.
    rule = ThresholdScheduler("s1")
    feed(rule, [3.0, *([2.9, 3.1] * 5)])
    assert [decide(rule, loss) for loss in (2.0, 3.1, 3.31, 3.5)] == [1, 1, 2, 3]
    assert decide(ThresholdScheduler("s1"), 9.0) == 1, "nothing is high before ten losses"


@pytest.mark.parametrize("threshold", ["q0", "q1", "s0", "x1", "q", "sigma"])
def test_a_threshold_that_is_none_is_told(threshold):
    with pytest.raises(ValueError, match="`loss_threshold` must be"):
        ThresholdScheduler(threshold)
