"""What a comparison shows is said in a badge and a plain sentence."""

from __future__ import annotations

import copy

import pytest

from abr_trainer.comparison.collecting import read_comparison
from abr_trainer.comparison.statistics import paired, verdict
from abr_trainer.report.of_comparison import report_on_comparison
from abr_trainer.report.verdicts import summary_lines, verdicts
from tests.report.test_examples import EXAMPLES

METRIC = "test_perplexity"


def arm(name: str, differences: list[float], planned: int | None = None):
    found = paired(differences) | {"relative_to": 20.0}
    entry = {"difference": found, "verdict": verdict(found, planned or len(differences)), "values": {}}
    return {"name": name, "cost": {"passes": 100.0}, METRIC: entry}


def said(*arms, **data):
    of_reference = {"name": "baseline", "cost": {"passes": 100.0}, METRIC: {}}
    whole = {"metric": METRIC, "reference": "baseline", "match": "passes", "against_controls": []} | data
    return [(notice.kind, notice.badge, notice.text) for notice in verdicts(whole, [of_reference, *arms])]


WORSE, BETTER, UNSURE = [2.0, 2.1, 1.9], [-2.0, -2.1, -1.9], [3.0, -1.0]


@pytest.mark.parametrize(
    ("differences", "planned", "expected"),
    [
        (WORSE, 3, ("bad", "worse", "With abr, test perplexity is 10.0 % higher than with baseline.")),
        (BETTER, 3, ("good", "better", "With abr, test perplexity is 10.0 % lower than with baseline.")),
        (UNSURE, 2, ("neutral", "cannot tell", "5.0 % higher than with baseline, but 2 seeds cannot tell that from")),
        (
            [3.0],
            1,
            ("neutral", "one seed", "15.0 % higher than with baseline, but one seed cannot tell that from chance"),
        ),
        ([0.0, 0.0], 2, ("neutral", "equal", "abr: every run equals that of baseline.")),
        (WORSE, 5, ("warning", "no verdict", "abr: only 3 of 5 pairs with baseline can be compared.")),
        ([0.002, 0.0021], 2, ("bad", "worse", "is 0.01 % higher than")),
    ],
)
def test_a_single_arm_is_judged_in_one_sentence(differences, planned, expected):
    ((kind, badge, text),) = said(arm("abr", differences, planned))
    assert (kind, badge) == expected[:2]
    assert expected[2] in text


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        ([WORSE, WORSE], ("bad", "worse", "No: both schedulers are worse than baseline at equal compute.")),
        ([UNSURE, UNSURE], ("neutral", "cannot tell", "No clear difference to baseline was found for any of the 2")),
        (
            [BETTER, WORSE],
            ("good", "1 of 2 better", "Yes: against baseline at equal compute, r0 is better; r1 is worse."),
        ),
        ([WORSE, UNSURE], ("bad", "1 of 2 worse", "r0 is worse; for the other one, the seeds cannot tell.")),
        ([WORSE] * 4 + [UNSURE] * 2, ("bad", "4 of 6 worse", "4 of them are worse; for the others, the seeds")),
    ],
)
def test_several_arms_are_answered_first(arms, expected):
    first, *rest = said(*(arm(f"r{i}", differences) for i, differences in enumerate(arms)))
    assert first[:2] == expected[:2]
    assert expected[2] in first[2]
    assert len(rest) == len(arms)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
@pytest.mark.parametrize("width", [60, 100])
def test_verdicts_are_wrapped_and_their_numbers_have_lines_of_their_own(monkeypatch, tmp_path, path, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = summary_lines(read_comparison(path), tmp_path)
    assert max(map(len, lines)) <= width
    numbers = [line for line in lines if "Difference " in line and "interval" in " ".join(lines)]
    assert numbers
    assert all(line.startswith("    Difference ") for line in numbers)


def test_what_took_more_compute_has_won_nothing():
    costly = arm("fixed:2", BETTER) | {"cost": {"passes": 200.0}}
    first, one, _ = said(costly, arm("r1", BETTER), match="batches")
    assert first[:2] == ("neutral", "not equal compute")
    assert one[0] == "neutral"
    assert one[2].endswith("It spent 2.0 times the passes.")


def test_equal_seconds_are_judged_whatever_they_bought():
    slow = [arm(f"r{i}", BETTER) | {"cost": {"passes": 250.0, "seconds": 61.0}} for i in range(2)]
    baseline = {"name": "baseline", "cost": {"passes": 100.0, "seconds": 60.0}, METRIC: {}}
    data = {"metric": METRIC, "reference": "baseline", "match": "seconds", "against_controls": []}
    first, one, _ = verdicts(data, [baseline, *slow])
    assert first.text == "Yes: against baseline in equal time, r0 and r1 are better."
    assert "times the" not in one.text
    slow[0]["cost"]["seconds"] = 90.0
    _, one, _ = verdicts(data, [baseline, *slow])
    assert one.text.endswith("It spent 1.5 times the seconds.")


def test_counts_are_written_as_counts_and_means_of_counts_with_a_decimal():
    data = copy.deepcopy(read_comparison(EXAMPLES[0]))
    for each in data["arms"]:
        each["cost"] |= {"passes": 378.0, "skips": 2.0, "batches": 377.6}
    report = report_on_comparison(data)
    (costs,) = next(section.blocks for section in report.sections if section.heading == "Costs")
    cells = dict(zip(costs.columns, costs.rows[0], strict=True))
    assert (cells["passes"], cells["skips"], cells["batches"]) == ("378", "2", "377.6")


def costs(data):
    """The table of costs of each arm, and that of each run."""
    sections = {section.heading: section.blocks for section in report_on_comparison(data).sections}
    (of_arms,) = sections["Costs"]
    folds = [block for block in sections["How to repeat it"] if hasattr(block, "summary")]
    of_runs = [table for fold in folds for table in fold.blocks if getattr(table, "caption", "") == SPENT]
    return of_arms, of_runs[0]


SPENT = "What every run has spent"


def waiting(data, share):
    """The same comparison, whose second arm waited for this share of its time."""
    changed = copy.deepcopy(data)
    name = changed["arms"][1]["name"]
    for each in changed["arms"]:
        each["cost"]["waiting_seconds"] = each["cost"]["seconds"] * (share if each["name"] == name else 0.02)
    for each in changed["runs"]:
        each["cost"]["waiting_seconds"] = each["cost"]["seconds"] * (share if each["arm"] == name else 0.02)
    return changed


def test_waiting_has_a_column_where_an_arm_waited_for_more_than_a_twentieth_of_its_time():
    data = read_comparison(EXAMPLES[0])
    for table in costs(waiting(data, 0.25)):
        assert table.columns[-1] == "waiting"
        assert {row[-1] for row in table.rows} == {"2.0 %", "25.0 %"}
        assert all(len(row) == len(table.columns) for row in table.rows)
    for unchanged in (data, waiting(data, 0.04)):
        assert all("waiting" not in table.columns for table in costs(unchanged))


def test_runs_of_an_earlier_version_among_others_have_a_dash_for_their_wait():
    data = waiting(read_comparison(EXAMPLES[0]), 0.25)
    del data["arms"][0]["cost"]["waiting_seconds"]
    of_arms, _ = costs(data)
    assert [row[-1] for row in of_arms.rows][:2] == ["\N{EM DASH}", "25.0 %"]
