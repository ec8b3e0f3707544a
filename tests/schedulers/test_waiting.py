"""Repeating while the next batch is not there."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable

import pytest

from abr_trainer.schedulers import BatchTimes, Observation, Outcome, RepeatUntil, WaitScheduler
from tests.schedulers.streams import seen

PASS = 1.0


class Loader:
    """A loader that makes a batch every `period` seconds: in a worker, at most `queue` ahead, or when it is asked.

    With `burst`, it delivers so many batches at once. Times have a relative deviation of `noise`.
    """

    def __init__(
        self,
        period: float | Callable[[int], float],
        works_on: bool = True,
        noise: float = 0.0,
        burst: int = 1,
    ) -> None:
        self.period = period if callable(period) else lambda batch: period
        self.works_on, self.noise, self.burst = works_on, noise, burst
        self.queue = 2 * burst
        self.now = self._made_at = 0.0
        self._taken_at: list[float] = []
        self._draw = random.Random(0)

    def noisy(self, seconds: float) -> float:
        return seconds * max(0.05, self._draw.gauss(1, self.noise))

    def next(self, batch: int) -> tuple[float, float]:
        """Return the seconds of waiting for a batch, and those that the worker had before."""
        start = self.now
        if not self.works_on:
            self.now += self.noisy(self.period(batch))
            return self.now - start, 0.0
        if batch % self.burst == 0:
            has_room = self._taken_at[batch - self.queue] if batch >= self.queue else 0.0
            self._made_at = max(self._made_at, has_room) + self.burst * self.noisy(self.period(batch))
        self.now = max(self.now, self._made_at)
        working = start - self._taken_at[-1] if self._taken_at else 0.0
        self._taken_at.append(self.now)
        return self.now - start, working


def trained(rule: WaitScheduler, loader: Loader, batches: int = 200) -> list[int]:
    """Train with passes of a second, and return the repeats of each batch."""
    repeats: list[int] = []
    one_pass = None
    for batch in range(batches):
        waiting, working = loader.next(batch)
        observation = seen(3.0, batch, times=BatchTimes(waiting, 0.0, working, one_pass))
        decided = rule.decide(observation)
        spent = sum(loader.noisy(PASS) for _ in range(decided))
        loader.now += spent
        one_pass = spent / decided
        rule.observe(Outcome(observation, decided, (3.0,) * decided, rule.explain(observation)))
        repeats.append(decided)
    return repeats


def told(rule: WaitScheduler, *batches: tuple[float, float, int]) -> WaitScheduler:
    """Tell a rule of batches: their wait, what workers had before, and the passes made; a pass takes a second.

    The first batch of a run is told first: nothing is known of a pass yet.
    """
    for batch, (waiting, working, passes) in enumerate([(9.0, 0.0, 1), *batches]):
        times = BatchTimes(waiting, 0.0, working, None if batch == 0 else PASS)
        rule.observe(Outcome(seen(3.0, batch, times=times), passes, (3.0,) * passes))
    return rule


# ---- Arithmetic ----


@pytest.mark.parametrize(
    ("wait", "repeats"), [(0.0, 1), (0.9, 1), (1.0, 2), (1.9, 2), (2.0, 3), (3.5, 4), (4.0, 5), (99.0, 5)]
)
def test_a_batch_gets_a_pass_more_for_each_that_fits_into_the_wait(wait, repeats):
    assert told(WaitScheduler(), *[(wait, 0.0, 1)] * 6).decide(seen(3.0)) == repeats


def test_five_batches_must_be_measured_first():
    assert told(WaitScheduler(), *[(9.0, 0.0, 1)] * 4).decide(seen(3.0)) == 1
    assert told(WaitScheduler(), *[(9.0, 0.0, 1)] * 5).decide(seen(3.0)) == 5


def test_what_repeats_hide_is_added_where_workers_go_on():
    # It waited 0.5 s after 3 passes of a second, so it would have waited 2.5 s after one: 1 + floor(2.5) = 3.
    rule = told(WaitScheduler(), (0.0, 1.0, 3), *[(0.5, 3.0, 3)] * 10)
    rule.history.popleft()
    assert rule.wait_after_one_pass() == pytest.approx(2.5)
    assert rule.decide(seen(3.0)) == 3


def test_without_workers_nothing_is_hidden():
    rule = told(WaitScheduler(), *[(1.5, 0.0, 2)] * 10)
    assert rule.wait_after_one_pass() == pytest.approx(1.5)
    assert rule.decide(seen(3.0)) == 2


def test_a_pass_less_is_tried_where_the_loader_keeps_up():
    # 4 passes a batch and no wait: the loader takes 4 s or less. Whether it takes more than 3, only 3 passes show.
    rule = told(WaitScheduler(window=5), (0.0, 1.0, 4), *[(0.0, 4.0, 4)] * 5)
    assert rule.decide(seen(3.0)) == 3
    # With 3 it waits: 6 batches came after 4 s of passes, 5 after 3 s of passes and 1 s of waiting. Each took 4 s.
    rule = told(WaitScheduler(), (0.0, 1.0, 4), *[(0.0, 4.0, 4)] * 5, (0.0, 4.0, 3), *[(1.0, 3.0, 3)] * 5)
    rule.history.popleft()
    assert rule.wait_after_one_pass() == pytest.approx(3.0)
    assert rule.decide(seen(3.0)) == 4


def test_the_longest_wait_counts_as_the_next_longest():
    rule = told(WaitScheduler(), *[(0.1, 0.0, 1)] * 9, (60.0, 0.0, 1))
    assert rule.mean_wait() == pytest.approx(0.1)
    rule = told(WaitScheduler(), *[(0.0, 0.0, 1)] * 8, (6.0, 0.0, 1), (60.0, 0.0, 1))  # two in ten are no accident
    assert rule.mean_wait() == pytest.approx((6.0 + 6.0) / 10)


def test_a_skipped_batch_tells_nothing_of_a_pass():
    rule = told(WaitScheduler(), *[(0.0, 0.0, 1)] * 6, (0.0, 0.0, 0))
    before = len(rule.history)
    rule.observe(Outcome(seen(3.0, 8, times=BatchTimes(5.0, 0.0, 0.0, 0.3)), 1, (3.0,)))
    assert len(rule.history) == before
    assert rule.pass_seconds() == PASS


def test_passes_that_take_no_time_at_all_do_no_harm():
    rule = WaitScheduler()
    for batch in range(10):
        rule.observe(Outcome(seen(3.0, batch, times=BatchTimes(0.0, 0.0, 0.0, 0.0)), 1, (3.0,)))
    assert rule.decide(seen(3.0)) == 1


# ---- A loader ----


@pytest.mark.parametrize(("period", "repeats"), [(0.0, 1), (0.5, 1), (0.95, 1), (1, 1), (2.5, 2), (3.7, 3), (9, 5)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_with_a_worker_the_passes_fill_the_time_that_a_batch_takes(period, repeats, noise):
    made = trained(WaitScheduler(), Loader(period, noise=noise))
    assert set(made[20:]) == {repeats}


@pytest.mark.parametrize("period", [2, 3, 5])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_a_time_of_whole_passes_gets_as_many_or_one_less(period, noise):
    made = trained(WaitScheduler(), Loader(period, noise=noise))
    assert set(made[20:]) <= {period - 1, period}
    assert noise or Counter(made[20:])[period] > 120


@pytest.mark.parametrize(
    ("period", "repeats"), [(0.0, 1), (0.5, 1), (1, 2), (2.5, 3), (3.7, 4), (5, 5)]
)  # 1 + floor(period)
def test_without_a_worker_a_pass_more_is_made_for_each_that_fits(period, repeats):
    assert set(trained(WaitScheduler(), Loader(period, works_on=False))[10:]) == {repeats}


@pytest.mark.parametrize("period", [1.3, 2.0, 2.5, 5.0])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_with_a_worker_repeats_cost_hardly_any_fresh_batch(period, noise):
    loader, plain = Loader(period, noise=noise), Loader(period, noise=noise)
    trained(WaitScheduler(), loader)
    trained(WaitScheduler(max_repeats=1), plain)
    assert loader.now < 1.05 * plain.now


@pytest.mark.parametrize("works_on", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_a_fast_loader_is_never_repeated_for(works_on, noise):
    assert set(trained(WaitScheduler(), Loader(0.3, works_on, noise=noise), batches=2000)) == {1}


@pytest.mark.parametrize("works_on", [True, False])
def test_neither_the_start_of_epochs_nor_hiccups_cause_repeats(works_on):
    loader = Loader(lambda batch: 15.0 if batch % 25 == 0 else 0.1, works_on)
    assert set(trained(WaitScheduler(), loader)) == {1}


@pytest.mark.parametrize("burst", [2, 4, 6, 8])
def test_batches_that_come_several_at_once_count_by_their_mean(burst):
    """As from as many workers that began at the same time: the first of them is waited for, the others are there."""
    assert set(trained(WaitScheduler(), Loader(2.5, burst=burst))[50:]) == {2}


def test_it_follows_a_loader_that_becomes_slower_or_faster():
    made = trained(WaitScheduler(), Loader(lambda batch: 3.5 if 100 <= batch < 200 else 0.2), batches=400)
    assert set(made[:100]) == {1}
    assert set(made[125:200]) == {3}
    assert set(made[260:]) == {1}


# ---- A rule like others ----


def test_it_goes_on_from_its_state_as_if_nothing_had_happened():
    rule, loader = WaitScheduler(), Loader(2.5, noise=0.1)
    trained(rule, loader, batches=30)
    again = WaitScheduler()
    again.load_state_dict(json.loads(json.dumps(rule.state_dict(), allow_nan=False)))
    assert again == rule
    assert again.decide(seen(3.0)) == rule.decide(seen(3.0)) == 2


def test_it_ends_where_repeats_shall_end():
    rule = RepeatUntil(told(WaitScheduler(), *[(3.5, 0.0, 1)] * 6), until=0.8)
    assert [rule.decide(Observation(9, 3.0, progress)) for progress in (0.79, 0.8)] == [4, 1]
    assert "times" in rule.wants


def test_it_names_what_it_goes_by():
    rule = WaitScheduler()
    assert rule.explain(seen(3.0)) == "unmeasured"
    told(rule, *[(2.5, 0.0, 1)] * 6)
    assert rule.explain(seen(3.0)) == "waiting"
    assert rule.evidence(seen(3.0)) == {
        "batches remembered": 6,
        "mean wait": 2.5,
        "wait after one pass": 2.5,
        "a pass takes": 1.0,
        "max_repeats": 5,
    }
    assert told(WaitScheduler(), *[(0.5, 0.0, 1)] * 6).explain(seen(3.0)) == "ready"


def outcomes_of(rule: WaitScheduler, wait: float, batches: int = 40) -> list[Outcome]:
    outcomes = []
    for batch in range(batches):
        observation = seen(3.0, batch, times=BatchTimes(wait, 0.0, 0.0, PASS if batch else None))
        repeats = rule.decide(observation)
        outcomes.append(Outcome(observation, repeats, (3.0,) * repeats, rule.explain(observation)))
        rule.observe(outcomes[-1])
    return outcomes


@pytest.mark.parametrize(
    ("rule", "wait", "batches", "said"),
    [
        (
            WaitScheduler(),
            0.01,
            40,
            "wait repeated none of 40 batches: the next batch was always there. Waiting took 1.0% of the time. base"
            "line costs less.",
        ),
        (WaitScheduler(), 0.5, 40, "a batch waited less than a pass takes. Waiting took 33.9% of the time. baseline"),
        (
            WaitScheduler(),
            9.0,
            5,
            "wait repeated none of 5 batches: it first has to see 6 batches, and the run had no",
        ),
        (WaitScheduler(max_repeats=1), 9.0, 40, "wait cannot repeat any batch, because --max_repeats is 1. Raise it."),
        (
            WaitScheduler(max_repeats=2),
            9.0,
            90,
            "wait made 2 updates on each of 84 of 90 batches, as many as --max_repeats allows: the wait for a batch "
            "is as long as 9 passes. More workers or a faster source bring more than repeats.",
        ),
    ],
)
def test_it_says_why_it_did_nothing_or_the_most(rule, wait, batches, said):
    line = rule.remark(outcomes_of(rule, wait, batches))
    assert line is not None
    assert said in line
    assert "\n" not in line


def test_it_says_nothing_where_it_did_its_work():
    rule = WaitScheduler()
    assert rule.remark(outcomes_of(rule, 2.5, 90)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_repeats": 0}, "`max_repeats` must be at least 1, got 0"), ({"window": 4}, "`window` must be at least 5")],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        WaitScheduler(**options)
