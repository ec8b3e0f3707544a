"""The rows that a run dropped: which they are, how bad, and why."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

import pytest

from abr_trainer.report.figure import Excerpts, Facts
from abr_trainer.report.markdown import render_markdown
from abr_trainer.report.of_run import report_on_run
from abr_trainer.report.page import render_page
from abr_trainer.report.rows import (
    _explain_drop,
    broken_rows,
    explain_rows,
    ranked_rows,
    read_drops,
    read_judged_rows,
    read_row_losses,
    row_of,
)
from abr_trainer.report.why import explain_batch, read_trace
from abr_trainer.schedulers.robust_rows import RobustRows
from abr_trainer.schedulers.rows import Row, RowRule
from tests.report.dropped import HOSTILE_TEXT, drop, write_losses, write_run
from tests.report.test_rendering import Page


@dataclass
class AboveTheMean(RowRule):
    """Drop rows whose loss is more than a nat above the mean of those that were kept."""

    total: float = 0.0
    count: int = 0

    def decide(self, row):
        return row.loss <= self.evidence(row)["limit"]

    def evidence(self, row):
        mean = self.total / self.count if self.count else 5.0
        return {"rows seen": self.count, "mean": mean, "limit": mean + 1}

    def observe(self, rows, kept):
        losses = [row.loss for row, is_kept in zip(rows, kept, strict=True) if is_kept]
        self.total += sum(losses)
        self.count += len(losses)


def test_rows_come_worst_first_and_each_once(tmp_path):
    drops = [
        drop(1, 0, 7, 3.5, "a"),
        drop(1, 1, 8, 9.0, "b", limit=8.0),
        drop(2, 0, 9, None, "c"),
        drop(4, 3, 7, 6.0, "a"),
        drop(5, 0, 4, 8.0, "d", limit=...),
    ]
    rows = broken_rows(write_run(tmp_path, drops))
    assert [(row.index, row.loss, row.steps) for row in rows] == [
        (9, None, (2,)),
        (7, 6.0, (1, 4)),  # 3 nats above its limit
        (8, 9.0, (1,)),  # 1 nat
        (4, 8.0, (5,)),  # it had none
    ]
    assert rows[1].place == "notes.jsonl, row 8"
    assert rows[1].numbers == "loss 6, limit 3, 12 targets"
    assert rows[1].fate == "dropped 2 times (batches 1, 4)"


def test_visits_are_told_where_all_rows_were_ranked(tmp_path):
    run = write_run(tmp_path, [drop(1, 0, 1, 5.0, "a"), drop(3, 0, 1, 6.0, "a"), drop(3, 1, 9, 7.0, "b")])
    write_losses(run, [1.0, 6.0, 2.0], [3, 3, 2])
    far, near = broken_rows(run)
    assert near.fate == "dropped in 2 of 3 visits (batches 1, 3)"
    assert far.fate == "dropped once (batch 3)", "it is not among the rows that were ranked"


def test_visits_are_counted_in_the_trace_of_rows_where_none_were_ranked(tmp_path):
    run = write_run(tmp_path, [drop(1, 0, 1, 5.0, "a"), drop(3, 0, 1, 6.0, "a")])
    visited = [[[5.0, 12, 1], [2.0, 12, 4]], [[2.0, 12, 1], [2.0, 12, 1]], [[6.0, 12, 1]], [[None, 0, 1]], [[2.0, 9]]]
    lines = [{"step": step, "rows": rows} for step, rows in enumerate(visited, 1)]
    (run / "_row_trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert broken_rows(run)[0].fate == "dropped in 2 of 3 visits (batches 1, 3)"
    assert [[row.loss for row in rows] for rows in read_judged_rows(run).values()] == [[5, 2], [2, 2], [6], [], [2]]


def test_documents_of_a_packed_row_are_told_apart(tmp_path):
    drops = [drop(1, i, 7, 5.0 - i, text, source=..., first_row=..., last_row=...) for i, text in enumerate("ab")]
    drops += [drop(2, 0, 7, 5.0, ..., input_ids=[5, i], source=..., first_row=..., last_row=...) for i in (1, 2)]
    assert [row.text for row in broken_rows(write_run(tmp_path, drops))] == ["a", "tokens 5 1", "tokens 5 2", "b"]


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({"first_row": 1200, "last_row": 1214}, "notes.jsonl, rows 1,200 to 1,214"),
        ({"last_row": ...}, "notes.jsonl, from row 1,818 on"),
        ({"source": ..., "first_row": ..., "last_row": ...}, "index 1,817 of the training set, counted from 0"),
        ({"source": ..., "first_row": ..., "last_row": ..., "index": ...}, "a row of unknown place"),
        ({"source": "\x1b[2Jevil\n.txt"}, "\\x1b[2Jevil ⏎ .txt, row 1,818"),
    ],
)
def test_a_place_is_as_exact_as_it_is_known(tmp_path, more, place):
    (row,) = broken_rows(write_run(tmp_path, [drop(1, 0, 1817, 5.0, "a", **more)]))
    assert row.place == place


def test_rows_without_an_index_are_told_apart_by_what_they_hold(tmp_path):
    drops = [drop(step, 0, 1, 5.0, text, index=...) for step, text in ((1, "a"), (2, "b"), (3, "a"))]
    drops += [drop(4, 0, 1, 4.0, ..., index=..., input_ids=ids) for ids in ([1, 2], [1, 3])]
    rows = broken_rows(write_run(tmp_path, drops))
    assert [row.text for row in rows] == ["a", "b", "tokens 1 2", "tokens 1 3"]
    assert rows[0].steps == (1, 3)


def test_all_rows_are_ranked_by_their_last_loss(tmp_path):
    run = write_run(tmp_path, [drop(1, 0, 3, 5.0, "broken")])
    write_losses(run, [2.0, float("nan"), 1.5, 6.0, float("nan"), 2.5], [1, 2, 1, 2, 0, 1])
    ranked = ranked_rows(read_row_losses(run), broken_rows(run))
    assert [(row.index, row.loss) for row in ranked] == [(1, None), (3, 6.0), (5, 2.5), (0, 2.0), (2, 1.5)]
    assert ranked[1].text == "broken"
    assert ranked[1].fate == "dropped in 1 of 2 visits (batch 1)"
    assert ranked[2].fate == "never dropped in 1 visit"
    assert len(ranked_rows(read_row_losses(run), [], most=2)) == 2


def test_a_damaged_file_of_losses_is_told(tmp_path):
    run = write_run(tmp_path, [])
    write_losses(run, [2.0], [1])
    path = run / "_row_losses.npz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="_row_losses.npz is damaged"):
        read_row_losses(run)


def test_a_line_that_a_killed_run_left_unfinished_is_left_out(tmp_path):
    run = write_run(tmp_path, [drop(1, 0, 3, 5.0, "broken")])
    with (run / "_dropped_rows.jsonl").open("a") as file:
        file.write('{"step": 2, "posi')
    assert len(read_drops(run)) == 1


# ---- Why ----


def test_the_rule_is_shown_all_batches_before_and_asked_for_its_numbers(tmp_path):
    # Of the first batch [2, 2, 2, 9] the 9 is dropped: a mean of 2. The second has [2, 5, not finite, no targets].
    drops = [drop(1, 3, 30, 9.0, "x"), drop(2, 1, 31, 5.0, "y"), drop(2, 2, 32, None, "z")]
    run = write_run(tmp_path, drops)
    trace, rows = read_trace(run), read_judged_rows(run)
    assert [len(rows[step]) for step in (1, 2, 3)] == [4, 3, 4], "a loss that is not finite is not shown to a rule"
    del rows[2][-1]  # as if it had no targets
    lines = explain_rows(AboveTheMean(), trace[1], drops, rows)
    text = "\n".join(lines)
    assert lines[0] == f"{'rows':<24} 4 judged, 2 dropped"
    assert re.search(r"dropped: row 2 +loss 5, limit 3, 12 targets\n +it is +notes.jsonl, row 32\n", text)
    assert re.search(r"rows seen +3\n +mean +2\n +limit +3\n +text +y\n", text)
    assert re.search(r"dropped: row 3 +loss not finite.*\n.*row 33\n +why +its loss is not a finite number", text)
    assert "has changed since" not in text
    third = explain_rows(AboveTheMean(), trace[2], drops, rows)
    assert third == [f"{'rows':<24} 4 judged, 0 dropped"]


@pytest.mark.parametrize(
    ("caution", "meaning"), [(1.5, "hardly a row stands out, so the limit is 1.5 times"), (1.0, "some")]
)
def test_caution_is_explained_in_words(caution, meaning):
    rule = RobustRows()
    rule.observe([Row(2.0 + i % 7 / 50, 12, 0, i) for i in range(64)], [True] * 64)
    rule.fit = replace(rule.fit, caution=caution)
    lines = _explain_drop(rule, row_of([drop(1, 0, 1, 9.0, "x")]), 0, Row(9.0, 12, 1, 0))
    assert any(line.startswith(f"  {'caution':<22} {caution:g}: {meaning}") for line in lines)


def test_a_rule_that_decides_otherwise_now_is_told(tmp_path):
    drops = [drop(1, 0, 1, 4.0, "x")]
    run = write_run(tmp_path, drops)
    lines = explain_rows(AboveTheMean(), read_trace(run)[0], drops, read_judged_rows(run))
    assert "the code of the rule has changed since" in "\n".join(lines)


def test_a_batch_skipped_for_its_rows_is_explained_in_a_sentence(tmp_path):
    run = write_run(tmp_path, [drop(2, i, i, 5.0 + i, HOSTILE_TEXT) for i in range(3)])
    text = "\n".join(explain_batch(run, 2))
    assert text.startswith(
        "Batch 2 was skipped: more than half of its rows were dropped, so it was skipped as a whole"
    )
    assert f"{'rows':<24} 4 judged, 3 dropped" in text
    assert all(line.isprintable() for line in text.split("\n")), "no control characters"


# ---- The report ----


def section(report):
    return next(each for each in report.sections if each.heading.startswith("Broken rows"))


def test_the_report_shows_ten_rows_and_folds_the_others(tmp_path):
    run = write_run(tmp_path, [drop(i % 6 + 1, i // 6, i, 5.0 + i, f"text {i} " + "word " * 90) for i in range(13)])
    report = report_on_run(run)
    assert section(report).heading == "Broken rows (13)"
    assert section(report).blocks[0].startswith("24 rows were judged, 13 of them dropped (54.2 %).")
    facts = next(block for block in report.lead if isinstance(block, Facts))
    assert ("rows dropped (54.2 %)", "13") in facts.items
    page = Page(render_page(report))
    texts = [text for tag, attributes, text in page.elements if attributes.get("class") == "excerpt"]
    assert ["".join(text).split()[:2] for text in texts] == [["text", str(i)] for i in range(12, -1, -1)]
    assert all("".join(text).count("word") == 90 for text in texts), "nothing is cut off"
    assert "3 more" in page.texts("summary")
    markdown = render_markdown(report)
    assert markdown.index("text 3") < markdown.index("<summary>3 more</summary>") < markdown.index("text 2 ")
    assert markdown.count("word word") * 2 <= 13 * 90 == markdown.count("word")


def test_the_page_begins_with_the_rows_that_were_dropped(tmp_path):
    drops = [drop(1, 0, 2, 5.0, "a"), drop(1, 1, 3, 6.0, "b"), drop(4, 0, 2, 4.0, "a")]
    report = report_on_run(write_run(tmp_path / "run", drops))
    assert report.lead[0].badge == "broken rows"
    assert report.lead[0].text == "2 rows were dropped in 2 batches, 3 times in all."
    headings = [each.heading for each in report.sections]
    assert headings[:3] == ["Perplexity", "Broken rows (2)", "Batches"]
    one = report_on_run(write_run(tmp_path / "one", [drop(2, 0, 2, 5.0, "a")]))
    assert one.lead[0].text == "1 row was dropped in 1 batch."
    most = report_on_run(write_run(tmp_path / "most", [drop(2, i, i, 5.0, "a") for i in range(3)]))
    assert [each.heading for each in most.sections][1:3] == ["Broken rows (3)", "Skipped batches (1)"]
    none = report_on_run(write_run(tmp_path / "none", []))
    assert not any(getattr(block, "badge", "") == "broken rows" for block in none.lead)


def test_what_is_constant_is_said_and_not_drawn(tmp_path):
    report = report_on_run(write_run(tmp_path / "even", []))
    assert [figure.name for figure in report.figures] == ["batches"]
    said = [block for each in report.sections for block in each.blocks if isinstance(block, str)]
    assert "Each batch got 1 update. No batch was skipped." in said
    assert {"Learning rate: 0.001, the same throughout.", "Memory: 1 GiB, the same throughout."} <= set(said)
    skipping = report_on_run(write_run(tmp_path / "skips", [drop(2, i, i, 5.0, "a") for i in range(3)]))
    assert [figure.name for figure in skipping.figures] == ["batches", "skips_over_time", "repeats_over_loss"]
    said = [block for each in skipping.sections for block in each.blocks if isinstance(block, str)]
    assert "Each batch that was not skipped got 1 update." in said


def test_the_page_says_that_rows_are_blocks_and_shows_both_ends_of_a_text(tmp_path):
    text = "good " * 400 + "br0k3n"
    run = write_run(tmp_path, [drop(1, 0, 2, 5.0, text, is_block=True, last_row=9, targets=511, input_ids=[3] * 256)])
    *said, excerpts = section(report_on_run(run)).blocks
    assert "cut them into blocks of tokens" in " ".join(said)
    ((about, shown),) = excerpts.items
    assert about.endswith("(batch 1). The run stored the first 256 of more than 511 tokens.")
    assert re.fullmatch(r"(good )*\w* \.\.\. .*good br0k3n", shown)


def test_very_many_rows_are_not_all_on_the_page(tmp_path):
    run = write_run(tmp_path, [drop(1, i, i, 5.0 + i, "x") for i in range(250)], batches=1, rows=600)
    *_, excerpts = section(report_on_run(run)).blocks
    assert isinstance(excerpts, Excerpts)
    assert len(excerpts.items) == 200
    assert "The worst 200 of 250." in section(report_on_run(run)).blocks


def test_a_run_whose_rows_were_not_judged_has_no_such_section(tmp_path):
    run = write_run(tmp_path, [])
    assert section(report_on_run(run)).blocks == ("24 rows were judged, 0 of them dropped (0 %).",)
    (run / "_dropped_rows.jsonl").unlink()
    assert not [each for each in report_on_run(run).sections if each.heading.startswith("Broken rows")]
    assert "judged" not in "\n".join(explain_batch(run, 1))


def test_no_text_of_a_data_set_becomes_markup(tmp_path):
    hostile = [drop(1, i, i, 5.0, HOSTILE_TEXT, source=f"<i>`|.jsonl{i}") for i in range(2)]
    report = report_on_run(write_run(tmp_path, hostile))
    page = Page(render_page(report))
    assert len(page.texts("script")) == 4
    assert page.texts("b", "i") == []
    (shown, _) = ["".join(text) for _, attributes, text in page.elements if attributes.get("class") == "excerpt"]
    assert shown.startswith("</script><b>bold</b> `tick` ``` |")
    assert "\\x1b[31mred\\x1b]0;title\\x07 \\u202eback ⏎ # head" in shown
    markdown = render_markdown(report)
    assert "\x1b" not in markdown + "".join(shown)
    assert "\u202e" not in markdown + "".join(shown)
    outside = re.sub(r"^(````+)text\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "bold" not in outside, "texts stand in fences that are longer than any in them"
    assert not re.search(r"(?<!\\)<(?!/?details|/?summary)", outside)
