"""Coming back to hard batches later."""

from __future__ import annotations

import pytest

from abr_trainer.schedulers import Outcome, ReplayScheduler
from tests.schedulers.streams import feed, seen


def replays(rule, losses):
    """Feed losses to a rule, and return which batches it replays after each."""
    found = []
    for batch, loss in enumerate(losses):
        found.append(list(rule.replay(seen(loss, batch))))
        rule.observe(Outcome(seen(loss, batch), 1, (loss,), "", tuple((index, 1.0) for index in found[-1])))
    return found


def test_every_batch_comes_back_once_so_many_batches_later():
    assert replays(ReplayScheduler(quantile=0.0, spacing=2), [3.0] * 5) == [[], [], [0], [1], [2]]


def test_only_hard_batches_come_back():
    # Ten losses from 3.0 to 3.9, of which 3.85 exceeds eight, and then lower ones.
    losses = [3.0, 3.9, 3.1, 3.8, 3.2, 3.7, 3.3, 3.6, 3.4, 3.5] + [3.85, 3.2] + [3.1] * 6
    found = replays(ReplayScheduler(quantile=0.75, spacing=3), losses)
    assert [batch for each in found for batch in each] == [10]
    assert found[13] == [10]


def test_nothing_is_hard_before_ten_losses():
    rule = ReplayScheduler(quantile=0.5)
    feed(rule, [3.0] * 9 + [9.0])
    assert not rule.held()


def test_the_hardest_of_those_that_are_due_comes_first_and_the_easiest_is_let_go():
    rule = ReplayScheduler(quantile=0.0, spacing=4, buffer_size=2)
    for batch, loss in enumerate([3.0, 5.0, 4.0]):
        rule.observe(Outcome(seen(loss, batch), 1, (loss,)))
    assert sorted(rule.held()) == [1, 2]
    assert list(rule.replay(seen(3.0, 9))) == [1]


def test_a_skipped_batch_is_not_held_and_what_was_replayed_is_let_go():
    rule = ReplayScheduler(quantile=0.0)
    rule.observe(Outcome(seen(3.0, 0), 1, (3.0,)))
    rule.observe(Outcome(seen(9.0, 1), 0, (9.0,)))
    assert rule.held() == [0]
    rule.observe(Outcome(seen(9.0, 8), 0, (9.0,), "", ((0, float("nan")),)))
    assert rule.held() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 1.0}, "`quantile` must be at least 0 and below 1, got 1.0"),
        ({"spacing": 0}, "`spacing` must be at least 1, got 0"),
        ({"buffer_size": 0}, "`buffer_size` must be at least 1, got 0"),
        ({"window": 3}, "`window` must be at least 10, got 3"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ReplayScheduler(**options)
