"""Each file in `examples/` runs, in a quick setting, on the embedded model."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

import run_clm_abr
from abr_trainer import Observation, Outcome
from abr_trainer.cli import classify, sft
from abr_trainer.cli.main import VERBS
from abr_trainer.data.demo import demo_chats, demo_rows, demo_texts
from abr_trainer.records.files import read_lines
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
QUICK = ["--model_name_or_path", "demo", "--use_cpu", "--bf16", "false", "--report_to", "none"]
QUICK += ["--disable_tqdm", "true"]


def example(name: str, directory: Path, *flags: str) -> list[str]:
    """Return the flags that run an example quickly, in a directory of the test."""
    return [str(EXAMPLES / name), *QUICK, "--output_dir", str(directory), *flags]


def trace_of(directory: Path) -> list[dict[str, object]]:
    return list(read_lines(directory / "abr_trace.jsonl"))


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in demo_texts("train")[:100]))
    return str(path)


def write_chats(path: Path, split: str, count: int) -> str:
    path.write_text("".join(json.dumps(chat) + "\n" for chat in demo_chats(split)[:count]))
    return str(path)


def write_table(path: Path, split: str, count: int) -> str:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        table.writerows([row["sentence"], row["label"]] for row in demo_rows(split)[:count])
    return str(path)


# ---- Files of flags ----


def test_lora_trains_an_adapter_and_drops_rows(tmp_path, notes):
    flags = "--block_size", "64", "--max_passes", "5", "--eval_passes", "0.5", "--train_file", notes
    results = run_clm_abr.main(example("lora.yaml", tmp_path / "run", *flags))
    assert results["train_passes"] == 5
    assert results["train_rows_dropped"] > 0
    assert results["eval_perplexity"] > 1
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_qlora_trains_an_adapter_on_a_4_bit_base(tmp_path, notes):
    flags = "--block_size", "32", "--max_passes", "2", "--gradient_accumulation_steps", "1", "--max_eval_samples", "2"
    results = run_clm_abr.main(example("qlora.yaml", tmp_path / "run", *flags, "--train_file", notes))
    assert results["train_passes"] == 2
    adapter = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert adapter["r"] == 16
    assert "down_proj" in adapter["target_modules"], "all linear layers"
    arguments = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    assert (arguments["load_in_4bit"], arguments["optim"]) == (True, "paged_adamw_8bit")


def test_chat_learns_what_the_assistant_writes(tmp_path):
    pytest.importorskip("trl")
    files = [
        *("--train_file", write_chats(tmp_path / "chats.jsonl", "train", 16)),
        *("--validation_file", write_chats(tmp_path / "held-out.jsonl", "validation", 4)),
    ]
    quick = (
        "--chat_template",
        "alpaca",
        "--max_length",
        "96",
        "--max_passes",
        "2",
        "--gradient_accumulation_steps",
        "1",
    )
    results = sft.main(example("chat.yaml", tmp_path / "run", *files, *quick))
    assert results["train_passes"] == 2
    assert 0 < results["eval_target_tokens"] < 4 * 96, "the user's messages are no targets"


def test_classification_reads_a_table_and_keeps_the_best_checkpoint(tmp_path):
    files = [
        *("--train_file", write_table(tmp_path / "reviews.csv", "train", 32)),
        *("--validation_file", write_table(tmp_path / "reviews-validation.csv", "validation", 8)),
    ]
    results = classify.main(
        example("classification.yaml", tmp_path / "run", *files, "--max_seq_length", "32", "--num_train_epochs", "1")
    )
    assert 0 <= results["eval_accuracy"] <= 1
    assert len(trace_of(tmp_path / "run")) == 2


def test_the_file_for_several_gpus_trains_on_none_and_says_how_large_a_batch_is(notes, tmp_path):
    """By one process: what several do alike is tested with the trainer."""
    quick = "--block_size", "32", "--max_passes", "2", "--max_eval_samples", "2", "--train_file", notes
    run_clm_abr.main(example("several_gpus.yaml", tmp_path / "run", *quick))
    assert [batch["repeats"] for batch in trace_of(tmp_path / "run")] == [1, 1]
    arguments = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    rows = 8 * arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    assert f"= {rows} rows" in (EXAMPLES / "several_gpus.yaml").read_text()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_file_of_flags_says_what_starts_it_and_names_real_models(path):
    text = path.read_text()
    verb = re.search(rf"^#     .*(?:abr|abr_trainer) (train|sft|classify) examples/{path.name}", text, re.MULTILINE)[1]
    assert verb in VERBS
    flags = yaml.safe_load(text)
    assert re.fullmatch(r"[\w-]+/[\w.-]+", flags["model_name_or_path"]), "an id on the Hub"
    assert flags["output_dir"].startswith("runs/")


# ---- Python ----


def test_the_rule_trains_by_its_name_on_the_command_line(tmp_path, notes, monkeypatch):
    monkeypatch.chdir(ROOT)
    rule = "--repeat_scheduler", "examples.my_rule:TwiceWhileEarly", "--repeat_scheduler_kwargs", '{"factor": 1.05}'
    flags = "--train_file", notes, "--block_size", "64", "--max_passes", "16", "--do_train"
    run_clm_abr.main([*QUICK, *rule, *flags, "--output_dir", str(tmp_path / "run")])
    trace = trace_of(tmp_path / "run")
    early = [batch["repeats"] for batch in trace if batch["progress"] < 0.5]
    late = [batch["repeats"] for batch in trace if batch["progress"] >= 0.5]
    assert early[0] == 1, "it has seen nothing"
    assert {1, 2} <= set(early)
    assert set(late) <= {0, 1}


def test_the_rule_goes_on_from_a_checkpoint_and_says_what_it_weighs():
    names = runpy.run_path(str(EXAMPLES / "my_rule.py"))
    rule, again = names["TwiceWhileEarly"](factor=1.5), names["TwiceWhileEarly"](factor=1.5)
    first = Observation(0, 2.0, 0.0)
    rule.observe(Outcome(first, 1, (2.0,)))
    rule.observe(Outcome(Observation(1, 9.0, 0.0), 0, (9.0,)))  # skipped: it teaches nothing
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert [again.decide(Observation(2, loss, 0.1)) for loss in (2.9, 3.1)] == [1, 2]
    assert again.decide(Observation(2, 3.1, 0.5)) == 1
    assert again.evidence(first) == {"mean": 2.0, "limit": 3.0}
    assert repr(again) == "TwiceWhileEarly(factor=1.5)", "by which a checkpoint tells whether its state fits"


def test_the_script_trains_on_text_of_ones_own(tmp_path, notes, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    main = runpy.run_path(str(EXAMPLES / "train.py"))["main"]
    trainer = main(["--text", notes, "--passes", "3", "--output", str(tmp_path / "run")])
    assert trainer.ledger.passes == 3
    assert trainer.ledger.rows == 24
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "perplexity_history.json").read_text())["evaluations"]


# ---- The notebook ----

NOTEBOOK = nbformat.read(EXAMPLES / "first_run.ipynb", as_version=4)
CELLS = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


@pytest.mark.launches
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """In a kernel of its own, shortened, without touching the file."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    copy = nbformat.from_dict(NOTEBOOK)
    for cell in copy.cells:
        cell.source = cell.source.replace("PASSES = 60", "PASSES = 6").replace("[:60])", "[:8])")
    assert "PASSES = 6 " in copy.cells[1].source
    client = NotebookClient(copy, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises where a cell does
    shown = [output for cell in copy.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in shown if output.output_type == "error"]
    assert (tmp_path / "runs" / "notebook" / "abr_trace.jsonl").exists()
    assert len(trace_of(tmp_path / "runs" / "notebook")) == 6


def test_the_notebook_is_stored_with_what_it_shows_and_nothing_of_the_machine():
    shown = [[output.output_type for output in cell.outputs] for cell in CELLS]
    assert [bool(outputs) for outputs in shown] == [False] + [True] * (len(CELLS) - 1), "only the imports show nothing"
    assert not any("error" in outputs for outputs in shown)
    assert [cell.execution_count for cell in CELLS] == list(range(1, len(CELLS) + 1)), "run in order, once"
    text = nbformat.writes(NOTEBOOK)
    assert len(text) < 100_000
    assert not re.search(r"/(home|root|tmp|work)/", text)


def test_every_example_has_a_line_in_the_folder_s_readme():
    linked = re.findall(r"^\| \[([\w.]+)\]\(\1\) \|", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(linked) == sorted(
        path.name for path in EXAMPLES.iterdir() if path.suffix in (".yaml", ".py", ".ipynb")
    )
