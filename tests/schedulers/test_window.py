"""The sliding-window rule."""

from __future__ import annotations

import pytest

from abr_trainer.schedulers import Outcome, WindowScheduler
from tests.schedulers.streams import feed, seen

RISING = [3.0, 3.1, 3.2, 3.3, 3.4]  # slope 0.1 a batch, 3.1 % of the mean of 3.2; deviation 0.141
FALLING = RISING[::-1]
CALM = [3.2, 3.21, 3.2, 3.19, 3.2]  # slope -0.002, 0.06 % of 3.2; deviation 0.006
SCATTERED = [3.2, 3.6, 2.8, 2.8, 3.6]  # slope 0, deviation 0.358: 11 % of 3.2


def decide(history, loss, **options):
    rule = WindowScheduler(**options)
    for batch, earlier in enumerate(history):
        rule.observe(Outcome(seen(earlier, batch), 1, (earlier,)))
    return rule.decide(seen(loss, 5))


@pytest.mark.parametrize(
    ("history", "loss", "repeats"),
    [
        (RISING, 3.3, 3),
        (RISING, 3.1, 2),
        (FALLING, 3.3, 2),
        (FALLING, 3.1, 1),
        (SCATTERED, 3.3, 4),
        (SCATTERED, 3.1, 2),
        (CALM, 3.3, 3),
        (CALM, 3.1, 1),
    ],
)
def test_trend_scatter_and_height_decide(history, loss, repeats):
    assert decide(history, loss, max_repeats=4) == repeats


@pytest.mark.parametrize("factor", [0.1, 1.0, 40.0])
def test_the_scale_of_the_losses_does_not_matter(factor):
    for history in (RISING, FALLING, CALM, SCATTERED):
        for loss in (3.1, 3.3):
            assert decide([factor * x for x in history], factor * loss) == decide(history, loss)


def test_the_published_constants_are_in_nats():
    # 3.2 is above 2.0 and scatters by more than 0.1 without a trend: 2 + 1 extra. Below 2.0 it is never high.
    assert decide(SCATTERED, 3.1, published=True) == 3
    assert decide(RISING, 3.0, published=True) == 2
    assert decide(FALLING, 1.9, published=True) == 1
    assert decide(CALM, 2.1, published=True) == 2


def test_every_batch_is_trained_on_once_until_the_window_is_full():
    assert feed(WindowScheduler(window_size=3), [3.0, 9.0, 20.0, 40.0]) == [1, 1, 1, 2]


def test_only_the_last_losses_count_and_skipped_ones_do_not():
    rule = WindowScheduler(window_size=3)
    feed(rule, [9.0, 9.0, 3.0, 3.1, 3.2])
    rule.observe(Outcome(seen(99.0, 5), 0, (99.0,)))
    assert rule.state_dict() == {"history": [3.0, 3.1, 3.2]}


@pytest.mark.parametrize("most", [1, 2])
def test_no_batch_gets_more_than_it_may(most):
    assert {decide(h, loss, max_repeats=most) for h in (RISING, SCATTERED, CALM) for loss in (3.0, 9.0)} <= {1, most}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 1}, "`window_size` must be at least 2, got 1"),
        ({"max_repeats": 0}, "`max_repeats` must be at least 1, got 0"),
        ({"trend": -0.1}, "`trend` must not be negative, got -0.1"),
        ({"volatility": float("nan")}, "`volatility` must not be negative, got nan"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        WindowScheduler(**options)
