"""The history of perplexity: what is said, what is written, and that looking changes nothing."""

from __future__ import annotations

import io
import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

import run_clm_abr
from abr_trainer import ABRConfig, ABRTrainer
from abr_trainer.records.files import HISTORY_NAME, TRACE_NAME, read_lines
from abr_trainer.training.tracking import BEFORE, Evaluation, PerplexityCallback, overfitting, show_history, summary
from tests.conftest import RUN, tiny_llama, token_rows, weights

pytestmark = pytest.mark.slow

EVALUATED = {"eval_strategy": "epoch", "num_train_epochs": 3, "eval_on_start": True}


def tracked(train, **options):
    own = {"eval_dataset": token_rows(4, seed=9), "callbacks": [PerplexityCallback()]}
    return train(**{**EVALUATED, **options}, trainer_options=own)


def history_of(trainer):
    return json.loads(Path(trainer.args.output_dir, HISTORY_NAME).read_text())


def test_each_evaluation_is_a_line_beside_the_first(train, capsys):
    trainer = tracked(train)
    log = [logs["eval_perplexity"] for logs in trainer.state.log_history if "eval_perplexity" in logs]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("Before", "Epoch"))]
    assert lines[0] == f"Before training: {log[0]:.2f}"
    for epoch in (1, 2, 3):
        changed = 100 * (log[epoch] / log[0] - 1)
        assert lines[epoch] == f"Epoch {epoch}: {log[epoch]:.2f} ({changed:+.1f} %)"
    assert len(lines) == 4


def test_the_history_is_that_of_log_and_trace(train):
    trainer = tracked(train)
    found = history_of(trainer)
    log = [logs for logs in trainer.state.log_history if "eval_perplexity" in logs]
    assert [each["perplexity"] for each in found["evaluations"]] == [logs["eval_perplexity"] for logs in log]
    assert [each["step"] for each in found["evaluations"]] == [0, 6, 12, 18]
    trace = [batch["loss"] for batch in read_lines(f"{trainer.args.output_dir}/{TRACE_NAME}")]
    means = [None, *(math.fsum(trace[start : start + 6]) / 6 for start in (0, 6, 12))]
    assert [each["loss"] for each in found["evaluations"]] == pytest.approx(means)
    values = [logs["eval_perplexity"] for logs in log]
    assert found["summary"] == {
        "baseline": values[0],
        "final": values[-1],
        "best": min(values),
        "best_at": ["Before training", "Epoch 1", "Epoch 2", "Epoch 3"][values.index(min(values))],
        "improvement": values[-1] / values[0] - 1,
        "batches": 18,
        "mean_loss": pytest.approx(math.fsum(trace) / 18),
    }
    for each in found["evaluations"]:
        told = each["memory"]["process"]
        assert told["before"] > 0
        assert told["peak"] >= told["before"] + told["consumed"]


def test_a_resumed_run_goes_on_with_its_history(train):
    trainer = tracked(train, save_strategy="epoch")
    whole = history_of(trainer)
    checkpoint = Path(trainer.args.output_dir, "checkpoint-12")
    found = history_of(tracked(train, save_strategy="epoch", resume_from_checkpoint=str(checkpoint)))
    numbers = ("name", "step", "perplexity", "loss")
    assert [[each[name] for name in numbers] for each in found["evaluations"]] == [
        [each[name] for name in numbers] for each in whole["evaluations"]
    ]
    assert found["summary"] == whole["summary"]


def test_an_evaluation_after_the_end_belongs_to_the_run_unless_it_was_made(train):
    trainer = tracked(train, eval_strategy="no", eval_on_start=False)
    assert not (
        trainer.args.output_dir and list(__import__("pathlib").Path(trainer.args.output_dir).glob(HISTORY_NAME))
    )
    trainer.evaluate()
    trainer.evaluate()
    trainer.evaluate(token_rows(3), metric_key_prefix="test")
    assert [each["name"] for each in history_of(trainer)["evaluations"]] == ["Epoch 3"]


def noise():
    return random.random(), np.random.rand(), torch.rand(3).tolist()


@pytest.mark.parametrize("sampling", ["random", "sequential"])
def test_evaluating_changes_nothing_in_what_is_trained(train, sampling):
    def run(**options):
        model = tiny_llama(attention_dropout=0.5)
        own = {"eval_dataset": token_rows(4, seed=9)}
        trainer = train(
            model=model, num_train_epochs=3, train_sampling_strategy=sampling, trainer_options=own, **options
        )
        return weights(trainer.model), noise(), [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]

    plain, evaluated = run(eval_strategy="no"), run(eval_strategy="steps", eval_steps=1, eval_on_start=True)
    assert torch.equal(plain[0], evaluated[0])
    assert plain[1:] == evaluated[1:]


def at(name, perplexity, loss=None):
    return Evaluation(name, 0, 0.0, perplexity, loss)


def test_it_warns_where_the_training_loss_falls_and_perplexity_rises():
    first = [at(BEFORE, 30.0), at("Epoch 1", 20.0, 3.0)]
    assert overfitting(first) is None
    assert overfitting([*first, at("Epoch 2", 22.0, 2.5)]) == (
        "Overfitting: since Epoch 1 perplexity has risen from 20.00 to 22.00, while the training loss fell from 3.000 "
        "to 2.500. --early_stopping_patience stops such a run, and keeps the best checkpoint."
    )
    assert overfitting([*first, at("Epoch 2", 22.0, 3.1)]) is None, "both rise: that is another matter"
    assert overfitting([*first, at("Epoch 2", 20.05, 2.5)]) is None, "no more than noise"
    assert overfitting([*first, at("Epoch 2", None, 2.5)]) is None
    slowly = [at(f"Epoch {2 + i}", 20.05 + 0.05 * i, 2.9 - 0.1 * i) for i in range(2)]
    assert "has risen from 20.00 to 20.10" in overfitting([*first, *slowly])
    worse_at_once = [at(BEFORE, 20.0), at("Epoch 1", 21.0, 3.0), at("Epoch 2", 22.0, 2.5)]
    assert "since before training perplexity has risen from 20.00 to 22.00" in overfitting(worse_at_once)


def test_a_run_that_overfits_is_warned_once(train, caplog):
    rows = token_rows(4)
    own = {"eval_dataset": token_rows(8, seed=5), "callbacks": [PerplexityCallback()]}
    train(data=rows, learning_rate=3e-2, **{**EVALUATED, "num_train_epochs": 12}, trainer_options=own)
    assert sum("Overfitting: since" in record.getMessage() for record in caplog.records) == 1


def test_what_is_not_finite_is_said_and_left_out_of_the_best():
    history = [at(BEFORE, 30.0), at("Epoch 1", None, 3.0), at("Epoch 2", 25.0, 2.0)]
    told = summary(history, [(1, 3.0), (2, 2.0)])
    assert (told["best"], told["best_at"], told["mean_loss"]) == (25.0, "Epoch 2", 2.5)
    assert summary(history[:2], [])["improvement"] is None


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_is_plain_where_there_is_no_terminal(train, terminal):
    trainer = tracked(train)
    shown = io.StringIO()
    show_history(Path(trainer.args.output_dir), 12, Console(file=shown, force_terminal=terminal, width=100))
    text = shown.getvalue()
    assert ("\x1b[" in text) == terminal
    for name in ("Before training", "Epoch 1", "Epoch 2", "Epoch 3", "train loss"):
        assert name in text
    assert [line.split()[:2] for line in text.splitlines() if line.rstrip().endswith("(kept)")] == [["Epoch", "2"]]


def test_a_history_of_an_earlier_version_is_read_and_gone_on_with(train, capsys):
    trainer = tracked(train, save_strategy="epoch")
    path = Path(trainer.args.output_dir, HISTORY_NAME)
    path.write_text(path.read_text().replace(BEFORE, "Baseline"))
    show_history(path.parent)
    told = capsys.readouterr().out
    assert BEFORE in told
    assert "Baseline" not in told
    checkpoint = str(path.parent / "checkpoint-6")
    assert "Baseline" not in json.dumps(
        history_of(tracked(train, save_strategy="epoch", resume_from_checkpoint=checkpoint))
    )


def test_a_long_history_is_cut_and_what_was_kept_is_in_it(tmp_path, capsys):
    tmp_path = tmp_path / "exp[abc]"  # which is markup to rich
    tmp_path.mkdir()
    memory = {"process": {"before": 0, "consumed": 0, "peak": 0}}
    entries = [{"name": f"Step {i}", "step": i, "epoch": 0.0, "perplexity": 9.0, "loss": 1.0} for i in range(60)]
    told = {
        "metric": "eval_perplexity",
        "evaluations": [{**each, "memory": memory} for each in entries],
        "summary": {},
    }
    (tmp_path / HISTORY_NAME).write_text(json.dumps(told))
    show_history(tmp_path, kept=7)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line[:8].strip() for line in lines[1:4]] == ["Before t", "Step 7", "Step 40"]
    assert lines[2].endswith("(kept)")
    assert lines[-1] == f"38 more in {tmp_path / HISTORY_NAME}"


def test_the_script_tracks_by_default_and_stops_early(tmp_path, capsys, caplog):
    output = tmp_path / "run"
    flags = [
        "--dataset_name",
        "demo",
        "--block_size",
        "64",
        "--use_cpu",
        "--disable_tqdm",
        "true",
        "--max_eval_samples",
        "8",
    ]
    flags += [
        "--max_train_samples",
        "24",
        "--learning_rate",
        "5e-2",
        "--num_train_epochs",
        "30",
        "--save_strategy",
        "epoch",
    ]
    flags += ["--do_train", "--do_eval", "--early_stopping_patience", "2", "--save_total_limit", "1"]
    results = run_clm_abr.main([*flags, "--output_dir", str(output)])
    shown = capsys.readouterr().out
    history = json.loads((output / HISTORY_NAME).read_text())
    names = [each["name"] for each in history["evaluations"]]
    assert names[:2] == [BEFORE, "Epoch 1"]
    values = [each["perplexity"] for each in history["evaluations"]]
    best = min(range(1, len(values)), key=values.__getitem__)
    assert len(values) == best + 3 < 31, "two more after the best, and no more"
    assert results["eval_perplexity"] == pytest.approx(values[best], rel=1e-6), "the best was loaded"
    assert re.search(rf"^ +0 +0\.0 +{values[0]:.2f} +Before training$", shown, flags=re.MULTILINE)
    kept = [line.split() for line in shown.splitlines() if line.rstrip().endswith("(kept)")]
    assert [line[:3] for line in kept] == [["Epoch", f"{best}", f"{values[best]:.2f}"]]
    assert f"evaluation  perplexity {values[0]:.2f} before, {values[best]:.2f} after" in shown
    assert f"kept        the model after {3 * best} of {3 * (len(values) - 1)} batches: the best checkpoint" in shown
    told = f"Training made the model worse: perplexity {values[0]:.2f} before, {values[best]:.2f} now."
    assert told in shown.splitlines()
    assert "Training made the model worse" not in caplog.text, "once is enough"


def test_early_stopping_evaluates_where_it_saves_and_goes_on_after_a_resume(train):
    """Evaluations get worse from the first on: the third in a row that is not better ends the run."""
    options = {
        "early_stopping_patience": 3,
        "do_eval": True,
        "save_steps": 2,
        "num_train_epochs": 4,
        "learning_rate": 5e-2,
        "data": token_rows(6),
        "trainer_options": {"eval_dataset": token_rows(8, seed=5)},
    }
    whole = train(**options, save_strategy="steps")
    steps = [logs["step"] for logs in whole.state.log_history if "eval_loss" in logs]
    assert steps == [2, 4, 6, 8]
    assert whole.state.global_step == 8 < 12
    assert whole.state.best_model_checkpoint.endswith("checkpoint-2")
    checkpoint = Path(whole.args.output_dir, "checkpoint-6")
    resumed = train(**options, save_strategy="steps", resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 8
    assert torch.equal(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_strategy": "no"}, "--early_stopping_patience needs evaluations: --do_eval, and --eval_strategy"),
        ({"save_strategy": "no"}, "--early_stopping_patience needs checkpoints: --save_strategy steps, epoch"),
        ({"early_stopping_patience": 0}, "--early_stopping_patience must be at least 1, got 0."),
        ({"early_stopping_patience": None, "load_best_model_at_end": True, "do_eval": False}, "needs evaluations"),
    ],
)  # fmt: skip
def test_a_best_that_no_checkpoint_would_keep_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ABRConfig(str(tmp_path), **{"early_stopping_patience": 2, "do_eval": True, "use_cpu": True, **options})


WORSE_FROM_THE_FIRST_ON = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "perplexity",
    "do_eval": True,
    "learning_rate": 5e-2,
    "num_train_epochs": 4,  # of three batches
    "data": token_rows(6),
    "trainer_options": {"eval_dataset": token_rows(8, seed=5)},
}
"""A run that overfits at once: of its evaluations the first is the best."""


def evaluated(trainer):
    """The perplexities of a run by the batch that they were measured after."""
    return {logs["step"]: logs["eval_perplexity"] for logs in trainer.state.log_history if "eval_perplexity" in logs}


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2, "save_steps": 10}, [2, 4, 6, 8, 10, 12]),
        ({"eval_strategy": "steps", "eval_steps": 4, "save_steps": 3}, [4, 8, 12]),
        ({"eval_passes": 2, "save_passes": 7}, [2, 4, 6, 8, 10, 12]),
        ({"eval_passes": 5, "save_strategy": "epoch"}, [5, 10, 12]),
        ({"eval_passes": 0.25, "max_passes": 10, "save_steps": 100}, [3, 5, 8, 10]),
        ({"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 3}, [3, 6, 9, 12]),
        ({"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "save_passes": 6}, [2, 4, 6, 8, 10, 12]),
        ({"eval_passes": 2, "save_total_limit": 1}, [2, 4, 6, 8, 10, 12]),
    ],
)
def test_the_best_of_all_evaluations_is_the_model_that_is_loaded(train, when, expected):
    trainer = train(**{**WORSE_FROM_THE_FIRST_ON, "save_strategy": "steps", **when})
    measured = evaluated(trainer)
    assert list(measured) == expected
    best = min(measured, key=measured.__getitem__)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(measured[best], rel=1e-6)
    saved = {path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")}
    assert f"checkpoint-{best}" in saved
    if when.get("save_passes") == 6:
        assert {"checkpoint-6", "checkpoint-12"} <= saved, "that they are not the best does not drop them"


def test_early_stopping_goes_with_evaluations_by_passes(train):
    trainer = train(**WORSE_FROM_THE_FIRST_ON, early_stopping_patience=2, eval_passes=2, save_strategy="steps")
    assert list(evaluated(trainer)) == [2, 4, 6]
    assert trainer.state.global_step == 6
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")


def test_a_model_that_training_made_worse_is_told(train, caplog):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "eval_on_start": True}
    trainer = train(**WORSE_FROM_THE_FIRST_ON, **options)
    measured = evaluated(trainer)
    assert (
        f"Training made the model worse: eval_perplexity was {measured[0]:.4g} before the first batch" in caplog.text
    )
    assert "the model is that of batch 3." in caplog.text


def test_a_best_that_could_not_be_found_is_told(train, caplog):
    class Broken(ABRTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            return {name: math.nan if "perplexity" in name else value for name, value in metrics.items()}

    train(**WORSE_FROM_THE_FIRST_ON, trainer_cls=Broken, eval_strategy="epoch", save_strategy="epoch")
    assert "No best model: eval_perplexity was at no evaluation a finite number" in caplog.text
    assert "the model is that of batch 12." in caplog.text


def test_a_best_without_evaluations_or_without_its_checkpoint_is_told(train, caplog, tmp_path):
    class Forgetful(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                shutil.rmtree(Path(args.output_dir, "checkpoint-3"))

    epochs = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    train(**WORSE_FROM_THE_FIRST_ON, **epochs, eval_delay=100)
    assert "No best model: nothing was evaluated while training, and the model is that of batch 12." in caplog.text
    own = {**WORSE_FROM_THE_FIRST_ON["trainer_options"], "callbacks": [Forgetful()]}
    train(**{**WORSE_FROM_THE_FIRST_ON, "trainer_options": own}, **epochs, output_dir=str(tmp_path / "forgetful"))
    assert "No checkpoint of the best evaluation, that of batch 3, is there any more" in caplog.text


def test_a_run_that_was_moved_finds_its_best_checkpoint(train, tmp_path):
    epochs = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    whole = train(**WORSE_FROM_THE_FIRST_ON, **epochs, output_dir=str(tmp_path / "before"))
    (tmp_path / "before").rename(tmp_path / "after")
    checkpoint = str(tmp_path / "after" / "checkpoint-6")
    moved = train(**WORSE_FROM_THE_FIRST_ON, **epochs, resume_from_checkpoint=checkpoint)
    assert moved.state.best_model_checkpoint == str(tmp_path / "after" / "checkpoint-3")
    assert torch.equal(weights(moved.model), weights(whole.model))


def test_the_flags_of_passes_go_with_the_best_model(tmp_path):
    output = tmp_path / "run"
    flags = ["--max_passes", "8", "--eval_passes", "2", "--save_passes", "4", "--load_best_model_at_end"]
    results = run_clm_abr.run([*RUN, *flags, "--per_device_train_batch_size", "4", "--output_dir", str(output)])
    state = json.loads((output / "trainer_state.json").read_text())
    log = [logs["eval_perplexity"] for logs in state["log_history"] if "eval_perplexity" in logs and logs["step"]]
    assert results["eval_perplexity"] == pytest.approx(min(log), rel=1e-6)


def test_early_stopping_without_patience_is_told():
    with pytest.raises(SystemExit, match="--early_stopping_threshold needs --early_stopping_patience"):
        run_clm_abr.main(["--do_train", "--early_stopping_threshold", "0.1", "--output_dir", "x"])


def test_a_trainer_tracks_only_if_asked(build):
    assert not any(isinstance(each, PerplexityCallback) for each in build(ABRTrainer).callback_handler.callbacks)
