"""What every row rule promises, and what `RobustRows` drops."""

from __future__ import annotations

import copy
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable

import pytest

from abr_trainer.schedulers import ROW_RULES, RobustRows, Row, RowRule

Batch = list[tuple[float, int]]
"""Rows as loss and number of targets."""


def feed(rule: RowRule, batches: Iterable[Batch], first_batch: int = 0) -> list[list[bool]]:
    """Show batches to a rule as the trainer would, and return what it kept of each."""
    kept = []
    for index, batch in enumerate(batches, start=first_batch):
        rows = [Row(loss, targets, index, position) for position, (loss, targets) in enumerate(batch)]
        judge = rule.beside(rows)
        kept.append([judge.decide(row) for row in rows])
        rule.observe(rows, kept[-1])
    return kept


def normal(draw: random.Random, count: int, level: float = 3.0, spread: float = 0.3, targets: int = 127) -> Batch:
    return [(draw.gauss(level, spread), targets) for _ in range(count)]


def drops(kept: list[list[bool]]) -> int:
    return sum(not keep for batch in kept for keep in batch)


def stream() -> list[Batch]:
    """Return thirty batches of rows of many lengths, one in ten of them broken."""
    draw = random.Random(5)
    return [
        [
            (draw.gauss(3.0 + 2.0 / (1 + batch), 0.3) + 6.0 * (draw.random() < 0.1), draw.choice([1, 2, 7, 30, 127]))
            for _ in range(8)
        ]
        for batch in range(30)
    ]


# ---- Every rule ----


@pytest.fixture(params=sorted(ROW_RULES))
def rule(request):
    return ROW_RULES[request.param]()


def test_decisions_are_yes_or_no(rule):
    assert all(type(keep) is bool for batch in feed(rule, stream()) for keep in batch)


def test_deciding_and_giving_evidence_change_nothing(rule):
    for batches in ([], stream()):
        feed(rule, batches)
        before = copy.deepcopy(rule.state_dict())
        for row in (Row(99.0, 12, 50, 0), Row(0.1, 1, 50, 1), Row(3.0, 100_000, 50, 2)):
            assert rule.decide(row) is rule.decide(row)
            evidence = rule.evidence(row)
            assert evidence == rule.evidence(row)
            assert json.dumps(evidence, allow_nan=False)
        beside = rule.beside([Row(2.0, 30, 50, i) for i in range(40)])
        assert type(beside.decide(Row(2.0, 30, 50, 0))) is bool
        assert rule.state_dict() == before


@pytest.mark.parametrize("finished", [0, 1, 2, 3, 5, 17, 30])
def test_a_rule_restored_from_json_goes_on_as_if_nothing_had_happened(rule, finished):
    expected = feed(rule, stream() * 2)[finished:]
    first, second = type(rule)(), type(rule)()
    feed(first, stream()[:finished])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.state_dict() == first.state_dict()
    assert feed(second, (stream() * 2)[finished:], first_batch=finished) == expected


def test_the_limit_in_the_evidence_is_the_loss_above_which_a_row_is_dropped(rule):
    feed(rule, stream())
    for targets in (1, 3, 50, 4000):
        limit = rule.evidence(Row(3.0, targets, 30, 0))["limit"]
        assert rule.decide(Row(math.nextafter(limit, 0), targets, 30, 0))
        assert not rule.decide(Row(limit + 1e-9, targets, 30, 0))


def test_a_batch_without_rows_is_no_event(rule):
    feed(rule, stream())
    before = copy.deepcopy(rule.state_dict())
    rule.observe([], [])
    assert rule.state_dict() == before


def test_a_rule_names_its_parameters(rule):
    assert repr(rule).startswith(f"{type(rule).__name__}(")
    assert repr(RobustRows(sigmas=3.0, window=99)) == "RobustRows(sigmas=3.0, window=99, low=0.0)"


# ---- Robust: good rows are kept ----


def test_nothing_is_dropped_on_the_evidence_of_fewer_than_sixteen_rows():
    fifteen = [(3.0, 127)] * 14 + [(50.0, 127)]
    assert drops(feed(RobustRows(), [fifteen])) == 0
    assert drops(feed(RobustRows(), [fifteen[i : i + 1] for i in range(15)])) == 0
    assert drops(feed(RobustRows(), [[*fifteen, (3.0, 127)]])) == 1


def test_the_rows_of_the_first_micro_batch_judge_each_other():
    """The rows that are remembered are none; the broken ones are among the 64 that came together."""
    draw = random.Random(3)
    for size, broken in ((16, 2), (64, 7)):
        batch = [*normal(draw, size - broken, level=5.0, spread=0.6), *[(9.5, 127)] * broken]
        assert feed(RobustRows(), [batch]) == [[True] * (size - broken) + [False] * broken]
        rule = RobustRows()
        assert all(rule.decide(Row(9.5, 127, 0, i)) for i in range(broken)), "alone they show nothing"


def test_once_enough_rows_are_remembered_those_beside_a_row_no_longer_count():
    draw = random.Random(4)
    rule = RobustRows()
    assert rule.beside([Row(3.0, 127, 0, i) for i in range(15)]) is rule
    assert rule.beside([Row(3.0, 127, 0, i) for i in range(16)]) is not rule
    feed(rule, [normal(draw, 32) for _ in range(8)])
    assert rule.beside([Row(3.0, 127, 8, i) for i in range(64)]) is rule


def token_losses(draw: random.Random) -> float:
    """Losses of tokens as language models have them: half are easy, the others scatter far."""
    return draw.expovariate(1 / 0.6) if draw.random() < 0.5 else draw.gammavariate(2.0, 2.4)


LENGTHS = {
    "of all lengths": [1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64, 100, 128, 200],
    "of a chat": [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 60, 100, 200],
    "seldom short": [1, 2, 3, 4] + [100, 120, 140, 150] * 10,
    "seldom long": [1, 2, 3] * 10 + [100, 200],
    "of one target": [1],
    "of three": [3],
    "of blocks, one of them cut": [127] * 30 + [40],
}


@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize(("name", "slope"), [(name, slope) for name in LENGTHS for slope in (-0.3, 0.2)])
def test_good_rows_of_every_length_are_kept_from_the_start(name, slope, size):
    """Rows are means of n draws, plus what rows differ by, around a level that depends on n and falls in time."""
    draw = random.Random(f"{name} {slope} {size}")
    one_target: tuple[Callable[[random.Random], float], ...] = (token_losses, lambda draw: draw.expovariate(1 / 3))
    dropped, seen, early = Counter[int](), Counter[int](), 0
    for one in one_target:
        rule = RobustRows()
        for batch in range(1200 // size):
            fall = 1 + math.exp(-batch * size / 100)
            rows = []
            for position in range(size):
                targets = draw.choice(LENGTHS[name])
                mean = sum(one(draw) for _ in range(targets)) / targets
                level = 2.0 + slope * math.log2(targets)
                rows.append(Row((mean + draw.gauss(level, 0.25)) * fall, targets, batch, position))
            judge = rule.beside(rows)
            kept = [judge.decide(row) for row in rows]
            rule.observe(rows, kept)
            for row, keep in zip(rows, kept, strict=True):
                seen[row.targets] += 1
                dropped[row.targets] += not keep
                early += not keep and batch * size < 200
    assert sum(dropped.values()) <= 0.003 * sum(seen.values())
    assert all(dropped[targets] <= max(1, 0.005 * seen[targets]) for targets in seen), dropped
    assert early <= 2


def test_good_rows_are_kept_that_are_learnt_by_heart_or_come_back():
    """The level is a hundredth of a nat in the end, and falls at once where an epoch begins."""
    draw = random.Random(2)
    streams = {
        "fall": [
            [((0.01 + 2.5 * math.exp(-b / 5)) * draw.lognormvariate(0, 0.15), 50) for _ in range(8)]
            for b in range(100)
        ],
        "epochs": [
            [((1.2, 0.5, 0.2)[b // 40] * draw.lognormvariate(0, 0.2), 50) for _ in range(8)] for b in range(120)
        ],
        "nothing left": [[(abs(draw.gauss(0, 0.05)), 50) for _ in range(8)] for _ in range(100)],
    }
    for name, batches in streams.items():
        assert drops(feed(RobustRows(), batches)) <= 2, name


@pytest.mark.parametrize("minority", [0.02, 0.1, 0.3])
def test_a_rare_class_is_not_taken_for_dirt(minority):
    """A classifier that knows how rare a class is, and nothing else, loses -log(share) on its rows."""
    draw = random.Random(3)

    def loss() -> float:
        return -math.log(minority if draw.random() < minority else 1 - minority)

    assert drops(feed(RobustRows(), [[(loss(), 1) for _ in range(16)] for _ in range(100)])) == 0


@pytest.mark.parametrize("levels", [(2.0, 5.0, 8.0), (2.0, 2.0, 2.0, 5.0, 5.0)])
def test_nothing_is_dropped_while_fewer_than_two_thirds_of_the_rows_look_good(levels):
    """Rows of several sorts in turn: which of them is the good one, losses do not tell."""
    draw = random.Random(4)
    batches = [[(draw.gauss(levels[i % len(levels)], 0.1), 127) for i in range(15)] for _ in range(60)]
    assert drops(feed(RobustRows(), batches)) == 0


# ---- Robust: broken rows are dropped ----


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25])
@pytest.mark.parametrize("size", [4, 16, 64])
def test_broken_rows_are_dropped_and_good_ones_are_not(size, share):
    draw = random.Random(f"{size} {share}")
    count = 2400 // size
    broken = [[draw.random() < share for _ in range(size)] for _ in range(count)]
    batches = [
        [(draw.gauss(6.0 if bad else 3.0 + 2.0 * math.exp(-i * size / 50), 0.3), 127) for bad in flags]
        for i, flags in enumerate(broken)
    ]
    kept = feed(RobustRows(), batches)
    pairs = [pair for batch in zip(kept, broken, strict=True) for pair in zip(*batch, strict=True)][200:]
    caught = sum(bad and not keep for keep, bad in pairs)
    assert caught >= 0.98 * sum(bad for _, bad in pairs)
    assert sum(not bad and not keep for keep, bad in pairs) <= 0.003 * len(pairs)


def test_rows_of_one_length_are_judged_as_strictly_as_if_there_were_no_short_ones():
    """At 127 targets: 4.25 spreads of 0.3 above 3, and little more for what 256 rows leave unknown."""
    rule, draw = RobustRows(), random.Random(1)
    feed(rule, [[*normal(draw, 31), (8.0, 127)] for _ in range(20)])
    assert 4.1 < rule.evidence(Row(3.0, 127, 20, 0))["limit"] < 4.6


def test_where_hardly_a_row_stands_out_a_row_must_stand_out_by_more():
    """One and a half times as far: 6.4 spreads of 0.3 above 3. Two rows of the last 256 are enough to end that."""
    rule, draw = RobustRows(), random.Random(1)
    feed(rule, [normal(draw, 32) for _ in range(20)])
    odd = Row(4.8, 127, 20, 0)
    assert 4.85 < rule.evidence(odd)["limit"] < 5.4
    assert rule.decide(odd)
    feed(rule, [[*normal(draw, 31), (8.0, 127)] for _ in range(2)])
    rule.observe([Row(loss, 127, 23, i) for i, (loss, _) in enumerate(normal(draw, 32))], [True] * 32)
    assert not rule.decide(odd)


def test_short_rows_get_more_room_and_long_ones_none_of_it():
    draw = random.Random(6)
    batches = [
        [(sum(draw.expovariate(1 / 3) for _ in range(targets)) / targets, targets) for targets in (2, 8, 32, 128) * 4]
        for _ in range(30)
    ]
    rule = RobustRows()
    feed(rule, batches)
    limits = [rule.evidence(Row(3.0, targets, 30, 0))["limit"] for targets in (2, 8, 32, 128)]
    assert limits == sorted(limits, reverse=True)
    assert limits[0] > 12  # of means of two draws, 1 % lie above 10
    assert limits[-1] < 6  # of means of 128, one in a million above 4.4; half as far again in data this clean


def test_dirt_that_was_trained_on_at_the_start_does_not_hide_later_dirt():
    """A quarter of the first rows is broken. They came in twos, and none could be judged."""
    draw = random.Random(7)
    good = normal(draw, 12)
    rule = RobustRows()
    kept = feed(rule, [[(6.0 + draw.gauss(0, 0.2), 127), *good[i : i + 3]] for i in range(0, 12, 3)])
    assert drops(kept[:-1]) == 0
    limit = rule.evidence(Row(3.0, 127, 1, 0))["limit"]
    assert 3.9 < limit < 5.8


def test_rows_of_another_length_do_not_hide_dirt_that_has_it_alone():
    """Garbage that is longer than everything else, a row now and then, has no level of its own."""
    draw = random.Random(8)
    rule = RobustRows()
    kept = feed(rule, [[*normal(draw, 15), (9.0 + draw.gauss(0, 0.2), 2000)] for _ in range(40)])
    assert [batch[-1] for batch in kept] == [False] * 40


def test_a_new_level_is_taken_once_two_thirds_of_the_last_rows_have_it():
    """Of the last 64 rows, 43 are high after 11 batches of 4; at one row a batch, 10 of the last 15 are enough."""
    for size, batches in ((4, 11), (64, 1)):
        draw = random.Random(9)
        rule = RobustRows()
        feed(rule, [normal(draw, size) for _ in range(256 // size)])
        kept = feed(rule, [normal(draw, size, level=8.0) for _ in range(40)], first_batch=256 // size)
        dropped = [not any(batch) for batch in kept]
        assert dropped[0]
        assert sum(dropped) <= batches + 8  # the level is looked for every 32 rows
        assert drops(kept[batches + 8 :]) == 0


def test_a_level_that_rises_gradually_is_followed():
    draw = random.Random(10)
    assert drops(feed(RobustRows(), [normal(draw, 8, level=3.0 + 0.05 * batch) for batch in range(80)])) == 0


def test_low_rows_are_dropped_if_that_is_asked_for():
    draw = random.Random(11)
    batches = [normal(draw, 16) for _ in range(20)]
    plain, low = RobustRows(), RobustRows(low=0.5)
    feed(plain, batches)
    feed(low, batches)
    assert plain.decide(Row(0.1, 127, 20, 0))
    assert not low.decide(Row(0.1, 127, 20, 0))
    assert low.decide(Row(2.0, 127, 20, 0))
    assert 0.1 < low.evidence(Row(0.1, 127, 20, 0))["lowest"] < 1.5


def test_only_the_last_rows_are_remembered():
    rule = RobustRows(window=64)
    feed(rule, [normal(random.Random(12), 50) for _ in range(3)])
    assert len(rule.state_dict()["history"]) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": 0.0}, "`row_sigmas` must be positive, got 0.0"),
        ({"window": 63}, "`row_window` must be at least 64, got 63"),
        ({"low": 1.0}, "`low` must be at least 0 and below 1, got 1.0"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RobustRows(**options)


@pytest.mark.parametrize("size", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("level", [2.6, 4.0, 8.0])
def test_a_new_level_is_taken_before_a_run_of_skipped_batches_ends_it(size, level):
    generator, rule = random.Random(size), RobustRows()
    in_a_row = longest = 0
    for batch in range(300):
        mean = 2.0 if batch < 200 else level
        rows = [Row(generator.gauss(mean, 0.1), 127, batch, i) for i in range(size)]
        judge = rule.beside(rows)
        kept = [judge.decide(row) for row in rows]
        rule.observe(rows, kept)
        in_a_row = in_a_row + 1 if 2 * sum(kept) < size else 0
        longest = max(longest, in_a_row)
    assert longest <= 10


@pytest.mark.parametrize("loss", [3.4e38, 1.7e308, -1.7e308, 0.0])
def test_equal_rows_are_kept_whatever_their_loss(loss):
    batch = [(loss, targets) for targets in (1, 1, 2, 1, 2, 1, 1_000_000, 127, 1023, 31)]
    assert drops(feed(RobustRows(), [batch] * 6)) == 0
