"""`abr rows`: the broken rows of runs on a terminal and as data, and files without them."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import subprocess
import sys

import pytest

import run_clm_abr
from abr_trainer.cli import classify, rows
from abr_trainer.cli.main import main
from abr_trainer.data.demo import demo_texts
from abr_trainer.report.of_run import report_on_run
from abr_trainer.report.page import render_page
from abr_trainer.report.rows import read_drops
from abr_trainer.report.why import explain_batch
from abr_trainer.schedulers import RowRule
from abr_trainer.training.ledger import ComputeLedger
from abr_trainer.training.summary import cost_lines
from tests.report.dropped import HOSTILE_TEXT, drop, write_losses, write_run

pytestmark = pytest.mark.slow

NOTES = [{"text": f"the {word} of number {i} lies here in peace"} for i, word in enumerate(["fox", "bird", "cat"] * 4)]


def text_of(index):
    return NOTES[index]["text"]


@pytest.fixture
def notes(tmp_path):
    """A file of twelve rows, older than any run."""
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in NOTES))
    os.utime(path, (1e9, 1e9))
    return path


@pytest.fixture
def run(tmp_path):
    """A run that has dropped rows 3 and 8 of it, one of them twice."""
    drops = [drop(1, 0, 2, 5.0, text_of(2)), drop(2, 1, 7, None, text_of(7)), drop(4, 0, 2, 4.0, text_of(2))]
    return write_run(tmp_path / "run", drops)


def record(run, *argv, **arguments):
    (run / "run.json").write_text(json.dumps({"argv": ["abr", *argv], "arguments": arguments}))


def lines_of(capsys, *argv):
    rows.main([str(each) for each in argv])
    return capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run over a file of which five rows are broken, and these rows, from 1."""
    directory = tmp_path_factory.mktemp("trained")
    dice = random.Random(4)
    texts = demo_texts("train")[:120]
    broken = [31, 52, 77, 90, 114]
    for number in broken:
        words = ("".join(dice.choices("bcdfgjkqvxz\x1b<&`#", k=dice.randint(2, 7))) for _ in range(150))
        texts[number - 1] = " ".join(words)
    path = directory / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["--train_file", str(path), "--block_size", "32", "--use_cpu", "--disable_tqdm", "true", "--do_train"]
    flags += ["--num_train_epochs", "1", "--report_to", "none", "--skip_rows", "robust", "--rank_rows"]
    flags += ["--per_device_train_batch_size", "16"]
    run_clm_abr.main([*flags, "--output_dir", str(directory / "run")])
    return directory / "run", path, broken


def refusal(*argv):
    with pytest.raises(SystemExit) as caught:
        rows.main([str(each) for each in argv])
    message = str(caught.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_the_rows_of_a_run_are_listed_worst_first(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert lines_of(capsys, run) == [
        f"{run}: 24 rows judged in 6 batches, 3 dropped (12.5 %): 2 different rows, worst first",
        "",
        "notes.jsonl, row 8",
        "    loss not finite, 12 targets; dropped",
        "    once (batch 2)",
        "    the bird of number 7 lies here in",
        "    peace",
        "",
        "notes.jsonl, row 3",
        "    loss 5, limit 3, 12 targets; dropped",
        "    2 times (batches 1, 4)",
        "    the cat of number 2 lies here in",
        "    peace",
    ]
    assert lines_of(capsys, run, "--limit", "1")[-1] == "1 more: --limit 0 shows all."


def test_json_and_csv_have_all_fields_of_all_rows(tmp_path, capsys):
    drops = [drop(1, i, i, 5.0 + i, HOSTILE_TEXT + str(i)) for i in range(30)]
    run = write_run(tmp_path, drops, rows=100)
    rows.main([str(run), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["index"] for row in found] == list(range(29, -1, -1))
    assert found[0]["text"] == HOSTILE_TEXT + "29"
    assert found[0]["steps"] == [1]
    rows.main([str(run), "--csv", "--limit", "2"])
    shown = capsys.readouterr().out
    table = list(csv.DictReader(io.StringIO(shown)))
    assert [(row["first_row"], row["drops"], row["loss"]) for row in table] == [
        ("30", "1", "34.0"),
        ("29", "1", "33.0"),
    ]
    assert table[0].keys() == found[0].keys()
    assert all(letter.isprintable() or letter == "\n" for letter in shown)


def test_nothing_of_a_text_reaches_the_terminal_as_code(tmp_path, capsys):
    run = write_run(tmp_path, [drop(1, 0, 0, 5.0, HOSTILE_TEXT, source="a\x1b[2J.txt")])
    assert all(line.isprintable() for line in lines_of(capsys, run))


def test_several_runs_are_listed_one_after_the_other(run, tmp_path, capsys):
    other = write_run(tmp_path / "other", [])
    shown = lines_of(capsys, run, other)
    assert shown[-1] == f"{other}: 24 rows judged in 6 batches, 0 dropped (0 %)"
    rows.main([str(run), str(other), str(run), "--json"])
    assert [row["run"] for row in json.loads(capsys.readouterr().out)] == [str(run)] * 4


def test_all_rows_of_a_run_that_ranked_them(run, capsys):
    assert "--all needs a run with --rank_rows" in refusal(run, "--all")
    write_losses(run, [2.0, 1.0, 5.0, 0.0], [1, 1, 2, 0])
    shown = lines_of(capsys, run, "--all", "--limit", "2")
    assert shown[0] == f"{run}: 3 of 4 rows were seen; by their last loss, highest first"
    assert "    loss 5, 12 targets; dropped in 2 of 2 visits (batches 1, 4)" in shown
    assert "index 0 of the training set, counted from 0" in shown
    assert shown[-1] == "1 more: --limit 0 shows all."


def test_it_needs_neither_torch_nor_transformers(run, notes, tmp_path):
    code = "import sys; from abr_trainer.cli.main import main; main(['rows', sys.argv[1], '--limit', '1']);"
    code += "main(['rows', sys.argv[1], '--clean', *sys.argv[2:]]);"
    code += "print({'torch', 'transformers'} & sys.modules.keys())"
    command = [sys.executable, "-c", code, str(run), str(notes), str(tmp_path / "clean.jsonl")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert told.endswith("\nset()\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere is not a directory"),
        (["."], "holds no run"),
        (["run", "--limit", "-1"], "--limit must be at least 0, got -1"),
        (["run", "--all", "--clean", "a", "b"], "cannot be used with --all"),
        (["run", "--clean", "a", "b", "--limit", "3"], "cannot be used with --limit"),
        (["run", "--overwrite"], "--overwrite needs --clean"),
        (["run", "--clean", "missing.jsonl", "out.jsonl"], "--clean missing.jsonl is missing"),
        (["run", "--clean", "run", "out.jsonl"], "--clean run is a directory"),
        (["run", "--clean", "notes.jsonl", "no/out.jsonl"], "no/out.jsonl is in a directory that does not exist"),
        (["run", "--clean", "notes.jsonl", "run"], "run is a directory"),
        (["run", "--clean", "notes.jsonl", "notes.jsonl"], "would overwrite notes.jsonl"),
        (["run", "--clean", "notes.jsonl", "notes.jsonl", "--overwrite"], "would overwrite notes.jsonl"),
        (["run", "--clean", "notes.jsonl", "there.jsonl"], "there.jsonl exists. Give another name, or --overwrite"),
        (["run", "--clean", "there.jsonl", "out.jsonl"], "there.jsonl is none of the sources of run. They are notes"),
        (
            ["run", "--clean", "notes.jsonl", "out.csv"],
            "out.csv is a copy of notes.jsonl, so its name must end in .jsonl",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, notes, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").write_text("{}\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert message in refusal(*argv)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_run_without_a_row_rule_is_told(run):
    (run / "_dropped_rows.jsonl").unlink()
    assert refusal(run).endswith("it was trained without --skip_rows.")
    write_losses(run, [2.0], [1])
    assert refusal(run).endswith("it was trained without --skip_rows. --all ranks its rows.")


def test_a_real_run_names_the_broken_rows_of_its_file(trained, tmp_path, capsys):
    run, path, broken = trained
    rows.main([str(run), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {row["source"] for row in found} == {"notes.jsonl"}
    inside = [row["first_row"] for row in found if row["first_row"] == row["last_row"] in broken]
    assert set(inside) == set(broken)
    assert all(row["visits"] == row["drops"] == 1 for row in found)
    first, *said = lines_of(capsys, run, "--clean", path, tmp_path / "clean.jsonl")
    removed = [int(number) for number in re.findall(r"\d+", first.partition(" of its 120 rows")[2])]
    named = [int(number) for number in re.findall(r"(\d+) \(\d+, [\d.]+\)", " ".join(said))]
    assert sorted(removed + named[: 5 - len(removed)]) == broken, "of these most blocks were dropped"
    assert "blocks of tokens, and judged these blocks" in " ".join(lines_of(capsys, run)[1:4])
    top = lines_of(capsys, run, "--all", "--limit", "5")
    assert "blocks of tokens, and judged these blocks" in " ".join(top[1:4])
    assert top[top.index("") + 1].startswith("notes.jsonl, row")
    for step in {row["steps"][0] for row in found}:
        told = "\n".join(explain_batch(run, step))
        assert "has changed since" not in told
        limit = next(row["limit"] for row in found if row["steps"][0] == step)
        assert limit is None or f"  {'limit':<22} {limit:.6g}" in told
    shown = render_page(report_on_run(run))
    assert f"Broken rows ({len(found)})" in shown
    assert "\x1b" not in shown
    assert cost_lines(ComputeLedger(batches=9, rows=9), run)[2] == f"ranked      abr rows {run} --all"


def test_the_end_of_a_run_says_how_many_rows_were_dropped(tmp_path):
    run = write_run(tmp_path / "my run", [])
    told = cost_lines(ComputeLedger(batches=9, rows=72, rows_dropped=3), run)
    assert told[1] == f"rows        72 judged, 3 dropped (4.2 %): abr rows '{run}'"
    assert cost_lines(ComputeLedger(batches=9, rows=72), run)[1] == "rows        72 judged, 0 dropped (0 %)"
    ranked_alone = ComputeLedger(batches=9, rows=72)
    assert not any(line.startswith(("rows", "ranked")) for line in cost_lines(ranked_alone, tmp_path))


# ---- Files without the broken rows ----


def test_a_file_is_written_without_the_rows_that_were_dropped(run, notes, tmp_path, capsys):
    out = tmp_path / "clean.jsonl"
    main(["rows", str(run), "--clean", str(notes), str(out)])
    assert capsys.readouterr().out == f"{out}: notes.jsonl without 2 of its 12 rows: 3, 8\n"
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        row for i, row in enumerate(NOTES) if i not in (2, 7)
    ]
    out.write_text("of somebody else")
    rows.main([str(run), "--clean", str(notes), str(out), "--overwrite"])
    assert len(out.read_text().splitlines()) == 10


def test_what_several_runs_have_dropped_is_removed_at_once(run, notes, tmp_path, capsys):
    other = write_run(tmp_path / "other", [drop(1, 0, 4, 9.0, text_of(4)), drop(2, 0, 2, 9.0, text_of(2))])
    assert "rows: 3, 5, 8" in lines_of(capsys, run, other, "--clean", notes, tmp_path / "clean.jsonl")[0]


def test_rows_of_other_files_stay(run, notes, tmp_path, capsys):
    drops = [drop(1, 0, 4, 9.0, text_of(4)), drop(1, 1, 4, 9.0, "x", source="more.csv", index=99)]
    drops += [drop(1, 2, 5, 9.0, "y", source=..., first_row=..., last_row=...)]
    mixed = write_run(tmp_path / "mixed", drops)
    assert lines_of(capsys, mixed, "--clean", notes, tmp_path / "clean.jsonl")[1:] == [
        "Dropped rows that are not from notes.jsonl: 1 from more.csv, 1 from unknown source"
    ]


def test_a_file_that_was_trained_on_and_had_nothing_dropped_is_copied(run, notes, tmp_path, capsys):
    good = write_run(tmp_path / "good", [])
    assert "is none of the sources" in refusal(good, "--clean", notes, tmp_path / "clean.jsonl")
    record(good, "sft", train_file="somewhere/notes.jsonl")
    shown = lines_of(capsys, good, "--clean", notes, tmp_path / "clean.jsonl")
    assert shown == [f"{tmp_path / 'clean.jsonl'}: notes.jsonl without 0 of its 12 rows"]
    assert (tmp_path / "clean.jsonl").read_bytes() == notes.read_bytes()
    record(good, "sft", dataset_mix="more.csv=0.5,other/notes.jsonl=0.5")
    rows.main([str(good), "--clean", str(notes), str(tmp_path / "again.jsonl")])


def test_dropped_rows_of_unknown_place_cannot_be_removed(notes, tmp_path):
    run = write_run(tmp_path / "run", [drop(1, 0, 3, 9.0, "x", source=..., first_row=..., last_row=...)])
    record(run, "train", train_file=str(notes))
    assert "The source of 1 dropped rows is not known" in refusal(run, "--clean", notes, tmp_path / "o.jsonl")


def test_of_two_files_of_one_name_the_one_that_is_given_is_cleaned(notes, tmp_path, capsys):
    other = tmp_path / "b" / "notes.jsonl"
    other.parent.mkdir()
    other.write_text('{"text": "x"}\n' * 3)
    named = [str(notes), str(other)]
    run = write_run(tmp_path / "run", [drop(1, i, i, 5.0, "x", source=named[i]) for i in (0, 1)])
    assert "without 1 of its 12 rows: 1" in lines_of(capsys, run, "--clean", notes, tmp_path / "out.jsonl")[0]
    assert "without 1 of its 3 rows: 2" in lines_of(capsys, run, "--clean", other, tmp_path / "b" / "out.jsonl")[0]
    third = tmp_path / "c" / "notes.jsonl"
    third.parent.mkdir()
    third.write_bytes(other.read_bytes())
    assert "has read several files notes.jsonl" in refusal(run, "--clean", third, tmp_path / "c" / "out.jsonl")


def test_a_file_that_has_changed_since_is_refused(run, notes, tmp_path):
    record(run, "sft")
    whole = notes.read_text().splitlines(keepends=True)
    notes.write_text("".join(whole[:5]))
    assert "notes.jsonl has changed since the run: its row 8 is not the row" in refusal(
        run, "--clean", notes, tmp_path / "o.jsonl"
    )
    os.utime(notes, (1e9, 1e9))
    assert "has changed since the run: its row 8" in refusal(run, "--clean", notes, tmp_path / "o.jsonl"), (
        "if older than it"
    )
    notes.write_text("".join(whole[1:]) + "{}\n" * 3)
    os.utime(notes, (3e9, 3e9))
    message = refusal(run, "--clean", notes, tmp_path / "o.jsonl")
    assert (
        "notes.jsonl has changed since the run: its row 3 is not the row that was dropped: the cat of number 2"
        in message
    )
    assert not (tmp_path / "o.jsonl").exists()
    notes.write_text("".join(whole))
    rows.main([str(run), "--clean", str(notes), str(tmp_path / "o.jsonl")])


def blocks(*spans, first=0):
    """Drops of blocks of those rows; the next index for each, None for a gap."""
    return [
        drop(1, i, first + i, 5.0, "x", first_row=span[0], last_row=span[1], is_block=True)
        for i, span in enumerate(spans)
        if span
    ]


@pytest.mark.parametrize(
    ("spans", "removed", "partly"),
    [
        ([(2, 5)], "3, 4", "2 (1), 5 (1)"),
        ([(2, 4), (4, 6)], "3, 4, 5", "2 (1), 6 (1)"),
        ([(2, 4), (5, 6)], "3, 4, 5", "2 (1), 6 (1)"),
        ([(2, 4), None, (4, 6)], "3, 5", "4 (2), 2 (1), 6 (1)"),
        ([(2, 2), (2, 2), (2, 3)], "", "2 (3), 3 (1)"),
        ([(2, 3), (3, 3), (3, 4)], "3", "2 (1), 4 (1)"),
        ([(7, 9), (2, 4)], "3, 8", "2 (1), 4 (1), 7 (1), 9 (1)"),
        ([(4, 4)], "", "4 (1)"),
        ([(4, ...), (5, 7)], "6", "4 (1), 5 (1), 7 (1)"),
    ],
)
def test_only_rows_that_lie_in_dropped_blocks_for_sure_are_removed(notes, tmp_path, capsys, spans, removed, partly):
    run = write_run(tmp_path / "run", blocks(*spans, first=40))
    record(run, "train", train_file=str(notes))
    os.utime(notes, (1e9, 1e9))
    first, *more, look = lines_of(capsys, run, "--clean", notes, tmp_path / "clean.jsonl")
    count = len(removed.split())
    assert first.endswith(f"notes.jsonl without {count} of its 12 rows{': ' * bool(count)}{removed}")
    told = " ".join(more)
    assert ("Removed rows may include good neighbours" in told) == bool(count)
    assert "abr sft on the same file judges each row of the file by itself." in told
    assert f"Kept {partly.count('(')} row" in told
    named = partly.replace(")", ", 5)")
    assert told.endswith(f"with the number of these blocks and their highest loss: {named}.")
    assert look == f"To see these blocks: abr rows {run}"


def test_all_rows_that_may_be_broken_are_named_by_blocks_and_then_by_loss(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "x"}\n' * 99)
    os.utime(path, (1e9, 1e9))
    losses = [3.5, 9.25, None, *(4.0 + i for i in range(12))]
    place = {"is_block": True}
    drops = [
        drop(1, i, 10 * i, loss, "x", **place, first_row=2 * i + 1, last_row=2 * i + 2)
        for i, loss in enumerate(losses)
    ]
    drops += [drop(2, 0, 400, 3.25, "x", **place, first_row=90, last_row=90)]
    drops += [drop(2, 1, 402, 3.25, "x", **place, first_row=90, last_row=90)]
    run = write_run(tmp_path / "run", drops, rows=99)
    record(run, "train", train_file=str(path))
    lines = lines_of(capsys, run, "--clean", path, tmp_path / "clean.jsonl")
    assert max(map(len, lines[1:-1])) <= 60
    named = re.findall(r"(\d+) \((\d+), ([^)]+)\)", " ".join(lines[1:]))
    assert len(named) == 2 * len(losses) + 1, "none is left out"
    assert named[:4] == [("90", "2", "3.25"), ("5", "1", "not finite"), ("6", "1", "not finite"), ("29", "1", "15")]
    assert named[-1] == ("2", "1", "3.5")


def test_all_rows_that_were_removed_with_blocks_are_named(tmp_path, capsys):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "x"}\n' * 40)
    os.utime(path, (1e9, 1e9))
    run = write_run(tmp_path / "run", blocks((3, 30)))
    record(run, "train", train_file=str(path))
    first, *_ = lines_of(capsys, run, "--clean", path, tmp_path / "clean.jsonl")
    assert first.endswith(f"without 26 of its 40 rows: {', '.join(map(str, range(4, 30)))}")


def test_a_row_of_which_only_the_beginning_is_stored_says_so(tmp_path, capsys):
    drops = [drop(1, 0, 0, 5.0, "the whole row"), drop(1, 1, 1, 6.0, "good text", targets=511, input_ids=[3] * 256)]
    shown = lines_of(capsys, write_run(tmp_path / "run", drops))
    assert shown[4:6] == ["    good text ...", "    The run stored the first 256 of more than 511 tokens."]
    assert shown[-1] == "    the whole row"


def test_blocks_are_told_from_rows_without_a_command_as_well(notes, tmp_path, capsys):
    run = write_run(tmp_path / "run", [*blocks((2, 2)), *blocks((5, 7), first=30)])
    assert "without 1 of its 12 rows: 6" in lines_of(capsys, run, "--clean", notes, tmp_path / "clean.jsonl")[0]
    run = write_run(tmp_path / "alone", blocks((2, 2)))
    record(run, "sft", train_file=str(notes))
    assert "without 0 of its 12 rows" in lines_of(capsys, run, "--clean", notes, tmp_path / "whole.jsonl")[0]


@pytest.fixture
def with_an_empty_line(notes):
    lines = notes.read_text().splitlines()
    notes.write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")
    return notes


def test_empty_lines_are_counted_as_the_command_of_the_run_counts_them(with_an_empty_line, tmp_path, capsys):
    notes = with_an_empty_line
    of_chats = write_run(tmp_path / "chats", [drop(1, 0, 3, 9.0, text_of(2))])
    record(of_chats, "sft", train_file=str(notes))
    lines_of(capsys, of_chats, "--clean", notes, tmp_path / "clean.jsonl")
    assert text_of(2) not in (tmp_path / "clean.jsonl").read_text()
    of_sentences = write_run(tmp_path / "sentences", [drop(1, 0, 2, 9.0, text_of(2))])
    record(of_sentences, "classify", train_file=str(notes))
    lines_of(capsys, of_sentences, "--clean", notes, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "clean.jsonl").read_bytes()
    both = refusal(of_chats, of_sentences, "--clean", notes, tmp_path / "both.jsonl")
    assert "has empty lines, and it is not known whether these count as rows: the runs differ in this" in both
    (of_chats / "run.json").unlink()
    alone = refusal(of_chats, "--clean", notes, tmp_path / "both.jsonl")
    assert f"{of_chats} does not record it" in alone


@pytest.mark.parametrize("names", ["train_file", "dataset_mix", "dataset_name", "source"])
def test_another_file_of_the_same_name_must_hold_the_same_rows(run, notes, tmp_path, capsys, names):
    other = tmp_path / "new" / "notes.jsonl"
    other.parent.mkdir()
    other.write_bytes(notes.read_bytes())
    source = str(notes) if names == "source" else "notes.jsonl"
    given = {"train_file": notes, "dataset_mix": f"{notes}=0.5,demo=0.5", "dataset_name": tmp_path / "data"}
    if names == "dataset_name":
        (tmp_path / "data").mkdir()
        notes = notes.rename(tmp_path / "data" / "notes.jsonl")
    run = write_run(tmp_path / "run", [drop(1, 0, i, 5.0, text_of(i), source=source) for i in (2, 7)])
    record(run, "sft", **({} if names == "source" else {names: str(given[names])}))
    assert "without 2 of its 12 rows" in lines_of(capsys, run, "--clean", other, tmp_path / "same.jsonl")[0]
    other.write_text("".join(reversed(other.read_text().splitlines(keepends=True))))
    os.utime(other, (1e9, 1e9))
    assert "its row 3 is not the row that was dropped" in refusal(run, "--clean", other, tmp_path / "out.jsonl")
    short = write_run(tmp_path / "short", [drop(1, 0, 2, 5.0, "x", source=source)])
    (short / "run.json").write_bytes((run / "run.json").read_bytes())
    told = refusal(short, "--clean", other, tmp_path / "out.jsonl")
    assert told == f"error: {short} has read {notes}, and nothing shows that {other} holds the same. Give {notes}."
    lines_of(capsys, short, "--clean", notes, tmp_path / "own.jsonl")


def test_a_file_of_chats_that_was_touched_is_the_same(tmp_path, capsys):
    path = tmp_path / "notes.jsonl"
    chats = [
        {"id": f"{i:032x}", "messages": [{"role": "user", "content": f"Name it, {name}"}, {"content": said}]}
        for i, (name, said) in enumerate(
            [("Ann", "A red fox\nran off."), ("Bob", "Nothing."), ("Cy", "Two blue birds.")]
        )
    ]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    template = "Below is an instruction that describes a task. ### Instruction: {} ### Response: {} <|end|>"
    texts = [template.format(*(message["content"] for message in chat["messages"])) for chat in chats]
    run = write_run(tmp_path / "run", [drop(1, i, i, 5.0, texts[i]) for i in (0, 2)])
    record(run, "sft", train_file=str(path))
    os.utime(path, (3e9, 3e9))
    assert "without 2 of its 3 rows: 1, 3" in lines_of(capsys, run, "--clean", path, tmp_path / "out.jsonl")[0]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats[1:] + chats[:1]))
    assert "its row 1 is not the row that was dropped" in refusal(run, "--clean", path, tmp_path / "new.jsonl")


def test_chinese_is_compared_as_well(tmp_path, capsys):
    path = tmp_path / "notes.jsonl"
    said = ["狐狸在夜里跑过田野", "鸟儿在清晨歌唱", "猫睡在温暖的窗边"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in said))
    run = write_run(tmp_path / "run", [drop(1, 0, 2, 5.0, said[2])])
    lines_of(capsys, run, "--clean", path, tmp_path / "out.jsonl")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed(said)))
    assert "its row 3 is not the row that was dropped" in refusal(run, "--clean", path, tmp_path / "new.jsonl")


class ThePosition(RowRule):
    """Drop a row of each four, whatever it holds."""

    def decide(self, row):
        return row.position % 4 != 1


def number_in(text):
    return int(re.search(r"number (\d+)", text)[1])


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl"])
def test_the_rows_that_a_classifier_was_not_trained_on_are_those_that_go(tmp_path, capsys, name):
    sentences = [f"the {'fox' if i % 3 else 'bird'} sees,\nof all, number {i} here" for i in range(16)]
    path, out = tmp_path / name, tmp_path / f"clean_{name}"
    if name.endswith("csv"):
        path.write_text("sentence,label\n\n" + "".join(f'"{text}",{i % 2}\n\n' for i, text in enumerate(sentences)))
    else:
        rows_of = ({"sentence": text, "label": i % 2} for i, text in enumerate(sentences))
        path.write_text("".join(f"\n{json.dumps(row)}\n" for row in rows_of))
    flags = ["--train_file", str(path), "--sentence_columns", "sentence", "--label_column", "label", "--do_train"]
    flags += ["--num_train_epochs", "1", "--use_cpu", "--disable_tqdm", "true", "--report_to", "none"]
    flags += ["--skip_rows", f"{__name__}:ThePosition", "--model_name_or_path", "demo"]
    classify.main([*flags, "--output_dir", str(tmp_path / "run")])
    dropped = {number_in(drop["text"]) for drop in read_drops(tmp_path / "run")}
    assert len(dropped) == 4
    rows.main([str(tmp_path / "run"), "--clean", str(path), str(out)])
    assert "without 4 of its 16 rows" in capsys.readouterr().out
    assert {int(number) for number in re.findall(r"number (\d+)", out.read_text())} == set(range(16)) - dropped
