"""The marginal-value rule."""

from __future__ import annotations

import pytest

from abr_trainer.schedulers import GainScheduler, Outcome
from tests.schedulers.streams import feed, seen


def falling(per_batch, own, count=200):
    """Batches whose first-pass loss falls by `per_batch`, and by `own` with each further pass over the same one."""
    return [[4.0 - per_batch * i - own * n for n in range(6)] for i in range(count)]


def test_a_batch_is_repeated_while_that_gains_more_than_fresh_ones_do():
    # A further pass gains 0.2 on the batch, of which a tenth counts: 0.02 against 0.005 a fresh pass.
    assert set(feed(GainScheduler(max_repeats=3), falling(0.005, 0.2))[100:]) == {3}


def test_a_batch_is_left_where_fresh_ones_gain_more():
    # 0.02 against 0.05: only the probes, one in ten, make a second pass.
    decisions = feed(GainScheduler(), falling(0.05, 0.2))
    assert max(decisions) == 2
    assert 5 <= sum(repeats == 2 for repeats in decisions[10:]) <= 40  # 190 tosses of 1 in 10: 19 +- 4 * 4.1, or so


def test_a_batch_ends_where_the_last_pass_gained_too_little():
    # Passes gain 0.2, 0.2, 0.01, ...: of the last a tenth is 0.001, less than the 0.005 of a fresh pass.
    stream = [[loss, loss - 0.2, loss - 0.4, loss - 0.41, loss - 0.42] for loss, *_ in falling(0.005, 0.0)]
    assert set(feed(GainScheduler(), stream)[150:]) == {4}


def test_repeats_do_not_lower_the_bar_for_more_of_them():
    # Five passes over each batch: the level falls by 0.02 a batch all the same, and that is what a fresh one is worth.
    rule = GainScheduler()
    for batch in range(20):
        loss = 4.0 - 0.02 * batch
        rule.observe(Outcome(seen(loss, batch), 5, tuple(loss - 0.1 * i for i in range(5))))
    assert rule.fresh_gain() == pytest.approx(0.02)
    assert rule.decide(seen(3.6, 20)) == 1 or rule.probes(seen(3.6, 20))


def test_what_the_model_predicts_already_is_not_repeated():
    rule = GainScheduler(saturation=0.8)
    feed(rule, falling(0.001, 0.3, count=100))
    assert rule.decide(seen(3.9, 100, accuracy=0.5)) == 5
    assert rule.decide(seen(3.9, 100, accuracy=0.8)) == 1
    assert rule.explain(seen(3.9, 100, accuracy=0.8)) == "saturated"
    assert rule.goes_on(seen(3.9, 100), [3.9, 3.0], 0.7)
    assert not rule.goes_on(seen(3.9, 100), [3.9, 3.0], 0.9)


def test_losses_that_rise_make_any_improvement_worth_it():
    assert set(feed(GainScheduler(max_repeats=2), falling(-0.01, 0.1))[100:]) == {2}


def test_nothing_is_repeated_before_the_improvement_is_known():
    assert feed(GainScheduler(), falling(0.0, 1.0, count=10)) == [1] * 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_repeats": 0}, "`max_repeats` must be at least 1, got 0"),
        ({"window": 5}, "`window` must be at least 10, got 5"),
        ({"probe_every": 0}, "`probe_every` must be at least 1, got 0"),
        ({"transfer": 0.0}, "`transfer` must be above 0 and at most 1, got 0.0"),
        ({"saturation": 1.5}, "`saturation` must be above 0 and at most 1, got 1.5"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GainScheduler(**options)
