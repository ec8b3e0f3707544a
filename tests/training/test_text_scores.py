"""BLEU and ROUGE: numbers worked out by hand, and what a run measures. For ranks see `test_distributed.py`."""

from __future__ import annotations

import importlib.util
import math

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_clm_abr
from abr_trainer.data.arguments import DataArguments
from abr_trainer.data.blocks import load_blocks
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.data.prompts import prompts_in
from abr_trainer.records.files import read_json
from abr_trainer.training import text_scores
from abr_trainer.training.generation import continue_prompts
from abr_trainer.training.text_scores import PACKAGES, scores_of, text_score_lines, together
from tests.conftest import RUN

pytestmark = pytest.mark.slow

has_packages = pytest.mark.skipif(
    not all(importlib.util.find_spec(module) for module, _ in PACKAGES.values()), reason="the extra `metrics`"
)


@has_packages
def test_bleu_is_that_of_the_corpus_and_rouge_the_mean_over_texts():
    texts = ["the cat sat on the mat", "a dog ran"]
    references = ["the cat sat on the mat", "a dog sat in a box"]
    found = scores_of(["bleu", "rouge"], texts, references)
    # n-grams that match, of all: 6 + 2 of 9, 5 + 1 of 7, 4 + 0 of 5, 3 + 0 of 3. 9 words where 12 were wanted.
    expected = 100 * math.exp(1 - 12 / 9) * (8 / 9 * 6 / 7 * 4 / 5 * 3 / 3) ** 0.25
    assert found["bleu"] == pytest.approx(expected)
    # Of the second: 2 words in common of 3 and 6, 1 pair of 2 and 5; "a dog" is the longest that is in both.
    assert found["rouge1"] == pytest.approx(100 * (1 + 2 * 2 / (3 + 6)) / 2)
    assert found["rouge2"] == pytest.approx(100 * (1 + 2 * 1 / (2 + 5)) / 2)
    assert found["rougeL"] == pytest.approx(100 * (1 + 2 * 2 / (3 + 6)) / 2)
    assert list(scores_of(["bleu"], texts, references)) == ["bleu"]


@has_packages
def test_nothing_written_scores_nothing():
    assert set(scores_of(["bleu", "rouge"], ["", ""], ["the cat", "a dog"]).values()) == {0.0}


def test_a_text_that_rouge_cannot_see_is_told(caplog):
    text_scores.warn_of_other_letters(["the caf\u00e9 by the river"])
    assert not caplog.text
    text_scores.warn_of_other_letters(["\u0413\u0434\u0435 \u043a\u043e\u0442?", "x"])
    assert "rouge sees only 14% of the letters" in caplog.text


@pytest.mark.parametrize("metric", PACKAGES)
def test_a_missing_package_is_one_line_with_the_command_before_anything_else(tmp_path, monkeypatch, metric):
    monkeypatch.setitem(PACKAGES, metric, ("no_such_module", PACKAGES[metric][1]))
    flags = ["--do_train", "--do_eval", "--use_cpu", "--generation_metrics", metric]
    with pytest.raises(SystemExit) as caught:
        run_clm_abr.main([*flags, "--output_dir", str(tmp_path / "run")])
    package = PACKAGES[metric][1]
    assert str(caught.value) == (
        f'error: --generation_metrics {metric} needs {package}: pip install "abr-trainer[metrics]", or pip install '
        f"{package}."
    )
    assert not (tmp_path / "run").exists()


def test_metrics_need_something_to_be_measured_on(tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGES, "bleu", ("json", "sacrebleu"))
    with pytest.raises(SystemExit, match="--generation_metrics needs --do_eval or --do_predict"):
        run_clm_abr.main(["--do_train", "--generation_metrics", "bleu", "--output_dir", str(tmp_path / "run")])


@has_packages
def test_a_run_measures_both_sets_before_and_after_and_chooses_the_best_by_it(tmp_path, capsys):
    flags = [*RUN, "--do_predict", "--generation_metrics", "bleu", "rouge"]
    flags += ["--num_train_epochs", "2", "--save_strategy", "epoch", "--load_best_model_at_end"]
    output = tmp_path / "run"
    results = run_clm_abr.main([*flags, "--metric_for_best_model", "rougeL", "--output_dir", str(output)])
    log = read_json(output / "trainer_state.json")["log_history"]
    names = ("bleu", "rouge1", "rouge2", "rougeL")
    before = {name: value for entry in log if entry["step"] == 0 for name, value in entry.items()}
    assert {f"{prefix}_{name}" for prefix in ("eval", "test") for name in names} <= before.keys() & results.keys()
    at = {entry["step"]: entry["eval_rougeL"] for entry in log if "eval_rougeL" in entry and entry["step"]}
    state = read_json(output / "trainer_state.json")
    assert state["best_metric"] == max(at.values()) == results["eval_rougeL"], "the highest is the best"
    told = capsys.readouterr().out
    assert f"evaluation  BLEU {before['eval_bleu']:.2f} before, {results['eval_bleu']:.2f} after" in told
    assert f"test        BLEU {before['test_bleu']:.2f} before, {results['test_bleu']:.2f} after" in told
    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO_MODEL), AutoTokenizer.from_pretrained(DEMO_MODEL)
    blocks = load_blocks(DataArguments(dataset_name="demo", max_eval_samples=6), tokenizer, 64, ["test"])["test"]
    prompts = prompts_in(blocks, tokenizer)
    texts = continue_prompts(model, tokenizer, prompts, 8)
    expected = scores_of(["bleu"], [texts[i] for i in range(6)], [prompt.reference for prompt in prompts])
    assert before["test_bleu"] == expected["bleu"]


@has_packages
def test_a_run_that_only_evaluates_measures_once(tmp_path, capsys):
    flags = [flag for flag in RUN if flag != "--do_train"]
    results = run_clm_abr.main([*flags, "--generation_metrics", "bleu", "--output_dir", str(tmp_path / "run")])
    assert f"evaluation  BLEU {results['eval_bleu']:.2f}\n" in capsys.readouterr().out


def test_lines_tell_what_was_measured():
    log = [{"step": 0, "eval_bleu": 1.0}, {"step": 5, "eval_bleu": 2.0}]
    assert text_score_lines(log, {"eval_bleu": 2.0, "test_rougeL": 3.0}) == [
        "evaluation  BLEU 1.00 before, 2.00 after",
        "test        ROUGE-L 3.00",
    ]
    assert text_score_lines(log[:1], {"eval_bleu": 1.0}) == ["evaluation  BLEU 1.00"]
    assert text_score_lines([], {}) == []
    assert together(None, lambda model: {"a": 1.0}, lambda model: {"b": 2.0})(None) == {"a": 1.0, "b": 2.0}
