"""The rule for generated batches, on numbers alone."""

from __future__ import annotations

import math

import pytest

from abr_trainer.schedulers import BatchTimes, KLScheduler, Observation, Outcome, PolicyDrift
from abr_trainer.schedulers.base import NO_ADVANTAGE


def seen(batch=0, advantage=0.5, times=None):
    return Observation(batch, 0.0, 0.0, advantage=advantage, times=times)


def drifts(*kls):
    return tuple(PolicyDrift(kl, 0.0, 1.0) for kl in kls)


def finished(*kls, batch=0, reason="kl", times=None):
    return Outcome(seen(batch, times=times), len(kls), (0.0,) * len(kls), reason, drifts=drifts(*kls))


def test_another_pass_is_made_up_to_the_limit():
    rule = KLScheduler(kl_limit=0.02)
    assert rule.decide(seen()) == 4
    assert rule.may_repeat(seen(), drifts(0.0))
    assert rule.may_repeat(seen(), drifts(0.0, 0.02))
    assert not rule.may_repeat(seen(), drifts(0.0, 0.02, 0.021))


@pytest.mark.parametrize(("kl", "is_used"), [(0.19, True), (0.21, False), (math.inf, False), (math.nan, False)])
def test_a_pass_beyond_ten_limits_makes_no_update(kl, is_used):
    assert KLScheduler(kl_limit=0.02).may_update(seen(), drifts(0.0, kl)) is is_used


def test_rows_without_an_advantage_are_skipped_and_unknown_ones_are_not():
    rule = KLScheduler()
    assert rule.decide(seen(advantage=0.0)) == 0
    assert rule.explain(seen(advantage=0.0)) == NO_ADVANTAGE
    assert rule.decide(seen(advantage=None)) == 4


def test_a_policy_that_always_explodes_is_tried_once_in_ten_batches():
    rule = KLScheduler(kl_limit=0.02)
    rule.observe(finished(0.0, 1.0))
    assert [rule.decide(seen(batch)) for batch in range(11)] == [4, *[1] * 9, 4]
    for _ in range(9):  # 0.8^8 x 1.0 = 0.168 is below ten limits
        rule.observe(finished(0.0, 0.0))
    assert rule.decide(seen(1)) == 4


def test_what_is_not_a_number_is_not_remembered():
    rule = KLScheduler()
    rule.observe(finished(0.0, math.nan))
    rule.observe(finished(0.0))
    assert rule.state_dict() == {"second": None, "share": None}


def test_cheap_rows_are_not_repeated():
    rule = KLScheduler(least_share=0.5)
    assert rule.wants == {"policy", "times"}
    assert rule.decide(seen()) == 1, "nothing is known yet"
    rule.observe(finished(0.0, times=BatchTimes(0.0, 3.0, 0.0, 1.0)))
    assert rule.share == 0.75
    assert rule.decide(seen()) == 4
    for _ in range(20):  # towards 1 / (1 + 3) = 0.25
        rule.observe(finished(0.0, times=BatchTimes(0.0, 1.0, 0.0, 3.0)))
    assert rule.decide(seen()) == 1
    assert rule.explain(seen()) == "cheap"
    assert "kl repeated none of 1 batch: generating took 31% of the time" in rule.remark([finished(0.0)])


def test_the_state_survives_json_and_a_clock_is_not_asked_for_in_vain():
    rule, other = KLScheduler(), KLScheduler()
    assert rule.wants == {"policy"}
    rule.observe(finished(0.0, 0.3))
    other.load_state_dict(rule.state_dict())
    assert other == rule


def test_a_rule_that_did_nothing_says_why():
    rule = KLScheduler(kl_limit=0.01)
    rule.observe(finished(0.0, 0.5))
    said = rule.remark([finished(0.0, reason="off policy")])
    assert "one update moved the policy too far (0.5 nats at the second pass)" in said
    assert '{"kl_limit": 0.02}' in said
    nothing = Outcome(seen(advantage=0.0), 0, (0.0,), NO_ADVANTAGE, drifts=drifts(0.0))
    assert "skipped 3 of 3 batches, because all rewards" in rule.remark([nothing] * 3)
    assert rule.remark([finished(0.0, 0.001)]) is None


@pytest.mark.parametrize(
    "parameters", [{"kl_limit": 0}, {"kl_limit": math.inf}, {"least_share": 1}, {"max_repeats": 0}]
)
def test_parameters_out_of_range_are_refused(parameters):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        KLScheduler(**parameters)
