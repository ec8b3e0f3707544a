"""Rules that go through `run.json`."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from abr_trainer.schedulers import (
    SCHEDULERS,
    ConstantScheduler,
    GradNormSkip,
    RepeatScheduler,
    RepeatUntil,
    RobustOutlierSkip,
    RobustRows,
    ThresholdScheduler,
    get_repeat_scheduler,
)
from abr_trainer.schedulers.recorded import name_of_rule, record_of, row_rule_of_run, rule_of_run
from tests.conftest import Capped, Counting, Scripted
from tests.schedulers.streams import batch_of_trace, feed, rule_named, trace_in

NOISE = [3.0 + 0.1 * (7 * i % 5) for i in range(30)]


def through_json(rule: Any, name: str = "repeat_scheduler") -> dict[str, Any]:
    """What `run.json` says of a rule that a trainer was given; its arguments say another one."""
    record = {"arguments": {"repeat_scheduler": "fixed"}, "instances": {name: record_of(rule)}}
    read: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
    return read


@pytest.mark.parametrize(
    "rule",
    [
        *(get_repeat_scheduler(name) for name in sorted(SCHEDULERS) if name != "follow"),
        ThresholdScheduler("q0.7", max_repeats=3),
        RobustOutlierSkip(RepeatUntil(GradNormSkip(ThresholdScheduler(0.5), sigmas=5.0), until=0.5), low=0.2),
        Capped(max_repeats=3),
        Counting(),
    ],
    ids=repr,
)
def test_a_rule_is_made_again_as_it_was(rule):
    again = rule_of_run(through_json(rule))
    assert type(again) is type(rule)
    assert repr(again) == repr(rule)
    assert again.state_dict() == rule.state_dict()
    assert feed(again, NOISE) == feed(rule, NOISE)


def test_a_rule_that_follows_is_made_again_as_long_as_its_trace_is_the_same(tmp_path):
    rule = rule_named("follow", tmp_path)
    feed(rule, NOISE)
    record = through_json(rule)
    assert rule_of_run(record) == rule
    trace_in(tmp_path / "followed", (batch_of_trace(step, repeats=2) for step in range(1, 201)))
    with pytest.raises(ValueError, match="has changed: its first 30 batches are not those that this run has followed"):
        rule_of_run(record)


def test_a_rule_that_has_seen_batches_before_the_run_still_has():
    warm = RobustOutlierSkip(ThresholdScheduler("q0.8"))
    feed(warm, NOISE)
    again = rule_of_run(through_json(warm))
    assert again.inner.history == warm.inner.history
    assert again.history == warm.history


def test_a_row_rule_is_made_again_and_none_stays_none():
    rule = RobustRows(sigmas=3.5, window=64)
    assert repr(row_rule_of_run(through_json(rule, "row_rule"))) == repr(rule)
    assert row_rule_of_run(through_json(ConstantScheduler())) is None


def test_without_an_instance_the_arguments_tell():
    of_a_command = {"arguments": {"repeat_scheduler": "abr", "loss_threshold": 2.0, "skip_outliers": "none"}}
    assert rule_of_run(of_a_command) == ThresholdScheduler(2.0)
    assert name_of_rule(of_a_command) == repr(ThresholdScheduler(2.0))
    assert name_of_rule({"arguments": {"repeat_scheduler": "gone.module:Mine"}}) == "gone.module:Mine"


@dataclass
class OfAFunction(RepeatScheduler):
    """A rule with a parameter that is not JSON."""

    chosen: Any = field(default=max)

    def decide(self, observation):
        return self.chosen(1, 2)


@dataclass
class Renamed(RepeatScheduler):
    repeats: int = 1

    def decide(self, observation):
        return self.repeats


def test_what_cannot_be_made_again_says_why(monkeypatch):
    def why(rule, blamed=None):
        with pytest.raises(ValueError, match=re.escape(repr(blamed or rule))) as caught:
            rule_of_run(through_json(rule))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "its class is no dataclass with JSON parameters" in why(Scripted(1, 2))
    assert "its class is no dataclass with JSON parameters" in why(OfAFunction())
    assert "its class is no dataclass with JSON parameters" in why(Renamed(math.inf))
    assert "its class is no dataclass with JSON parameters" in why(RobustOutlierSkip(Scripted(1)), Scripted())
    record = through_json(Renamed(2))
    monkeypatch.setattr(Renamed, "__module__", "__main__")
    assert "its class stands in a script or a notebook, not in a module" in why(Renamed(2))
    monkeypatch.setattr(Renamed, "__repr__", lambda rule: f"Renamed(times={rule.repeats})")
    with pytest.raises(ValueError, match=r"test_recorded:Renamed has changed, and now makes Renamed\(times=2\)"):
        rule_of_run(record)
    record["instances"]["repeat_scheduler"]["class"] = "gone.module:Mine"
    with pytest.raises(ValueError, match="Cannot import repeat scheduler 'gone.module:Mine'"):
        rule_of_run(record)
    assert name_of_rule(record) == "Renamed(repeats=2)"
