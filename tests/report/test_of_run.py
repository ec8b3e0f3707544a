"""The report on one run, and why a batch was repeated or skipped."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import run_clm_abr
from abr_trainer.cli import report
from abr_trainer.records.files import SKIPPED_NAME, read_lines, updates_of
from abr_trainer.report.figure import Excerpts
from abr_trainer.report.of_run import progress, report_on_run
from abr_trainer.report.page import render_page
from abr_trainer.report.text import number, share
from abr_trainer.report.why import explain_batch, explain_rule, read_skipped, sentence_on, wrapped
from abr_trainer.schedulers import RepeatScheduler, RepeatUntil, ReplayScheduler, RobustOutlierSkip
from tests.report.dropped import write_slow_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with repeats and skips, and its trace."""
    directory = tmp_path_factory.mktemp("report") / "run"
    flags = ["--dataset_name", "demo", "--block_size", "64", "--per_device_train_batch_size", "4", "--use_cpu"]
    flags += ["--learning_rate", "2e-3", "--max_passes", "60", "--loss_threshold", "0.9", "--max_eval_samples", "8"]
    flags += [
        "--repeat_scheduler",
        "abr",
        "--do_train",
        "--do_eval",
        "--eval_on_start",
        "--eval_passes",
        "0.25",
        "--disable_tqdm",
        "true",
    ]
    run_clm_abr.main([*flags, "--output_dir", str(directory)])
    return directory, list(read_lines(directory / "abr_trace.jsonl"))


def texts_of(report):
    return {block.caption: block for section in report.sections for block in section.blocks if hasattr(block, "rows")}


def excerpts_of(report):
    """The skipped batches."""
    section = next(section for section in report.sections if section.heading.startswith("Skipped batches"))
    return next(block for block in section.blocks if isinstance(block, Excerpts))


def test_the_page_shows_what_happened(run):
    directory, trace = run
    report = report_on_run(directory)
    figures = {figure.name: figure for figure in report.figures}
    assert len(figures["perplexity"].series[0].x) == 5  # before, at each quarter
    points = {series.name: len(series.x) for series in figures["batches"].series}
    assert points["skipped"] == sum(batch["repeats"] == 0 for batch in trace) > 0
    assert sum(points.values()) == len(trace)
    (rate,) = figures["learning_rate"].series
    assert rate.y == tuple(batch["learning_rate"] for batch in trace)
    results = json.loads((directory / "all_results.json").read_text())
    assert ("updates", f"{results['train_updates']:,}") in texts_of(report)["What the run has spent"].rows
    assert not [block for block in report.lead if "not finished" in getattr(block, "text", "")]
    before, *_, after = figures["perplexity"].series[0].y
    assert after < before
    verdict, facts = report.lead
    assert (verdict.kind, verdict.badge) == ("good", "better")
    change = 100 * (after / before - 1)
    moved = f"{number(before)} before training to {number(after)} at the end ({change:+.1f} %)"
    assert verdict.text == f"Validation perplexity fell from {moved}."
    assert ("batches", str(len(trace))) in facts.items


def times_of(directory):
    """The section on the time: its table and its figures."""
    sections = [section for section in report_on_run(directory).sections if section.heading == "Where the time went"]
    return sections[0].blocks if sections else None


def test_the_page_says_where_the_time_of_a_run_went(run):
    directory, trace = run
    table = times_of(directory)[0]
    results = json.loads((directory / "all_results.json").read_text())
    total = results["train_total_seconds"]
    assert sum(batch["seconds"] for batch in trace) == pytest.approx(results["train_seconds"])
    known = [results[f"train_{name}_seconds"] for name in ("evaluation", "saving")]
    assert results["train_seconds"] + sum(known) <= total <= results["train_runtime"] + 1
    assert table.caption == f"{total:,.1f} seconds of training"
    rows = {what: (seconds, share) for what, seconds, share in table.rows}
    assert rows["evaluation"][0] == f"{results['train_evaluation_seconds']:,.1f}"
    in_passes = results["train_seconds"] - results["train_waiting_seconds"]
    assert rows["passes"] == (f"{in_passes:,.1f}", share(in_passes, total))


def test_the_page_of_a_run_that_waits_shows_when_it_did(tmp_path):
    run = write_slow_run(tmp_path, evaluation_seconds=20.0, saving_seconds=0.3, total_seconds=100.0)
    table, figure = times_of(run)
    assert table.rows == (
        ("passes", "48.0", "48.0 %"),
        ("waiting for data", "12.0", "12.0 %"),
        ("evaluation", "20.0", "20.0 %"),
        ("rest", "19.7", "19.7 %"),
    )
    (line,) = figure.series
    assert line.x == pytest.approx([1.5 + 3 * i for i in range(20)])
    # A part of 3 passes begins with the batch that is finished there: the 11th with number 30, which did not wait.
    assert line.y == pytest.approx([*[0.0] * 10, 0.8 / 3, *[0.4] * 9])


def test_the_time_of_a_run_at_work_is_that_of_its_batches(tmp_path):
    table, figure = times_of(write_slow_run(tmp_path))
    assert table.caption == "60.0 seconds of batches so far"
    assert table.rows == (("passes", "48.0", "80.0 %"), ("waiting for data", "12.0", "20.0 %"))
    assert figure.name == "waiting"


def test_the_page_of_a_run_that_hardly_waits_has_no_figure_of_it(tmp_path):
    (table,) = times_of(write_slow_run(tmp_path, waits=0.08))
    assert table.rows[1] == ("waiting for data", "2.4", "4.0 %")


def test_the_page_of_a_run_of_which_not_all_waits_are_known_says_nothing_of_time(tmp_path):
    run = write_slow_run(tmp_path, total_seconds=100.0)
    path = run / "abr_trace.jsonl"
    first, *others = path.read_text().splitlines()
    earlier = {name: value for name, value in json.loads(first).items() if name != "waiting_seconds"}
    path.write_text("\n".join([json.dumps(earlier), *others]) + "\n")
    assert times_of(run) is None


def test_a_run_that_made_the_model_worse_says_so():
    (worse,) = progress([[0, 146.46], [30, 139.0], [60, 155.52]])
    assert (worse.kind, worse.badge) == ("bad", "worse")
    assert worse.text.startswith(
        "Training made the model worse: validation perplexity rose from 146.5 before training"
    )
    assert progress([[0, 20.0], [9, 20.05]])[0].badge == "unchanged"
    assert "from 20 after 3 passes to 10" in progress([[3, 20.0], [9, 10.0]])[0].text, "it was not evaluated before"
    assert progress([[0, 20.0], [9, None]])[0].text == "Validation perplexity is not a finite number at the end."
    assert progress([[9, 20.0]]) == []


def test_the_page_of_a_huge_run_stays_small(run, tmp_path):
    _, trace = run
    with (tmp_path / "abr_trace.jsonl").open("w") as file:
        for step in range(1, 20_001):
            batch = trace[step % len(trace)] | {"step": step, "passes": float(step)}
            file.write(json.dumps(batch) + "\n")
    report = report_on_run(tmp_path)
    assert sum(len(series.x) for series in report.figures[0].series) <= 2 * 1500 + 1
    assert len(render_page(report)) < 1_500_000


def test_skipped_batches_are_shown_with_their_text(run):
    directory, trace = run
    items = excerpts_of(report_on_run(directory)).items
    skipped = [batch for batch in trace if batch["repeats"] == 0]
    assert [said.partition(",")[0] for said, _ in items] == [f"Batch {batch['step']}" for batch in skipped]
    assert all(said.endswith("reason: outlier") for said, _ in items)
    assert any(word in text for _, text in items for word in ("audit", "statute", "committee")), "words, not numbers"


def test_ten_skipped_batches_are_shown_and_the_others_folded(run, tmp_path):
    _, trace = run
    skipped = next(batch for batch in trace if batch["repeats"] == 0)
    lines = [json.dumps(skipped | {"step": step, "passes": float(step)}) + "\n" for step in range(1, 44)]
    (tmp_path / "abr_trace.jsonl").write_text("".join(lines))
    page = render_page(report_on_run(tmp_path))
    folded = page.index("<summary>33 more</summary>")
    assert page.index("Batch 10, ") < folded < page.index("Batch 11, ")
    assert "Batch 43, " in page


def test_the_page_is_written_where_no_push_takes_it_along(run):
    directory, _ = run
    (page,) = report.main([str(directory)])
    assert page == str(directory / "_report" / "report.html")
    assert (directory / "_report" / "plots" / "batches.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="error: .* contains neither a run .no abr_trace.jsonl. nor finished runs"):
        report.main([str(directory / "_report")])


def test_report_and_why_need_neither_torch_nor_transformers(run):
    directory, trace = run
    skipped = next(batch["step"] for batch in trace if batch["repeats"] == 0)
    code = (
        "import sys; from abr_trainer.cli.main import main; _, directory, step = sys.argv; main(['report', directory])"
    )
    code += "; main(['why', directory, step]); print({'torch', 'transformers'} & sys.modules.keys())"
    command = [sys.executable, "-c", code, str(directory), str(skipped)]
    options = {"env": os.environ | {"COLUMNS": "80"}, "capture_output": True, "text": True, "timeout": 120}
    told = subprocess.run(command, check=True, **options).stdout.splitlines()
    assert told[0] == str(directory / "_report" / "report.html")
    assert told[1:-1] == wrapped(explain_batch(directory, skipped), 80)
    assert max(map(len, told[1:-1])) <= 80
    assert told[-1] == "set()"


def test_skipped_text_is_that_of_the_tokenizer_of_transformers(run):
    directory, _ = run
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for line in read_lines(directory / SKIPPED_NAME):
        decoded = [repr(tokenizer.decode(row))[1:-1] for row in line["input_ids"]]
        assert read_skipped(directory)[line["step"]] == decoded


def test_without_a_tokenizer_the_tokens_are_shown(run, tmp_path):
    directory, _ = run
    shutil.copy(directory / SKIPPED_NAME, tmp_path)
    (texts, *_) = read_skipped(tmp_path).values()
    assert re.fullmatch(r"tokens( \d+)+", texts[0])


def test_why_a_batch_was_skipped_is_told_by_what_the_rule_saw(run):
    directory, trace = run
    skipped = next(batch for batch in trace if batch["repeats"] == 0)
    text = "\n".join(explain_batch(directory, skipped["step"]))
    first, blank, *_ = explain_batch(directory, skipped["step"])
    limit = re.fullmatch(
        rf"Batch {skipped['step']} was skipped: its loss, (.*), is above the limit for outliers, (.*)\.", first
    )
    assert float(limit[2]) < float(limit[1]) == pytest.approx(skipped["loss"], rel=1e-3)
    assert blank == ""
    assert f"{skipped['loss']:.4f} nats" in text
    trained = [batch["loss"] for batch in trace[: skipped["step"] - 1] if batch["repeats"]]
    level, limit = (float(re.search(rf"{name} +(\S+)", text)[1]) for name in ("their level", "outlier above"))
    assert min(trained) <= level <= max(trained)
    assert level < limit < skipped["loss"]
    assert "RobustOutlierSkip(inner=ThresholdScheduler(loss_threshold=0.9" in text
    assert "text " in text


def test_every_decision_of_the_run_is_explained_by_the_replayed_rule(run):
    directory, trace = run
    for batch in trace:
        text = "\n".join(explain_batch(directory, batch["step"]))
        assert "has changed since" not in text
        if batch["repeats"] > 1 and batch["reason"] == "threshold":
            times = f"{batch['loss'] / 0.9:.3g} times the threshold of 0.9"
            assert f"was trained on {batch['repeats']} times: its loss, {batch['loss']:.4g}, is {times}" in text
            assert f"loss / loss_threshold  {batch['loss'] / 0.9:.6g}" in text


@pytest.mark.parametrize(
    ("batch", "evidence", "sentence"),
    [
        (
            {"reason": "threshold", "repeats": 2},
            {"q": 0.8, "share of them below": 0.85, "losses remembered": 25},
            "was trained on 2 times: its loss, 2.5, is above 85% of the last 25 losses.",
        ),
        ({"reason": "primer", "repeats": 1}, {}, "was trained on once: the first --primer_batches batches are"),
        ({"reason": "own", "repeats": 3}, {}, "was trained on 3 times (reason: own)."),
        ({"reason": "non-finite", "repeats": 0, "loss": None}, {}, "was skipped: a loss is not a finite number"),
        ({"reason": "outlier", "repeats": 0}, {}, "was skipped (reason: outlier)."),
        ({"reason": "constant", "repeats": 1, "rows": 8, "rows_dropped": 2}, {}, "2 of its 8 rows were dropped."),
    ],
)
def test_the_reason_is_said_in_a_sentence(batch, evidence, sentence):
    assert sentence in sentence_on({"step": 7, "loss": 2.5} | batch, evidence)


def test_a_batch_that_is_not_there_is_told(run):
    directory, trace = run
    with pytest.raises(ValueError, match=f"Batch 999: .* holds batches 1 to {len(trace)}"):
        explain_batch(directory, 999)


def test_a_run_at_work_is_reported_as_far_as_it_has_come(run, tmp_path):
    directory, trace = run
    for name in ("abr_trace.jsonl", "run.json", "_skipped_batches.jsonl"):
        shutil.copy(directory / name, tmp_path)
    report = report_on_run(tmp_path)
    assert any("not finished" in getattr(block, "text", "") for block in report.lead)
    assert ("batches", f"{len(trace):,}") in texts_of(report)["What the run has spent"].rows
    (tmp_path / "run.json").unlink()
    assert "run.json is missing" in "\n".join(explain_batch(tmp_path, 1))
    assert any(text.startswith("tokens ") for _, text in excerpts_of(report_on_run(tmp_path)).items)


def test_of_a_run_at_work_the_evaluations_before_its_last_checkpoint_are_shown(run, tmp_path):
    directory, _ = run
    shutil.copy(directory / "abr_trace.jsonl", tmp_path)
    (checkpoint,) = directory.glob("checkpoint-*")
    (tmp_path / checkpoint.name).mkdir()
    shutil.copy(checkpoint / "trainer_state.json", tmp_path / checkpoint.name)
    figures = {figure.name: figure for figure in report_on_run(tmp_path).figures}
    assert len(figures["perplexity"].series[0].x) == 4, "the last one came after it"


def test_a_run_that_was_never_evaluated_is_reported(run, tmp_path):
    directory, _ = run
    shutil.copy(directory / "abr_trace.jsonl", tmp_path)
    results = json.loads((directory / "all_results.json").read_text())
    left = {name: value for name, value in results.items() if not name.startswith("eval")}
    (tmp_path / "all_results.json").write_text(json.dumps(left))
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    assert "Nothing was evaluated" in str(report_on_run(tmp_path).sections[0].blocks[0])


def test_a_trace_of_an_earlier_version_is_told(run, tmp_path):
    _, trace = run
    earlier = [{name: value for name, value in batch.items() if name != "passes"} for batch in trace]
    (tmp_path / "abr_trace.jsonl").write_text("".join(json.dumps(batch) + "\n" for batch in earlier))
    with pytest.raises(ValueError, match="was written by an earlier version"):
        report_on_run(tmp_path)


class StopsAfterTwo(ReplayScheduler):
    """Ask for five passes, and end after two."""

    def decide(self, observation):
        return 5

    def goes_on(self, observation, losses, accuracy):
        return len(losses) < 2


class Half(RepeatScheduler):
    """Train twice on batches above a loss, without evidence."""

    def __init__(self, above=2.5):
        self.above = above

    def decide(self, observation):
        return 1 + (observation.loss > self.above)


def test_each_number_stands_under_the_rule_that_it_is_of(run):
    _, trace = run
    batch = next(batch for batch in trace if batch["step"] == 20)
    lines = explain_rule(RobustOutlierSkip(RepeatUntil(Half(), until=0.5)), trace, batch)
    labels = [line for line in lines if line.startswith(("outlier rule", "end of repeats", "repeat rule"))]
    assert [line.split()[-1] for line in labels] == ["RobustOutlierSkip", "RepeatUntil", "Half"]
    assert lines.index(labels[0]) < lines.index(next(line for line in lines if "outlier above" in line))
    after = lines[lines.index(labels[2]) + 1]
    assert after == f"  {'above':<22} 2.5", "a rule without evidence shows its parameters"


def test_repeats_that_were_ended_early_and_replays_are_explained(train):
    trainer = train(repeat_scheduler=StopsAfterTwo(quantile=0.0, spacing=2))
    trace = list(read_lines(Path(trainer.args.output_dir, "abr_trace.jsonl")))
    text = "\n".join(explain_rule(StopsAfterTwo(quantile=0.0, spacing=2), trace, trace[3]))
    assert "5, and 2 were made: it was not to go on after the last pass" in text
    assert "batches waiting        2" in text
    whole = "\n".join(explain_batch(Path(trainer.args.output_dir), 4))
    (earlier,) = trace[3]["replayed"]
    assert f"trained on after it      batch 2 (loss {earlier['loss']:.4f}), once more" in whole
    assert sum(map(updates_of, trace)) == trainer.ledger.updates > sum(batch["repeats"] for batch in trace)
