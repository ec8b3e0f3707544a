"""The main job, as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_clm_abr
from abr_trainer.data.arguments import DataArguments
from abr_trainer.data.blocks import load_blocks
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.perplexity.windows import TokenPerplexity, causal_nll
from abr_trainer.records.files import read_lines
from abr_trainer.schedulers import RepeatScheduler, RowRule

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--block_size", "64", "--per_device_train_batch_size", "4", "--learning_rate", "2e-3", "--use_cpu"]
QUICK += ["--disable_tqdm", "true", "--max_eval_samples", "20", "--sample_prompts", "0"]
ABR = ["--repeat_scheduler", "abr", "--loss_threshold", "0.9"]


def run(output, *flags):
    return run_clm_abr.main([*QUICK, "--output_dir", str(output), *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with everything switched on, and what it returned."""
    output = tmp_path_factory.mktemp("main") / "run"
    flags = ["--do_train", "--do_eval", "--do_predict", "--eval_on_start", "--max_passes", "60", "--save_steps", "20"]
    return output, run(output, *flags, *ABR)


def test_a_rule_that_cannot_see_the_accuracy_ends_the_run_with_one_line(tmp_path, monkeypatch):
    load = run_clm_abr.load_model

    def load_without_logits(*arguments):
        model = load(*arguments)
        model.register_forward_hook(lambda _, __, output: {"loss": output["loss"]})
        return model

    monkeypatch.setattr(run_clm_abr, "load_model", load_without_logits)
    with pytest.raises(SystemExit, match=r"^error: The --repeat_scheduler looks at the token accuracy, but") as caught:
        run(tmp_path / "run", "--do_train", "--max_steps", "1", "--repeat_scheduler", "gain")
    assert "\n" not in str(caught.value)


class Half(RepeatScheduler):
    """Ask for a part of an update."""

    def decide(self, observation):
        return 0.87


class Forgets(RowRule):
    """Decide nothing about a row."""

    def decide(self, row):
        pass


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeat_scheduler", f"{__name__}:Half", "--repeat_until", "0.5"], "Half returned 0.87. It must return an"),
        (["--skip_rows", f"{__name__}:Forgets"], "Forgets returned None. It must return True to train on the row"),
    ],
)
def test_a_rule_of_ones_own_that_decides_nonsense_ends_the_run_with_one_line(tmp_path, flags, message):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "run", "--do_train", "--max_steps", "1", *flags)
    assert str(caught.value).startswith(f"error: decide of {__name__}.{message}")
    assert "\n" not in str(caught.value)


def test_perplexity_falls_and_is_written_down(finished):
    output, results = finished
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    before = next(logs["eval_perplexity"] for logs in log if "eval_perplexity" in logs)
    assert results["eval_perplexity"] < 0.95 * before
    at_the_end = [logs for logs in log if "eval_loss" in logs and logs["step"] == results["train_batches"]]
    assert len(at_the_end) == 1, "the same weights are evaluated once"
    written = {name: json.loads((output / f"{name}_results.json").read_text()) for name in ("eval", "test", "all")}
    assert written["eval"]["eval_perplexity"] == results["eval_perplexity"] == written["all"]["eval_perplexity"]
    assert written["test"]["test_perplexity"] == results["test_perplexity"]
    assert written["eval"]["perplexity"] == written["all"]["perplexity"] == results["eval_perplexity"], "as run_clm.py"
    assert 59 < written["all"]["train_passes"] <= 60


def test_hard_batches_were_repeated_and_the_trace_adds_up(finished):
    output, results = finished
    trace = list(read_lines(output / "abr_trace.jsonl"))
    assert [batch["step"] for batch in trace] == list(range(1, results["train_batches"] + 1))
    assert sum(batch["repeats"] for batch in trace) == results["train_updates"]
    assert max(batch["repeats"] for batch in trace) > 1
    keys = {"step", "epoch", "progress", "passes", "loss", "losses", "repeats", "reason"}
    keys |= {"learning_rate", "seconds", "waiting_seconds", "memory"}
    assert all(set(batch) == keys for batch in trace)


def test_the_adapter_reloads_and_scores_the_same(finished):
    output, results = finished
    assert (output / "adapter_model.safetensors").exists()
    assert not (output / "model.safetensors").exists()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    blocks = load_blocks(DataArguments(max_eval_samples=20), tokenizer, 64, ["test"])["test"]
    total = TokenPerplexity()
    with torch.no_grad():
        for block in blocks:
            ids = torch.tensor(block["input_ids"])[None]
            total.add(*causal_nll(model(ids).logits, ids))
    assert total.perplexity == pytest.approx(results["test_perplexity"], rel=1e-5)


def test_tensorboard_has_what_the_log_has(finished):
    output, _ = finished
    (directory,) = (output / "runs").iterdir()
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    logged = ("loss", "perplexity", "repeats", "skipped", "passes", "updates", "learning_rate", "grad_norm")
    assert tags >= {f"train/{name}" for name in logged} | {"eval/loss", "eval/perplexity"}
    assert not [tag for tag in tags if "train_" in tag], "no total has a chart of one point"
    (totals,) = accumulator.Tensors("totals/text_summary")
    results = json.loads((output / "all_results.json").read_text())
    assert f"| updates | {results['train_updates']} |" in totals.tensor_proto.string_val[0].decode()


def test_the_run_says_where_it_came_from(finished):
    output, _ = finished
    provenance = json.loads((output / "run.json").read_text())
    assert provenance["argv"][:3] == ["abr", "train", "--block_size"]
    assert provenance["versions"]["torch"] == torch.__version__


def test_it_resumes_itself(finished, tmp_path):
    output, results = finished
    with pytest.raises(SystemExit, match="is not empty"):
        run(output, "--do_train")
    flags = ["--do_train", "--do_eval", "--max_passes", "60", *ABR, "--save_steps", "20"]
    again = run(output, *flags, "--resume_from_checkpoint", str(output / "checkpoint-20"))
    assert again["eval_perplexity"] == results["eval_perplexity"]


def test_it_reads_a_yaml_file_own_text_a_primer_and_a_stream(tmp_path):
    text = tmp_path / "talk.jsonl"
    turns = [{"dialog": [f"Where is lamp {i} ?", "By the river ."]} for i in range(300)]
    text.write_text("".join(json.dumps(row) + "\n" for row in turns))
    primer = tmp_path / "primer.txt"
    primer.write_text("The committee approved the estimate.\n" * 100)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"train_file: {text}\nprimer_file: {primer}\nprimer_batches: 2\nstreaming: true\nmax_steps: 5\n"
        "do_train: true\nreport_to: none\nrepeat_scheduler: fixed\nmax_repeats: 5\n"
    )
    output = tmp_path / "run"
    flags = [*QUICK, "--max_repeats", "2", "--skip_outliers", "none"]  # after the primer the text is another one
    run_clm_abr.main([str(config), *flags, "--output_dir", str(output)])
    trace = list(read_lines(output / "abr_trace.jsonl"))
    assert [(batch["repeats"], batch["reason"]) for batch in trace] == [(1, "primer")] * 2 + [(2, "constant")] * 3


def test_evaluation_alone_needs_no_training_text(tmp_path):
    results = run(tmp_path / "run", "--do_eval", "--report_to", "none")
    assert results["eval_perplexity"] > 1
    assert "train_loss" not in results


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Nothing to do. Give --do_train, --do_eval or --do_predict."),
        (["--do_train", "--repeat_scheduler", "abrr"], "Unknown repeat scheduler 'abrr'. Did you mean 'abr'?"),
        (["--do_train", "--loss_threshold", "0"], "`loss_threshold` must be positive, got 0."),
        (["--do_train", "--train_file", "missing.txt"], "--train_file missing.txt does not exist."),
        (["--do_train", "--block_size", "300"], "--block_size 300 exceeds the model's context of 256 tokens."),
        (["--do_train", "--text_column", "body"], "--text_column body is not in --dataset_name demo."),
        (["--do_train", "--model_name_or_path", "no/where"], "--model_name_or_path no/where cannot be loaded"),
        (["--do_train", "--resume_from_checkpoint", "true"], "there is no complete checkpoint in"),
        (
            ["--do_train", "--streaming"],
            "The length of a streamed data set is unknown. Give --max_steps, --max_passes or --max_seconds.",
        ),
        (
            ["--do_train", "--dataset_name", "c4"],
            "The length of a streamed data set is unknown. Give --max_steps, --max_passes or --max_seconds.",
        ),
        (["--do_train", "--skip_outliers", "sometimes"], "invalid choice: 'sometimes'"),
        (["--do_train", "--learning_rate", "abc"], "--learning_rate/--learning-rate: invalid float value: 'abc'"),
        (
            ["--do_train", "--do_eval", "--load_best_model_at_end", "--save_strategy", "no"],
            "--load_best_model_at_end needs checkpoints: --save_strategy steps, epoch or best.",
        ),
    ],
)
def test_bad_arguments_give_one_line_before_a_model_is_loaded(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(run_clm_abr, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match=re.escape(message)) as caught:
        run(tmp_path / "run", *flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "nothing may be half-written"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adam_beta2", "10"], r"Training cannot begin: Invalid beta parameter .*10.0 .ValueError."),
        (["--lr_scheduler_kwargs", '{"size": 3}'], "Training cannot begin: .*unexpected keyword argument 'size'"),
        (["--weight_decay", "nan"], "--weight_decay nan is not a finite number."),
        (["--max_grad_norm=-inf"], "--max_grad_norm -inf is not a finite number."),
        (["--model_name_or_path=--"], "--model_name_or_path cannot have the value --."),
        (["--output_dir", "a" * 3000], "aaa...: File name too long."),
    ],
)
def test_what_only_a_library_refuses_gets_one_line_and_leaves_nothing(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        run(tmp_path / "run", "--do_train", "--max_steps", "1", *flags)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.launches
def test_the_command_line_itself():
    done = subprocess.run(
        [sys.executable, "run_clm_abr.py", "--do_train", "--train_file", "missing.txt"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: --train_file missing.txt does not exist."
    assert "Traceback" not in done.stderr


def test_help_names_every_flag_of_ours(capsys):
    with pytest.raises(SystemExit):
        run_clm_abr.main(["--help"])
    help_text = capsys.readouterr().out
    for flag in ("--repeat_scheduler", "--max_passes", "--skip_outliers", "--load_in_4bit", "--primer_file"):
        assert flag in help_text
