"""Skipping easy batches."""

from __future__ import annotations

import pytest

from abr_trainer.schedulers import EasySkip
from tests.schedulers.streams import feed, seen

TEN = [3.0, 3.9, 3.1, 3.8, 3.2, 3.7, 3.3, 3.6, 3.4, 3.5]


def test_what_lies_in_the_lowest_quantile_is_skipped():
    # Of the ten losses, 3.15 exceeds two and 3.25 three.
    rule = EasySkip(quantile=0.3, window=10)
    feed(rule, TEN)
    assert rule.decide(seen(3.15, 10)) == 0
    assert rule.decide(seen(3.25, 10)) == 1
    assert rule.explain(seen(3.15, 10)) == "easy"


def test_nothing_is_skipped_before_the_window_is_full():
    assert feed(EasySkip(quantile=0.5, window=10), [9.0 - i for i in range(8)]) == [1] * 8


def test_losses_that_fall_ever_faster_are_not_all_easy():
    decisions = feed(EasySkip(quantile=0.2, window=10, patience=2), [9.0 - 0.01 * i * i for i in range(20)])
    assert decisions[10:19] == [0, 0, 1] * 3


def test_of_a_steady_stream_it_skips_its_share():
    losses = [3.0 + 0.01 * ((7919 * i) % 101) for i in range(600)]
    decisions = feed(EasySkip(quantile=0.2, window=50, patience=5), losses)
    assert 0.15 < sum(repeats == 0 for repeats in decisions) / 600 < 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 0.0}, "`quantile` must be between 0 and 1, got 0.0"),
        ({"window": 1}, "`window` must be at least 2, got 1"),
        ({"patience": 0}, "`patience` must be at least 1, got 0"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EasySkip(**options)
