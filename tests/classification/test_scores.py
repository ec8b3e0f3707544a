"""The tasks of GLUE: what is asked, and how answers are judged."""

from __future__ import annotations

import math

import evaluate
import numpy as np
import pytest

from abr_trainer.classification.scores import evaluate_judge, judge, predictions_of
from abr_trainer.data.tasks import PROMPTS, TASKS, ask, find_prompt, own_task

RNG = np.random.default_rng(0)

METRIC = '''
import datasets
import evaluate
from sklearn.metrics import f1_score, matthews_corrcoef
from scipy.stats import pearsonr, spearmanr


class Glue(evaluate.Metric):
    """Answers by the name of the configuration, as the metric of this name on the Hub does."""

    def _info(self):
        kind = "float32" if self.config_name == "stsb" else "int64"
        features = {"predictions": datasets.Value(kind), "references": datasets.Value(kind)}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features), format="numpy")

    def _compute(self, predictions, references):
        if self.config_name == "cola":
            return {"matthews_correlation": matthews_corrcoef(references, predictions)}
        if self.config_name == "stsb":
            pairs = predictions, references
            return {"pearson": float(pearsonr(*pairs)[0]), "spearmanr": float(spearmanr(*pairs)[0])}
        accuracy = float((predictions == references).mean())
        both = self.config_name in ("mrpc", "qqp")
        return {"accuracy": accuracy} | ({"f1": float(f1_score(references, predictions))} if both else {})
'''


def test_the_prompts_are_those_of_the_experiment():
    sentences = ["Rain fell.", "It rained."]
    asked = [ask(find_prompt(name), sentences) for name in PROMPTS]
    assert asked == [
        "Sentence 1: Rain fell. Sentence 2: It rained.",
        "Does sentence 1 mean the same as sentence 2? Sentence 1: Rain fell. Sentence 2: It rained.",
        "Bob sent a message to Alice, which one is better? Sentence 1: Rain fell. Sentence 2: It rained.",
        "Cut the crap, what's your GPA? Sentence 1: Rain fell. Sentence 2: It rained.",
    ]
    assert ask(find_prompt("Which one is it?"), sentences[:1]) == "Which one is it? Sentence: Rain fell."


def test_a_name_that_is_misspelt_is_no_text():
    with pytest.raises(ValueError, match="--prompt perfekt: did you mean perfect?"):
        find_prompt("perfekt")
    assert find_prompt("Paraphrase") == "Paraphrase"


def test_scores_by_hand():
    """Of five, three right: two of three 1s, so precision 2/3, recall 2/3; of two 0s one, so MCC is 4 - 2 over 12."""
    said, right = np.array([1, 1, 0, 1, 0]), np.array([1, 1, 1, 0, 0])
    assert judge(TASKS["mrpc"], said, right) == {"accuracy": 0.6, "f1": pytest.approx(2 / 3)}
    # (2 x 1 - 1 x 1) / sqrt(3 x 3 x 2 x 2)
    assert judge(TASKS["cola"], said, right) == {"matthews_correlation": pytest.approx(1 / 6)}
    three = own_task(["text"], ["a", "b", "c"])
    # a: 1/1 and 1/1; b: 1/2 and 1/1; c: 0 and 0
    found = judge(three, np.array([0, 1, 1]), np.array([0, 1, 2]))
    assert found == {"accuracy": pytest.approx(2 / 3), "f1_macro": pytest.approx((1 + 2 / 3 + 0) / 3)}
    # 1, 2, 4 against 1, 2, 3: deviations (-4/3, -1/3, 5/3) and (-1, 0, 1); 3 / sqrt(14/3 x 2)
    numbers = judge(TASKS["stsb"], np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    assert numbers == {"pearson": pytest.approx(3 / math.sqrt(28 / 3)), "spearmanr": pytest.approx(1.0)}


def test_a_correlation_with_one_answer_is_no_number():
    found = judge(TASKS["stsb"], np.array([2.0, 2.0, 2.0]), np.array([1.0, 2.0, 3.0]))
    assert all(math.isnan(value) for value in found.values())
    assert math.isnan(judge(TASKS["stsb"], np.array([2.0]), np.array([1.0]))["pearson"])


@pytest.mark.parametrize("name", TASKS)
def test_evaluate_finds_the_same_numbers(name, tmp_path, monkeypatch):
    """With a metric of the test in the place of that on the Hub, run by the library."""
    (tmp_path / "glue.py").write_text(METRIC)
    load = evaluate.load
    monkeypatch.setattr(evaluate, "load", lambda metric, *args: load(str(tmp_path / f"{metric}.py"), *args))
    task = TASKS[name]
    if task.labels:
        labels = RNG.integers(0, len(task.labels), 50)
        predictions = np.where(RNG.random(50) < 0.7, labels, 0)
    else:
        labels = RNG.uniform(0, 5, 50).astype(np.float32)
        predictions = labels + RNG.normal(size=50).astype(np.float32)
    assert evaluate_judge(name, task)(predictions, labels) == pytest.approx(judge(task, predictions, labels))


ONE = '''
import datasets
import evaluate
from sklearn import metrics


class One(evaluate.Metric):
    """A number by the name of the file."""

    def _info(self):
        features = datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description="", citation="", features=features, format="numpy")

    def _compute(self, predictions, references, **options):
        return {"SCORE": float(metrics.SCORE_score(references, predictions, **options))}
'''


@pytest.mark.parametrize("labels", [2, 3])
def test_evaluate_judges_tasks_of_ones_own_score_by_score(labels, tmp_path, monkeypatch):
    for score in ("accuracy", "f1"):
        (tmp_path / f"{score}.py").write_text(ONE.replace("SCORE", score))
    load = evaluate.load
    monkeypatch.setattr(evaluate, "load", lambda metric: load(str(tmp_path / f"{metric}.py")))
    task = own_task(["text"], "abc"[:labels])
    right = RNG.integers(0, labels, 40)
    said = np.where(RNG.random(40) < 0.6, right, 0)
    assert evaluate_judge(None, task)(said, right) == pytest.approx(judge(task, said, right))


def test_logits_say_a_label_or_a_number():
    assert predictions_of(np.array([[0.1, 0.2], [3.0, -1.0]]), TASKS["mrpc"]).tolist() == [1, 0]
    assert predictions_of(np.array([[0.5], [4.5]]), TASKS["stsb"]).tolist() == [0.5, 4.5]
