"""Files that a run left and that were changed since: one line says which, where, and what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from abr_trainer.cli import report, rows, why
from abr_trainer.comparison.collecting import read_comparison
from abr_trainer.records.files import Damaged, read_json, read_lines
from abr_trainer.records.shapes import BATCH, COUNT, LOSS, NUMBER, REAL, TEXT, Each, Maybe, Some, misfit
from tests.conftest import ROOT
from tests.report.dropped import drop, write_losses, write_run

COMPARISONS = sorted((ROOT / "docs" / "compare").glob("*/comparison.json"))


@pytest.mark.parametrize(
    ("value", "shape", "wrong"),
    [
        (3, COUNT, None),
        (-3, COUNT, "it is -3, but must be a whole number from 0 on"),
        (True, COUNT, "it is True, but must be a whole number from 0 on"),
        (2.0, COUNT, "it is 2.0, but must be a whole number from 0 on"),
        (10**30, COUNT, f"it is {10**30}, but must be a whole number from 0 on"),
        (math.nan, NUMBER, "it is nan, but must be a number"),
        (math.inf, REAL, None),
        (None, NUMBER, "it is null, but must be a number"),
        (None, LOSS, None),
        ("3", LOSS, "it is '3', but must be a number or null"),
        ([], Some(TEXT), "it is empty"),
        ([], [TEXT], None),
        (["a", 1], [TEXT], "1 is 1, but must be text"),
        ({"a": {}}, {"a": {"b": TEXT}}, "a.b is missing"),
        ({"a": {}}, {"a": {"b": Maybe(TEXT)}}, None),
        ({"a": {"b": None}}, {"a": {"b": Maybe(TEXT)}}, "a.b is null, but must be text"),
        ({"a": 1, "b": "c"}, Each(COUNT), "b is 'c', but must be a whole number from 0 on"),
        ([], {"a": TEXT}, "it is [], but must be an object"),
        ("x" * 99, ([TEXT], {"a": TEXT}), f"it is '{'x' * 56}..., but must be a list or an object"),
        ({"a": 1}, ([TEXT], {"a": TEXT}), "a is 1, but must be text"),
    ],
)
def test_what_does_not_fit_is_named(value, shape, wrong):
    assert misfit(value, shape) == wrong


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (b"{}\n", "step is missing"),
        (b"[1]\n", "it is [1], but must be an object"),
        (b'{"step": 1\n', "it is no JSON object"),
        (b"\xff\xfe\n", "it is no JSON object"),
        (b"[" * 100_000 + b"\n", "it is no JSON object"),
        (b"\n", "it is no JSON object"),
    ],
)
def test_a_damaged_line_is_named_by_its_number(tmp_path, line, wrong):
    directory = write_run(tmp_path / "run", [])
    path = directory / "abr_trace.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(Damaged) as caught:
        list(read_lines(path, BATCH))
    assert str(caught.value) == f"Line 3 of {path} is damaged: {wrong}."


def test_a_last_line_that_is_not_finished_is_no_damage(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert [line["step"] for line in read_lines(path)] == [1]


def test_a_missing_or_cut_file_is_nothing_and_another_shape_is_damage(tmp_path):
    path = tmp_path / "run.json"
    assert read_json(path, {"a": TEXT}) is None
    path.write_text('{"a": ')
    assert read_json(path, {"a": TEXT}) is None
    path.write_text("[1]")
    with pytest.raises(Damaged, match=r"run.json is damaged: it is \[1\], but must be an object\."):
        read_json(path, {"a": TEXT})


def change(path: Path, number: int, **values: object) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[number] |= values
    lines[number] = {name: value for name, value in lines[number].items() if value is not ...}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "abr_trace.jsonl",
            {"repeats": "two"},
            "Line 2 of .*abr_trace.jsonl is damaged: repeats is 'two', but must be",
        ),
        ("abr_trace.jsonl", {"losses": []}, "Line 2 of .*abr_trace.jsonl is damaged: losses is empty"),
        ("abr_trace.jsonl", {"step": 1}, "abr_trace.jsonl is damaged: batch 1 comes after batch 1"),
        ("abr_trace.jsonl", {"reason": None}, "reason is null, but must be text"),
        ("_dropped_rows.jsonl", {"position": ...}, "Line 2 of .*_dropped_rows.jsonl is damaged: position is missing"),
        ("_dropped_rows.jsonl", {"input_ids": "ab"}, "input_ids is 'ab', but must be a list or null"),
        ("_row_trace.jsonl", {"rows": [[1.0, "x"]]}, "Line 2 of .*_row_trace.jsonl is damaged: rows.0 is "),
    ],
)
@pytest.mark.parametrize("verb", ["report", "why", "rows"])
def test_a_damaged_record_of_a_run_gets_one_line_from_each_verb_that_reads_it(tmp_path, name, values, message, verb):
    directory = write_run(tmp_path / "run", [drop(1, 0, 1, 5.0, "a"), drop(3, 1, 2, 6.0, "b")])
    change(directory / name, 1, **values)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    calls = {
        "report": lambda: report.main([str(directory)]),
        "why": lambda: why.main([str(directory), "3"]),
        "rows": lambda: rows.main([str(directory)]),
    }
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        calls[verb]()
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in directory.iterdir()} == before, "nothing is written"


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.parent.name)
def test_the_comparisons_that_we_keep_fit(path):
    assert read_comparison(path.parent)["format"] == 1


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda data: data["arms"][1]["cost"].pop("skips"), "arms.1.cost.skips is missing"),
        (lambda data: data.update(metric="eval_beauty"), "metric is 'eval_beauty', which is no score"),
        (lambda data: data.update(runs=[]), "runs is empty"),
        (lambda data: data["arms"][0].update(name="other"), "there is no run of 'other'"),
        (
            lambda data: data["arms"][1]["curve"][0].update(mean=None),
            "arms.1.curve.0.mean is null, but must be a number",
        ),
        (lambda data: data["runs"][0].update(seed=-1), "runs.0.seed is -1, but must be a whole number from 0 on"),
        (lambda data: data.update(match="luck"), "match is 'luck', but must be passes, seconds or batches"),
    ],
)
def test_a_comparison_that_does_not_fit_is_refused(tmp_path, change, wrong):
    data = json.loads((ROOT / "docs" / "compare" / "stories260k-wikitext2" / "comparison.json").read_text())
    change(data)
    (tmp_path / "comparison.json").write_text(json.dumps(data))
    with pytest.raises(SystemExit) as caught:
        report.main([str(tmp_path)])
    assert str(caught.value) == f"error: {tmp_path}/comparison.json is damaged: {wrong}."
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.json"]


def test_row_losses_are_not_asked_of_a_damaged_file(tmp_path):
    directory = write_run(tmp_path / "run", [drop(1, 0, 1, 5.0, "a")])
    write_losses(directory, [1.0, 2.0], [1, 1])
    (directory / "_row_losses.npz").write_bytes((directory / "_row_losses.npz").read_bytes()[:60])
    with pytest.raises(SystemExit, match="_row_losses.npz is damaged"):
        rows.main([str(directory), "--all"])
