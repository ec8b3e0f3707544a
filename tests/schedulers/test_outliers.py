"""Skipping batches whose loss stands out."""

from __future__ import annotations

import math
import random

import pytest

from abr_trainer.schedulers import ConstantScheduler, Observation, Outcome, ThresholdScheduler, get_outlier_rule
from tests.schedulers.streams import feed


def test_classic_calls_nothing_an_outlier_before_ten_losses():
    scheduler = get_outlier_rule("classic", ConstantScheduler())
    assert feed(scheduler, [3.0, 3.1] * 4 + [3.0, 50.0]) == [1] * 10


def test_robust_judges_from_the_fifth_batch_on():
    # Four times 3: three steps of 0 and ten at the assumed spread, 4 % of 3, make 0.12 * 10 / 13 = 0.0923, times
    # sqrt(1 + 2 / 4) for their number, times 1 + 4 / 4: the line is 3 + 4 * 0.0923 * 1.2247 * 2 = 3.9044.
    scheduler = get_outlier_rule("robust", ConstantScheduler())
    assert feed(scheduler, [3.0] * 3 + [50.0]) == [1] * 4
    scheduler = get_outlier_rule("robust", ConstantScheduler())
    assert feed(scheduler, [3.0] * 4) == [1] * 4
    assert scheduler.decide(Observation(batch=4, loss=3.90, progress=0.0)) == 1
    assert scheduler.decide(Observation(batch=4, loss=3.91, progress=0.0)) == 0


def test_good_batches_at_the_start_of_a_run_are_kept():
    """First losses of batches of 4 x 128 tokens of clean WikiText-2; the fourth is higher than the three before it."""
    starts = [
        [5.10, 4.43, 3.96, 4.74, 3.47, 4.25, 3.59, 3.78, 4.14, 3.68, 3.69, 3.63, 3.45, 3.61, 3.68, 4.20, 3.55, 3.50],
        [5.10, 4.64, 4.20, 3.85, 3.50, 4.37, 3.67, 3.92, 4.35, 3.81, 3.88, 3.78, 3.55, 3.74, 3.76, 4.31, 3.72, 3.62],
        [4.20, 4.05, 4.10, 4.75, 4.00, 3.90, 4.40, 3.80, 3.75, 4.30, 3.70, 3.65, 4.10, 3.60, 3.55, 3.95, 3.50, 3.45],
    ]
    for losses in starts:
        assert feed(get_outlier_rule("robust", ConstantScheduler()), losses) == [1] * len(losses)


def test_classic_skips_above_mean_and_two_and_a_half_deviations():
    # Ten losses, 2 and 4 in turn: mean 3, sample standard deviation sqrt(10 / 9) = 1.0541; the line is 5.6353.
    scheduler = get_outlier_rule("classic", ConstantScheduler())
    feed(scheduler, [2.0, 4.0] * 5)
    assert scheduler.decide(Observation(batch=10, loss=5.63, progress=0.0)) == 1
    assert scheduler.decide(Observation(batch=10, loss=5.64, progress=0.0)) == 0


def limit(losses):
    """Return the line above which `robust` skips after these losses."""
    scheduler = get_outlier_rule("robust", ConstantScheduler())
    for loss in losses:
        scheduler.observe(Outcome(Observation(batch=0, loss=loss, progress=0.0), 1, (loss,)))
    line = scheduler.evidence(Observation(batch=10, loss=3.0, progress=0.0))["outlier above"]
    assert scheduler.decide(Observation(batch=12, loss=line - 0.01, progress=0.0)) == 1
    assert scheduler.decide(Observation(batch=12, loss=line + 0.01, progress=0.0)) == 0
    return line


def test_the_spread_is_that_of_the_steps_filled_up_with_an_assumed_one():
    # Three losses below the median of 3.1, which are too few to go by. Seven steps, of which the middle one is 0.1:
    # 0.1 * 1.4826 / sqrt(2) = 0.1048. With ten at 4 % of 3.1: (7 * 0.1048 + 10 * 0.124) / 17 = 0.1161, times
    # sqrt(1 + 2 / 8) = 0.1298. The line is half as far again, since there are only eight losses: 1 + 4 / 8.
    assert limit([3.0, 3.1, 3.2, 3.1, 3.0, 3.1, 3.2, 3.0]) == pytest.approx(3.1 + 4 * 0.1298 * 1.5, abs=1e-3)


def test_what_lies_below_the_losses_around_it_tells_how_far_good_ones_stray():
    # Of twenty losses, four lie 1 below their neighbours, 3: the spread is 1.4826, times sqrt(1 + 2 / 16) = 1.5725,
    # since level and steps are those of the sixteen others; times 1 + 4 / 20 for the number of losses.
    assert limit([3.0, 3.0, 2.0, 3.0, 3.0] * 4) == pytest.approx(3 + 4 * 1.5725 * 1.2, abs=1e-3)


def test_a_low_level_is_not_a_small_spread():
    # At 0.5 nats the assumed spread is 0.1, not 4 %. With three steps of 0 it is 0.1 * 10 / 13: the line is
    # 0.5 + 4 * 0.0769 * sqrt(1.5) * 2 = 1.2537.
    assert limit([0.5] * 4) == pytest.approx(1.2537, abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_good_batches_are_kept_that_scatter_fall_or_come_back(seed):
    """Small batches scatter by a fifth, a short text is learnt by heart, the second epoch begins far lower."""
    draw = random.Random(seed)
    streams = {
        "scatter": [3 * (1 + 0.2 * draw.gauss(0, 1)) for _ in range(300)],
        "fall": [(0.05 + 2.45 * math.exp(-batch / 5)) * (1 + 0.05 * draw.gauss(0, 1)) for batch in range(300)],
        "epochs": [(1.2, 0.5, 0.2)[batch // 100] * (1 + 0.15 * draw.gauss(0, 1)) for batch in range(300)],
        "nothing left": [abs(0.05 * draw.gauss(0, 1)) for _ in range(300)],
    }
    for name, losses in streams.items():
        skipped = feed(get_outlier_rule("robust", ConstantScheduler()), losses).count(0)
        assert skipped <= (9 if name == "scatter" else 2), name


def test_losses_that_agree_do_not_make_the_next_one_an_outlier():
    # A hundred times 3: the spread is taken as 1 % of the level, the line is 3 + 4 * 0.03 * sqrt(1.02) * 1.04 = 3.126.
    scheduler = get_outlier_rule("robust", ConstantScheduler())
    feed(scheduler, [3.0] * 100)
    assert scheduler.decide(Observation(batch=100, loss=3.12, progress=0.0)) == 1
    assert scheduler.decide(Observation(batch=100, loss=3.13, progress=0.0)) == 0


def test_dirt_that_was_trained_on_at_the_start_does_not_count_later():
    """The first four batches cannot be judged. Then the first and the third are the outliers."""
    scheduler = get_outlier_rule("robust", ConstantScheduler())
    assert feed(scheduler, [15.0, 4.7, 15.2, 4.6, 8.0, 4.5, 4.4, 14.9, 7.5, 4.4]) == [1, 1, 1, 1, 0, 1, 1, 0, 0, 1]
    level = scheduler.evidence(Observation(batch=10, loss=4.4, progress=0.0))["their level"]
    assert level == 4.5  # the median of 4.7, 4.6, 4.5, 4.4 and 4.4


def test_shuffled_tokens_do_not_hide_among_the_high_losses_of_the_start():
    """Good losses fall from 6 to 3.3 in thirty batches, 2 % a batch; every fourth batch is 1.7 times as high."""
    losses = [6 * 0.98**batch * (1.7 if batch % 4 == 3 else 1.0) for batch in range(30)]
    assert feed(get_outlier_rule("robust", ConstantScheduler()), losses) == [1] * 4 + [1, 1, 1, 0] * 6 + [1, 1]
    assert sum(repeats == 0 for repeats in feed(get_outlier_rule("classic", ConstantScheduler()), losses)) == 0


def test_a_fall_of_the_loss_is_not_taken_for_outliers():
    losses = [6 * 0.97**batch for batch in range(60)] + [6 * 0.97**60] * 60
    assert feed(get_outlier_rule("robust", ConstantScheduler()), losses) == [1] * 120


def test_text_learnt_by_heart_is_skipped_and_merely_easy_text_is_not():
    # A hundred losses about 3 with a spread of 0.1: with `low` of 0.5, too low is below half the level.
    scheduler = get_outlier_rule("robust", ConstantScheduler(), low=0.5)
    feed(scheduler, [2.9, 3.0, 3.1, 3.0] * 25)
    assert scheduler.decide(Observation(batch=100, loss=1.6, progress=0.0)) == 1
    assert scheduler.decide(Observation(batch=100, loss=1.4, progress=0.0)) == 0
    scheduler = get_outlier_rule("robust", ConstantScheduler())
    feed(scheduler, [2.9, 3.0, 3.1, 3.0] * 25)
    assert scheduler.decide(Observation(batch=100, loss=0.1, progress=0.0)) == 1


def test_low_losses_are_ordinary_where_losses_vary_much():
    # From 0.5 to 4.5 in turn: the steps are 1 to 3, and half the level is within four spreads of it.
    scheduler = get_outlier_rule("robust", ConstantScheduler(), low=0.5)
    losses = [2.5, 4.5, 1.5, 3.5, 0.5] * 10
    for loss in losses:
        scheduler.observe(Outcome(Observation(batch=0, loss=loss, progress=0.0), 1, (loss,)))
    assert all(scheduler.decide(Observation(batch=50, loss=loss, progress=0.0)) == 1 for loss in losses[:5])


def test_batches_that_the_inner_rule_skips_stay_in_the_history():
    class Never(ConstantScheduler):
        def decide(self, observation):
            return 0

    for rule in ("classic", "robust"):
        scheduler = get_outlier_rule(rule, Never())
        assert feed(scheduler, [3.0, 3.1] * 10) == [0] * 20
        assert scheduler.state_dict()["history"] == [3.0, 3.1] * 10
        assert scheduler.state_dict()["consecutive"] == 0


def test_only_the_last_losses_count():
    scheduler = get_outlier_rule("robust", ConstantScheduler(), window=20)
    feed(scheduler, [9.0, 9.1] * 10 + [3.0, 3.1] * 10)
    assert scheduler.decide(Observation(batch=40, loss=9.0, progress=0.0)) == 0


def test_what_is_no_outlier_is_left_to_the_inner_scheduler():
    scheduler = get_outlier_rule("robust", ThresholdScheduler())
    assert feed(scheduler, [3.1, 2.9] * 6) == [3, 2] * 6
    observation = Observation(batch=12, loss=2.9, progress=0.0)
    assert (scheduler.decide(observation), scheduler.explain(observation)) == (2, "threshold")
    broken = Observation(batch=12, loss=29.0, progress=0.0)
    assert (scheduler.decide(broken), scheduler.explain(broken)) == (0, "outlier")


def test_a_shift_of_the_data_is_learnt_after_the_patience_is_spent():
    # After 10 skips in a row the history is dropped; the next losses are trained on and build a new one.
    scheduler = get_outlier_rule("robust", ConstantScheduler(), patience=10)
    feed(scheduler, [3.0, 3.1] * 50)
    assert feed(scheduler, [6.0, 6.1] * 20, first_batch=100) == [0] * 10 + [1] * 30


def test_a_mixture_is_learnt_once_it_was_skipped_more_often_than_not():
    # Three new batches, one old one, in turn: never ten skips in a row. The 16th skip is more than half of 30
    # verdicts; 16 = 5 * 3 + 1, so it is batch 21 of the mixture. Then the new losses make the level.
    scheduler = get_outlier_rule("robust", ConstantScheduler(), patience=10)
    feed(scheduler, [3.0, 3.1] * 50)
    mixture = feed(scheduler, [6.0, 6.1, 6.0, 3.0] * 20, first_batch=100)
    assert mixture[:21] == [0, 0, 0, 1] * 5 + [0]
    assert mixture[-20:] == [1] * 20
    assert scheduler.evidence(Observation(batch=160, loss=6.0, progress=0.0))["outlier above"] > 6.1


def test_one_batch_in_four_that_stands_out_does_not_pass_for_a_change():
    rng = random.Random(1)
    dirty = [rng.random() < 0.25 for _ in range(2000)]
    losses = [rng.gauss(7.0, 0.3) if dirt else rng.gauss(3.0, 0.1) for dirt in dirty]
    decisions = feed(get_outlier_rule("robust", ConstantScheduler()), losses)
    skipped = [repeats == 0 for repeats in decisions]
    # Once, by chance, 16 of 30 batches are dirt, and are taken for a change: then four batches cannot be judged.
    assert sum(dirt and not skip for skip, dirt in zip(skipped[10:], dirty[10:], strict=True)) <= 1
    assert sum(skip for skip, dirt in zip(skipped, dirty, strict=True) if not dirt) <= 0.005 * 1500


def test_robust_finds_what_classic_misses():
    """One batch in ten far above: the classic deviation swells with each one it keeps."""
    rng = random.Random(0)
    losses = [rng.gauss(3.0, 0.1) + (2.0 if batch % 10 == 9 else 0.0) for batch in range(400)]
    caught = {}
    for rule in ("classic", "robust"):
        decisions = feed(get_outlier_rule(rule, ConstantScheduler()), losses)
        caught[rule] = sum(repeats == 0 for repeats in decisions[9::10])
        assert sum(repeats == 0 for i, repeats in enumerate(decisions) if i % 10 != 9) <= 0.005 * 360
    assert caught["robust"] == 40
    assert caught["classic"] < caught["robust"]


def test_a_checkpoint_written_before_verdicts_were_kept_still_loads():
    scheduler = get_outlier_rule("robust", ConstantScheduler())
    scheduler.load_state_dict({"history": [3.0] * 20, "consecutive": 0, "inner": {}})
    assert feed(scheduler, [9.0, 3.0]) == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": 0.0}, "`outlier_sigmas` must be positive, got 0.0"),
        ({"window": 5}, "`outlier_window` must be at least 10, got 5"),
        ({"low": 1.0}, "`low` must be at least 0 and below 1, got 1.0"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        get_outlier_rule("robust", ConstantScheduler(), **options)


@pytest.mark.parametrize("name", ["classic", "robust"])
@pytest.mark.parametrize("loss", [1.386919587996769, 0.1, 0.0, 3.4e38, 1.7e308, -1.7e308])
def test_equal_losses_are_no_outliers_whatever_they_are(name, loss):
    """The mean of equal losses may be less than them by rounding, and the sum or the square of huge ones infinite."""
    assert feed(get_outlier_rule(name, ConstantScheduler()), [loss] * 40) == [1] * 40
