"""What rules say at the end of a run in which they did nothing, or always the same."""

from __future__ import annotations

import random

import pytest

from abr_trainer.schedulers import (
    SCHEDULERS,
    ConstantScheduler,
    EasySkip,
    GainScheduler,
    GradNormSkip,
    LearnableScheduler,
    RepeatUntil,
    ReplayScheduler,
    RobustOutlierSkip,
    ThresholdScheduler,
    UniformScheduler,
    WindowScheduler,
)
from tests.conftest import Capped, Counting
from tests.schedulers.streams import played, rule_named


def noisy(level: float, count: int, spread: float = 0.1) -> list[float]:
    """Losses that fall a little, and scatter."""
    draw = random.Random(0)
    return [level - 0.002 * batch + spread * draw.uniform(-1, 1) for batch in range(count)]


def remark(rule, losses, **seen_too):
    return rule.remark(played(rule, losses, **seen_too))


@pytest.mark.parametrize(
    ("rule", "losses", "said"),
    [
        (
            ThresholdScheduler(1.0),
            [*noisy(2.5, 97), 3.1, 3.2, 3.3],
            "abr made 2 updates on each of 97 of 100 batches: nearly every loss is 2 to 3 times --loss_threshold 1 "
            "(the median is 2.42). --loss_threshold q0.8 repeats the highest fifth of the recent losses instead, at a",
        ),
        (
            ThresholdScheduler(5.0),
            noisy(3.2, 40),
            "abr made 1 update on each of 40 batches: it repeats from twice --loss_threshold 5 on, a loss of 10, and "
            "the median is 3.18. --loss",
        ),
        (
            ThresholdScheduler(0.5),
            noisy(3.2, 40),
            "abr made 5 updates on each of 40 batches: nearly every loss is 5 times --loss_threshold 0.5 or more (the "
            "median is 3.18), and --max_repeats is 5. --loss_threshold q0.8",
        ),
        (ThresholdScheduler("q0.8", max_repeats=1), [2.0], "abr cannot repeat any batch, because --max_repeats is 1."),
        (
            ThresholdScheduler("q0.8"),
            noisy(3.0, 10),
            "abr repeated none of 10 batches: q0.8 compares a loss with 10 earlier ones, and the run had no more. Tra",
        ),
        (ThresholdScheduler("q0.95"), noisy(3.0, 19), "none of 19 batches: q0.95 compares a loss with 19 earlier one"),
        (
            ThresholdScheduler("q0.99"),
            noisy(3.0, 60),
            "abr repeated none of 60 batches: q0.99 asks for the highest of 100 losses, and it remembers 25. Choose a "
            "lower quantile, or --repeat_scheduler_kwargs '{\"window\": 99}'.",
        ),
        (ThresholdScheduler("s9"), noisy(3.0, 60), "no loss was 9 robust standard deviations above their median. A l"),
        (
            ThresholdScheduler("q0.8"),
            [*noisy(3.0, 10), 2.0, 2.1],
            "none of 12 batches: after the first 10 no loss was among the highest 20% of the recent ones. A lower",
        ),
        (UniformScheduler(max_repeats=1), [2.0], "random cannot repeat any batch, because --max_repeats is 1. Raise "),
        (WindowScheduler(), noisy(3.0, 5), "window repeated none of 5 batches: it first has to see 5 batches, and th"),
        (WindowScheduler(), [3.0 - 0.001 * i for i in range(40)], "window made 1 update on each of 40 batches: trend"),
        (
            WindowScheduler(published=True),
            [1.5 + 0.5 * (i % 2) for i in range(200)],
            "window made 2 updates on each of 19",
        ),
        (GainScheduler(), noisy(3.0, 9), "gain repeated none of 9 batches: it first has to see 10 batches, and the r"),
        (
            GainScheduler(),
            [[4.0 - 0.02 * i, 3.9 - 0.02 * i] for i in range(60)],
            "a second pass improved its batch by 0.1 nats, of which `transfer` = 0.1 counts, and a fresh batch brings "
            "0.02 nats. baseline costs less; a higher `transfer` repeats more.",
        ),
        (
            GainScheduler(max_repeats=2),
            [[4.0 - 0.001 * i, 3.0 - 0.001 * i] for i in range(200)],
            "gain made 2 updates on each of 184 of 200 batches: a second pass improved its batch by 1 nats",
        ),
        (ReplayScheduler(), noisy(3.0, 8), "replay came back to none of 8 batches: no batch is hard before it has se"),
        (ReplayScheduler(spacing=50), noisy(3.0, 40), "the run ended before the first hard one was due, `spacing` = "),
        (ReplayScheduler(), [3.0] * 10 + [2.0, 1.9, 1.8], "of 13 batches: no loss lay above 75% of the last 50. A lo"),
        (LearnableScheduler(), noisy(3.0, 60), "its warm-up takes 100 batches, and the run had 60. Until then it is "),
        (LearnableScheduler(warmup=10), noisy(3.0, 60), "its warm-up takes 96 batches, and the run had 60."),
        (EasySkip(), noisy(3.0, 30), "easy skipped none of 30 batches: it first has to see 30 losses, and the run ha"),
        (
            EasySkip(window=10),
            [3.0] * 10 + [3.1, 3.2, 3.3],
            "easy skipped none of 13 batches: no loss was among the lowest 20% of the last 10. A higher `quantile` "
            "skips more: --repeat_scheduler_kwargs '{\"quantile\": 0.4}'.",
        ),
        (Capped(2), noisy(3.0, 12), "Capped made 2 updates on each of 12 batches. `abr why` shows what it weighed."),
        (
            GradNormSkip(ConstantScheduler()),
            noisy(3.0, 12),
            "--skip_grad_norm judged none of 12 batches: it first has to see 20 gradient norms. Train on more batches",
        ),
        (RepeatUntil(ThresholdScheduler(), until=0), [2.0], "--repeat_until 0 leaves no part of the run in which a b"),
    ],
)  # fmt: skip
def test_a_rule_that_did_nothing_or_always_the_same_says_so(rule, losses, said):
    line = remark(rule, losses)
    assert line is not None
    assert said in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("rule", "losses"),
    [
        (ThresholdScheduler("q0.8"), noisy(3.0, 100)),
        (ThresholdScheduler("q0.95"), noisy(3.0, 200)),
        (ThresholdScheduler(1.0), noisy(3.0, 100, spread=1.0)),
        (ThresholdScheduler(1.0), noisy(2.5, 9)),
        (WindowScheduler(), noisy(3.0, 100, spread=0.3)),
        (ReplayScheduler(), noisy(3.0, 100)),
        (EasySkip(), noisy(3.0, 100)),
        (UniformScheduler(), noisy(3.0, 100)),
        (ConstantScheduler(2), noisy(3.0, 100)),
        (ConstantScheduler(), noisy(3.0, 100)),
        (Counting(), noisy(3.0, 100)),
        (Capped(2), noisy(3.0, 9)),
        (RepeatUntil(ThresholdScheduler("q0.8"), until=0.85), noisy(3.0, 100)),
        (RobustOutlierSkip(ConstantScheduler()), noisy(3.0, 100)),
    ],
)
def test_a_rule_that_did_its_work_says_nothing(rule, losses):
    assert remark(rule, losses) is None


def test_gain_says_that_the_model_knows_the_batches_already():
    said = remark(GainScheduler(), noisy(0.2, 40, 0.01), accuracy=0.97)
    assert said.startswith("gain did not repeat 40 of 40 batches, because the model predicts 90% of their tokens alr")


def test_learnable_tells_of_the_batches_after_its_warm_up():
    rule = LearnableScheduler(warmup=100, exploration=0.0)
    outcomes = played(rule, noisy(3.0, 160))
    after = [outcome.repeats for outcome in outcomes if outcome.reason == "learned"]
    assert set(after) == {1}, "it finds nothing in noise"
    assert rule.remark(outcomes).startswith(
        f"After its warm-up, learnable made 1 update on each of {len(after)} batches:"
    )


def test_a_rule_is_not_blamed_for_what_is_decided_around_it():
    """Of 40 batches three are outliers, which the rule did not see, and 20 come after the tail has begun."""
    losses = noisy(2.5, 40)
    losses[10] = losses[20] = losses[30] = 9.0
    rule = RobustOutlierSkip(RepeatUntil(ThresholdScheduler(1.0), until=0.5))
    head = played(rule, losses[:20], progress=0.2)
    tail = played(rule, losses[20:], first_batch=20, progress=0.6)
    assert sum(outcome.skipped for outcome in (*head, *tail)) == 3
    assert {outcome.repeats for outcome in tail} == {0, 1}
    assert rule.remark([*head, *tail]).startswith(
        "abr made 2 updates on each of 19 batches: nearly every loss is 2 to 3"
    )


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("count", [1, 12, 120])
def test_a_remark_is_one_line_and_changes_nothing(name, count, tmp_path):
    rule = rule_named(name, tmp_path)
    outcomes = played(rule, noisy(3.0, count))
    before = rule.state_dict()
    said = rule.remark(outcomes)
    assert said is None or ("\n" not in said and said.endswith("."))
    assert rule.state_dict() == before
