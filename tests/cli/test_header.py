"""What a run says before its first batch."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

import run_clm_abr
from abr_trainer.cli import header
from abr_trainer.report.figure import Facts
from abr_trainer.report.of_run import report_on_run
from abr_trainer.schedulers import RobustRows, RowRule
from tests.conftest import RUN

pytestmark = pytest.mark.slow


def told_by(capsys, tmp_path, *flags, run=RUN):
    run_clm_abr.run([*run, "--output_dir", str(tmp_path / "run"), *flags])
    out = capsys.readouterr().out
    out = out[out.index("ABR Trainer") :]
    lines, _, rest = out.partition("\n\n")
    return {line[:11].strip(): line[11:] for line in lines.splitlines()}, lines, rest


def test_the_header_says_model_data_batch_rules_budget_and_output(capsys, tmp_path):
    rules = ["--repeat_scheduler", "fixed", "--repeat_until", "0.5", "--skip_grad_norm", "6", "--skip_rows", "robust"]
    told, lines, rest = told_by(
        capsys, tmp_path, *rules, "--max_passes", "4", "--gradient_accumulation_steps", "2", "--max_steps", "3"
    )
    assert re.match(r"ABR Trainer [\d.]+, abr train\n", lines)
    assert told["model"] == "demo (LlamaForCausalLM), float32, on cpu"
    assert re.fullmatch(r"[\d,]+ of [\d,]+ parameters \(\d+\.\d+ ?%\)", told["trainable"])
    assert told["data"].startswith("demo: 24 blocks to train on (1,536 tokens), 6 blocks to evaluate on;")
    assert told["batch"] == "8 rows x 64 tokens x 2 micro-batches x 1 rank = 1,024 tokens"
    assert told["rule"] == "fixed, 2 updates on each batch, until 0.5 of the run is spent"
    assert "robust, skips a batch whose loss is 4 spreads above the last 100" in lines
    assert "gradient norm is 6 spreads above" in " ".join(lines.split())
    said = " ".join(lines.split())
    assert "rows robust, drops a row whose loss is 4.25 spreads above the usual loss of its length. Rows are" in said
    assert "Rows are blocks of 64 tokens; abr sft judges each row of the file by itself" in said
    assert told["budget"] == "4 passes, at most 3 batches"
    assert told["output"] == str(tmp_path / "run")
    assert "Before training" in rest
    assert all(len(line) <= 100 for line in lines.splitlines() if str(tmp_path) not in line)


def test_a_budget_of_seconds_is_said_before_and_at_the_end_and_on_the_page(capsys, tmp_path):
    told, _, rest = told_by(capsys, tmp_path, "--max_seconds", "1", "--max_steps", "2")
    assert told["budget"] == "1 second of training, at most 2 batches"
    (spent,) = re.findall(r"^cost .* ([\d.]+) s of 1$", rest, flags=re.MULTILINE)
    card = (tmp_path / "run/README.md").read_text()
    assert "max_steps 2, max_seconds 1" in card
    facts = next(block for block in report_on_run(tmp_path / "run").lead if isinstance(block, Facts))
    assert dict(facts.items)["seconds of 1"] == spent


class EveryOther(RowRule):
    """Drop every other row."""

    def decide(self, row):
        return row.position % 2 == 0


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        ([], "none are dropped"),
        (["--rank_rows"], "none are dropped. Rows are blocks of 64 tokens; abr sft judges each row of the file by"),
        (["--skip_rows", f"{__name__}:EveryOther"], "drops rows by EveryOther(). Rows are blocks of 64 tokens; abr"),
    ],
)
def test_the_header_says_that_rows_are_blocks_where_rows_are_judged(capsys, tmp_path, flags, rows):
    told, lines, _ = told_by(capsys, tmp_path, "--max_steps", "1", *flags)
    assert told["rows"].startswith(rows)
    assert ("abr sft" in lines) == bool(flags)


def test_the_parameters_of_the_row_rule_are_said_in_words():
    assert header._row_rule(RobustRows()).endswith("4.25 spreads above the usual loss of its length")
    assert header._row_rule(RobustRows(sigmas=5, window=512, low=0.2)) == (
        "robust, drops a row whose loss is 5 spreads above the usual loss of its length among the last 512 rows, or "
        "below 0.2 of that loss"
    )


def test_epochs_are_counted_in_batches_as_trainer_counts_them(capsys, tmp_path):
    flags = ["--per_device_train_batch_size", "5", "--num_train_epochs", "1.5", "--gradient_accumulation_steps", "2"]
    told, _, rest = told_by(capsys, tmp_path, *flags)
    # 24 blocks are 5 micro-batches, which are 3 batches: the last has one micro-batch.
    assert told["budget"] == "1.5 epochs of 3 batches, 5 in all"
    assert "batches     5 seen" in rest
    assert "20 tokens" not in told["batch"]


def test_a_stream_has_no_length_and_is_told_as_such(capsys, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("The committee approved the estimate of the river.\n" * 400)
    flags = ["--train_file", str(text), "--streaming", "--do_train", "--max_steps", "2", "--block_size", "64"]
    told, lines, _ = told_by(capsys, tmp_path, run=[*flags, "--use_cpu", "--report_to", "none"])
    assert "long.txt: a stream of blocks to train on; a block is 64 tokens" in " ".join(lines.split())
    assert told["budget"] == "2 batches"
    assert told["batch"] == "8 rows x 1 micro-batch x 1 rank = 8 rows"


def test_where_nothing_is_trained_nothing_is_said_of_batches_and_rules(capsys, tmp_path):
    told, _, rest = told_by(capsys, tmp_path, run=[flag for flag in RUN if flag != "--do_train"])
    assert {"model", "data", "output"} <= told.keys()
    assert not {"batch", "rule", "outliers", "rows", "budget"} & told.keys()
    assert re.match(r"evaluation  perplexity [\d.]+, over \d+ target tokens\n", rest)


def test_a_resumed_run_says_what_it_goes_on_from(capsys, tmp_path):
    flags = ["--save_steps", "2", "--max_steps", "4"]
    told_by(capsys, tmp_path, *flags)
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    told, _, rest = told_by(capsys, tmp_path, *flags, "--resume_from_checkpoint", checkpoint, "--logging_steps", "1")
    assert told["resumes"] == checkpoint
    rows = [line.split() for line in rest.splitlines() if re.match(r" +\d+ +\d+\.\d ", line)]
    assert rows[0][:2] == ["3", "3.0"]
    assert "before, " in rest, "the evaluation before the first batch, of the run that it goes on with"


@pytest.mark.parametrize("width", [60, 100])
def test_a_terminal_wraps_between_words_under_the_text(monkeypatch, width):
    file = io.StringIO()
    monkeypatch.setattr(header, "Console", lambda: Console(file=file, force_terminal=True, width=width, _environ={}))
    header.show_header(
        ["ABR", "data: " + "a-word-with-hyphens " * 12, "output: " + "x" * 150, "a label of words: here"]
    )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()
    assert lines[0] == "ABR"
    assert lines[1].startswith("data       a-word-with-hyphens")
    assert all(line.startswith(" " * 11 + "a-word") for line in lines[2:-2])
    assert all(len(line) <= width for line in lines[:-2])
    assert lines[-2] == "output     " + "x" * 150, "a path is not cut: it can be copied"
    assert lines[-1] == "a          label of words: here"
