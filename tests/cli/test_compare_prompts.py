"""A comparison of prompts: what is asked for, what a report makes of it, and one of real trainings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from abr_trainer.cli import compare_prompts, report
from abr_trainer.cli.comparing import write_up
from abr_trainer.comparison.arms import prompt_arm
from abr_trainer.comparison.collecting import collect, read_comparison
from abr_trainer.comparison.experiment import Experiment
from abr_trainer.comparison.scores import OF_CLASSIFIERS
from abr_trainer.data.tasks import TASKS, own_task
from abr_trainer.records.flags import complete_prompt_flags, given_flags
from abr_trainer.records.shapes import SPENT
from abr_trainer.report.markdown import render_markdown
from abr_trainer.report.of_comparison import report_on_comparison
from abr_trainer.report.verdicts import shortcomings
from tests.sentence_rows import write_rows

ASKED = "Same, you think?"
PROMPTS = ("none", "perfect", ASKED)
ACCURACIES = {"none": (0.6, 0.7), "perfect": (0.71, 0.8), ASKED: (0.5, 0.75)}


def experiment_of(out, prompts=PROMPTS, **options):
    asked = {"module": "abr_trainer.cli.classify", "seeds": [0, 1], "flags": [], "match": "batches"}
    asked |= {"arms": [prompt_arm(text) for text in prompts], "varied": "prompt"}
    return Experiment(**{**asked, "out": Path(out), **options})


# ---- What is asked for ----


def test_an_arm_adds_its_prompt_and_leaves_the_repeat_scheduler_to_all(tmp_path):
    experiment = experiment_of(tmp_path, flags=["--repeat_scheduler", "abr"])
    none, perfect, own, *_ = experiment.final_runs(experiment.arms)
    assert none.argv == ("--repeat_scheduler", "abr", "--prompt", "none", "--seed", "0")
    assert own.argv[2:4] == ("--prompt", ASKED)
    assert (perfect.title, own.title) == ("perfect seed 0", f'"{ASKED}" seed 0')
    assert experiment.reference == "none"
    assert experiment_of("out", ["perfect", "Same?"]).reference == "perfect"
    assert experiment.add_controls() == []


def test_prompts_go_by_directories_of_their_own_whatever_they_are_made_of():
    texts = ["none", "None.", "Same?", "Same!", "..", "¿?", "a/../b", "word " * 80, "word " * 81]
    folders = [prompt_arm(text).folder for text in texts]
    assert folders[0] == "none"
    assert len(set(folders)) == len(texts)
    assert all(folder.strip(".") and "/" not in folder and len(folder) < 60 for folder in folders)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["none", "none"], {}, "--prompts has none twice"),
        (["none"], {"reference": "perfect"}, "--reference perfect must be one of --prompts"),
        (["none"], {"tune": {"prompt": ["a", "b"]}, "tune_seeds": [0]}, "--tune: --prompt cannot be set for the runs"),
        (["none"], {"tune": {"task_name": ["a", "b"]}, "tune_seeds": [0]}, "--tune: --task_name must be the same"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_in_one_line(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        experiment_of("out", prompts, **options)


def test_a_prompt_has_text():
    with pytest.raises(ValueError, match="Write none for no prompt"):
        prompt_arm(" ")


def test_what_a_comparison_of_prompts_decides_is_refused_to_the_runs():
    for flag, instead in {"--prompt": "--prompts", "--seed": "--seeds", "--output_dir": "--out"}.items():
        with pytest.raises(ValueError, match=f"{flag} cannot be set for the runs of a comparison. Use {instead}"):
            complete_prompt_flags([flag, "1"])
    with pytest.raises(ValueError, match="--do_train no cannot be used: a comparison trains and evaluates every run"):
        complete_prompt_flags(["--do_train", "no"])
    with pytest.raises(ValueError, match="group_by_length cannot be used: a prompt changes the lengths"):
        complete_prompt_flags(["--train_sampling_strategy", "group_by_length"])
    complete_prompt_flags(["--repeat_scheduler", "abr", "--max_passes", "9"])


@pytest.mark.parametrize(
    ("rest", "predicts"),
    [
        ([], True),  # mrpc
        (["--task_name", "MRPC"], True),
        (["--task_name", "demo"], True),
        (["--task_name", "rte"], False),
        (["--task_name", "mrpc", "--train_file", "a", "--validation_file", "b"], False),
        (["--task_name", "rte", "--train_file", "a", "--validation_file", "b", "--test_file", "c"], True),
    ],
)
def test_the_test_split_is_judged_where_its_labels_are_known(rest, predicts):
    flags = complete_prompt_flags(rest)
    assert ("--do_predict" in flags) == predicts
    assert {"--do_train", "--do_eval"} <= given_flags(flags).keys()
    assert not {"--eval_strategy", "--eval_steps"} & given_flags(flags).keys(), "a run evaluates every epoch"


def test_every_score_of_a_classifier_is_known():
    own = [own_task(["text"], labels) for labels in ([], ["a", "b"], ["a", "b", "c"])]
    assert {score.name for score in OF_CLASSIFIERS} == {
        name for task in (*TASKS.values(), *own) for name in task.scores
    }


# ---- What a report makes of it ----


def leave_run(run, accuracy, prompt=None, **results):
    """Leave in the directory of a run what a finished one of two epochs leaves."""
    run.directory.mkdir(parents=True)
    provenance = {"argv": ["abr", "classify", *run.argv], "versions": {}, "git": None, "machine": {}}
    costs = dict.fromkeys((f"train_{name}" for name in SPENT), 8) | {"train_skips": 0, "train_repeats": 1.0}
    files = {
        "run.json": {**provenance, "arguments": {"prompt_text": prompt}},
        "all_results.json": {**costs, "eval_accuracy": accuracy, "eval_f1": 0.5, **results},
        "trainer_state.json": {
            "log_history": [
                {"step": 4 * epoch, "epoch": float(epoch), "eval_accuracy": 0.5 + epoch / 2 * (accuracy - 0.5)}
                for epoch in range(3)
            ]
        },
        "config.json": {"model_type": "llama", "_name_or_path": str(run.directory)},
        "adapter_config.json": {"r": 8},
    }
    for name, content in files.items():
        (run.directory / name).write_text(json.dumps(content))
    shared = {"repeats": 1, "learning_rate": 1e-3, "seconds": 0.5}
    batches = [
        {"step": i, "epoch": i / 4, "passes": i, "loss": 1 / (i + accuracy), "losses": [1 / (i + accuracy)], **shared}
        for i in range(1, 9)
    ]
    (run.directory / "abr_trace.jsonl").write_text("".join(json.dumps(batch) + "\n" for batch in batches))


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A comparison of runs that never were, and its data."""
    experiment = experiment_of(tmp_path_factory.mktemp("made-up"))
    for arm in experiment.arms:
        for run in experiment.final_runs([arm]):
            leave_run(run, ACCURACIES[arm.name][run.seed], prompt=arm.name, train_tokens=100 * len(arm.name))
    return experiment, write_up(experiment, ["abr", "compare-prompts"])


def test_runs_are_judged_by_their_first_score(made_up):
    _, data = made_up
    assert (data["varied"], data["metric"], data["reference"]) == ("prompt", "eval_accuracy", "none")
    none, perfect, own = data["arms"]
    assert perfect["eval_accuracy"]["difference"]["mean"] == pytest.approx(0.105)
    assert perfect["eval_accuracy"]["difference"]["wins"] == 2
    assert perfect["eval_accuracy"]["verdict"] == "better"  # 0.11 and 0.10; t(0.975, 1) = 12.7: 0.105 +- 0.064
    assert own["eval_accuracy"]["verdict"] == "no evidence"
    assert [point["epoch"] for point in none["curve"]] == [0, 1, 2]
    assert perfect["relative_curve"][2]["mean"] == pytest.approx(0.105)
    assert none["loss_curve"][0]["mean"] == pytest.approx((1 / 1.6 + 1 / 1.7) / 2)
    assert data["warnings"] == []


def test_a_report_on_prompts_says_which_way_is_better(made_up):
    _, data = made_up
    text = render_markdown(report_on_comparison(data))
    for part in (
        '# Does the prompt matter? perfect, "Same, you think?" against none',
        "All runs saw the same rows, 2 epochs of them.",
        "**1 of 2 better**: Yes: against none, perfect is better; for the other one, the seeds cannot tell.",
        "**Better**: With perfect, validation accuracy is 0.105 higher than with none.",
        "Difference +0.105, 95 % interval +0.0415 to +0.169, higher with 2 of 2 seeds.",
        'With "Same, you think?", validation accuracy is 0.025 lower than with none, but 2 seeds cannot tell',
        "| prompt | validation accuracy | difference to none | 95 % interval | seeds higher | verdict |",
        "| prompt | validation accuracy | validation F1 |",
        "Right is better.",
        "Right of 0 is better than none",
        "plots/curves.png",
        "plots/relative_curves.png",
        "plots/loss.png",
        "| Same, you think? | Same, you think? |",
    ):
        assert part in text
    for part in ("perplexity", "scheduler", "compute", "protocol", "repeats |", "Left", "seeds lower"):
        assert part not in text.partition("## How to repeat it")[0]


def test_what_describes_the_model_lies_beside_the_report(made_up):
    experiment, data = made_up
    first = experiment.out / data["runs"][0]["directory"]
    for name in ("config.json", "adapter_config.json"):
        assert (experiment.out / name).read_text() == (first / name).read_text()
    assert not (experiment.out / "quant_config.json").exists()


def test_long_prompts_are_cut_in_figures_and_told_apart(made_up):
    _, data = made_up
    texts = {"perfect": "Is it so? " * 20, ASKED: "Is it so? " * 21}
    renamed = json.loads(json.dumps(data))
    for arm in renamed["arms"]:
        arm["name"] = texts.get(arm["name"], arm["name"])
    for run in renamed["runs"]:
        run["arm"] = texts.get(run["arm"], run["arm"])
    names = report_on_comparison(renamed).names
    assert len(set(names)) == 3
    renamed["arms"][2]["name"] = f"Quite another. {'And more. ' * 20}"
    renamed["runs"][-1]["arm"] = renamed["runs"][-2]["arm"] = renamed["arms"][2]["name"]
    report = report_on_comparison(renamed)
    assert all(len(name) <= 80 for name in report.names)
    assert {series.name for figure in report.figures for series in figure.series} == set(report.names)


def test_the_value_of_the_highest_score_is_chosen(tmp_path):
    options = {"tune": {"learning_rate": ["1", "2", "3"]}, "tune_seeds": [0]}
    experiment = experiment_of(tmp_path, ["none"], **options)
    (arm,) = experiment.arms
    for value, accuracy in {"1": 0.6, "2": 0.7, "3": float("nan")}.items():
        leave_run(experiment.run_of(arm, 0, (("learning_rate", value),)), accuracy)
    assert experiment.chosen(arm) == (("learning_rate", "2"),)
    leave_run(experiment.run_of(arm, 1, (("learning_rate", "2"),)), 0.8)
    data = collect(experiment, [])
    assert [each["eval_accuracy"] for each in data["arms"][0]["tuning"]["tried"]] == [0.6, 0.7, None]
    assert "what is reported is the validation accuracy" in shortcomings(data)[0]
    assert "Chosen by validation accuracy: none learning" in render_markdown(report_on_comparison(data))


def test_a_run_is_finished_when_its_test_split_is_through_with_labels_or_without(tmp_path):
    experiment = experiment_of(tmp_path, ["none"], flags=["--do_predict"])
    first, second = experiment.final_runs(experiment.arms)
    leave_run(first, 0.6)
    leave_run(second, 0.6, test_runtime=1.0)
    assert first.results() is None
    assert second.results()


# ---- A real comparison ----


def sentence_files(directory):
    """Write pairs of sentences, half of them of the same words, and return the flags that name the files."""
    words = ["fox", "bird", "cat", "cow", "dog", "hen"]
    flags = []
    for split, count in {"train": 16, "validation": 8, "test": 8}.items():
        rows = [
            {
                "sentence1": f"The {words[i % 6]} ran away.",
                "sentence2": f"The {words[(i + i % 2) % 6]} ran away.",
                "label": "other" if i % 2 else "same",
            }
            for i in range(count)
        ]
        flags += [f"--{split}_file", write_rows(directory / f"{split}.jsonl", rows)]
    return flags


@pytest.mark.long
@pytest.mark.launches
def test_prompts_are_compared_from_the_command_line_to_the_report(tmp_path):
    out = tmp_path / "out"
    rest = [*sentence_files(tmp_path), "--model_name_or_path", "demo", "--use_cpu", "--num_train_epochs", "1"]
    rest += ["--learning_rate", "1e-2", "--optim", "adamw_torch"]
    command = ["--prompts", "none", "Are they the same?", "--seeds", "2", "--jobs", "2", "--out", str(out)]

    with pytest.raises(SystemExit, match="error: --block_size is not a flag here. Use --max_seq_length"):
        compare_prompts.main([*command, "--", *rest, "--block_size", "64"])
    data = compare_prompts.main([*command, "--", *rest])
    assert data["warnings"] == data["missing"] == data["failures"] == []
    assert data["metric"] == "test_accuracy"
    none, asked = data["arms"]
    assert asked["cost"]["tokens"] > none["cost"]["tokens"]
    assert asked["cost"]["batches"] == none["cost"]["batches"] == 2
    assert [point["epoch"] for point in none["curve"]] == [0, 1]
    assert [run["prompt"] for run in data["runs"]] == ["", "", "Are they the same?", "Are they the same?"]
    by_seed = [{run["first_loss"] for run in data["runs"] if run["seed"] == seed} for seed in (0, 1)]
    assert all(len(losses) == 2 for losses in by_seed), "the prompt reaches the model"
    plots = {path.name for path in (out / "plots").iterdir()}
    assert {"curves.png", "relative_curves.svg", "loss.png", "final.png", "difference.png"} <= plots
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]

    before = {path: path.stat().st_mtime_ns for path in out.rglob("all_results.json")}
    written = (out / "report.md").read_bytes()
    assert len(compare_prompts.main([*command, "--", *rest])["runs"]) == len(before) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before, "finished runs are kept"
    shutil.copy(out / "comparison.json", tmp_path)
    report.main([str(tmp_path)])
    assert (tmp_path / "report.md").read_bytes() == written
    assert read_comparison(tmp_path)["varied"] == "prompt"
