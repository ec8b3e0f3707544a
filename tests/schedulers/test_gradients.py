"""Skipping batches whose gradient stands out."""

from __future__ import annotations

import math

import pytest

from abr_trainer.schedulers import ConstantScheduler, GradNormSkip, Outcome
from tests.schedulers.streams import seen

E_AND_ITS_SQUARE = [math.e, math.e**3]  # logarithms 1 and 3: median 2, deviation 1


def shown(norms, **options):
    rule = GradNormSkip(ConstantScheduler(2), **options)
    for batch, norm in enumerate(norms):
        tell(rule, norm, batch)
    return rule


def tell(rule, norm, batch=0):
    observation = seen(3.0, batch, grad_norm=norm)
    repeats = rule.decide(observation)
    rule.observe(Outcome(observation, repeats, (3.0,) * max(1, repeats)))
    return repeats


def test_a_norm_far_above_the_recent_ones_is_skipped():
    # The line is exp(2 + 3 * 1.4826) = exp(6.4478) = 631.3.
    rule = shown(E_AND_ITS_SQUARE * 10, sigmas=3.0)
    assert rule.limit() == pytest.approx(631.3, abs=0.1)
    assert rule.decide(seen(3.0, grad_norm=631.0)) == 2
    assert rule.decide(seen(3.0, grad_norm=632.0)) == 0
    assert rule.explain(seen(3.0, grad_norm=632.0)) == "gradient"


def test_before_the_backward_it_leaves_the_batch_to_the_rule_inside():
    rule = shown(E_AND_ITS_SQUARE * 10)
    assert rule.decide(seen(3.0)) == 2
    rule.observe(Outcome(seen(99.0, 20), 0, (99.0,)))  # skipped by its loss, its gradient was never seen
    assert len(rule.history) == 20


def test_nothing_is_skipped_before_twenty_norms():
    assert shown(E_AND_ITS_SQUARE * 9).decide(seen(3.0, grad_norm=1e9)) == 2


def test_norms_that_agree_do_not_make_the_next_one_an_outlier():
    # The spread of the logarithm is taken as 0.1: exp(6 * 0.1) = 1.82 times as large.
    rule = shown([1.0] * 20)
    assert rule.decide(seen(3.0, grad_norm=1.8)) == 2
    assert rule.decide(seen(3.0, grad_norm=1.9)) == 0


def test_one_in_four_may_be_broken():
    norms = [100.0 if batch % 4 == 3 else 1.0 + 0.1 * (batch % 3) for batch in range(100)]
    rule = GradNormSkip(ConstantScheduler())
    decisions = [tell(rule, norm, batch) for batch, norm in enumerate(norms)]
    assert all((repeats == 0) == (norm == 100.0) for repeats, norm in list(zip(decisions, norms, strict=True))[20:])


def test_gradients_that_have_changed_are_learnt_after_the_patience_is_spent():
    rule = shown([1.0, 1.1] * 20, patience=5)
    assert [tell(rule, 50.0) for _ in range(30)] == [0] * 5 + [2] * 25


@pytest.mark.parametrize("norm", [math.inf, math.nan, 0.0])
def test_a_norm_that_has_no_logarithm_enters_no_history(norm):
    rule = shown([1.0] * 20)
    rule.observe(Outcome(seen(3.0, 20, grad_norm=norm), 0, (3.0,)))
    assert len(rule.history) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": 0.0}, "`skip_grad_norm` must be positive, got 0.0"),
        ({"window": 5}, "`window` must be at least 20, got 5"),
        ({"patience": 0}, "`patience` must be at least 1, got 0"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GradNormSkip(ConstantScheduler(), **options)
