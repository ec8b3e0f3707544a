"""No repeats at the end of a run."""

from __future__ import annotations

from abr_trainer.schedulers import (
    ConstantScheduler,
    EasySkip,
    Outcome,
    RepeatUntil,
    ReplayScheduler,
    ThresholdScheduler,
)
from tests.schedulers.streams import feed, seen


def test_repeats_end_where_the_tail_begins():
    rule = RepeatUntil(ThresholdScheduler(), until=0.5)
    assert [rule.decide(seen(3.2, progress=progress)) for progress in (0.0, 0.49, 0.5, 0.9)] == [3, 3, 1, 1]
    assert rule.explain(seen(3.2, progress=0.4)) == "threshold"
    assert rule.explain(seen(3.2, progress=0.6)) == "tail"
    assert rule.explain(seen(0.2, progress=0.6)) == "threshold", "it would have been trained on once anyway"


def test_what_is_skipped_stays_skipped_and_nothing_is_replayed():
    easy = RepeatUntil(EasySkip(quantile=0.5, window=10), until=0.5)
    feed(easy, [3.0] * 10)
    assert easy.decide(seen(1.0, 10, progress=0.9)) == 0
    later = RepeatUntil(ReplayScheduler(quantile=0.0, spacing=1), until=0.5)
    later.observe(Outcome(seen(3.0, 0), 1, (3.0,)))
    assert list(later.replay(seen(3.0, 1, progress=0.4))) == [0]
    assert list(later.replay(seen(3.0, 1, progress=0.5))) == []


def test_the_rule_inside_goes_on_learning():
    rule = RepeatUntil(ThresholdScheduler("q0.8"), until=0.0)
    feed(rule, [3.0] * 12)
    assert len(rule.inner.history) == 12
    assert RepeatUntil(ConstantScheduler(2)).decide(seen(1.0, progress=0.84)) == 2
