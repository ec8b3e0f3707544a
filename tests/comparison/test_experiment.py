"""A comparison as a user runs it: real trainings in processes of their own, interrupted, failing, and gone on with."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import run_clm_abr
from abr_trainer.cli import compare as compare_verb
from abr_trainer.cli import report as report_verb
from abr_trainer.cli.command_line import parse_arguments
from abr_trainer.comparison.arms import parse_arm
from abr_trainer.comparison.collecting import collect, tuning_of
from abr_trainer.comparison.experiment import Experiment, RunFailed, error_in
from abr_trainer.comparison.progress import share_done
from abr_trainer.data.demo import demo_texts
from abr_trainer.records.files import read_lines
from abr_trainer.records.flags import asks_to_save, complete_flags, expand_flags_file, given_flags, parse_tuning
from abr_trainer.records.shapes import SPENT
from abr_trainer.report.markdown import render_markdown
from abr_trainer.report.of_comparison import report_on_comparison
from abr_trainer.report.verdicts import circumstances, shortcomings
from tests.conftest import ROOT
from tests.schedulers.streams import batch_of_trace, trace_in

EXPERIMENT = {"out": Path("out"), "module": "run_clm_abr", "seeds": [0, 1], "flags": ["--max_passes", "12"]}


# ---- What is asked for ----


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("baseline", "--repeat_scheduler baseline"),
        ("fixed:2", '--repeat_scheduler fixed --repeat_scheduler_kwargs {"repeats": 2}'),
        ("random:3", '--repeat_scheduler random --repeat_scheduler_kwargs {"max_repeats": 3}'),
        (
            "abr:2.5,max_repeats=3",
            '--repeat_scheduler abr --repeat_scheduler_kwargs {"loss_threshold": 2.5, "max_repeats": 3}',
        ),
        ("baseline:skip_outliers=none", "--repeat_scheduler baseline --skip_outliers none"),
        ("tests.conftest:Scripted", "--repeat_scheduler tests.conftest:Scripted"),
    ],
)
def test_an_arm_is_a_rule_with_parameters_and_flags(text, flags):
    assert " ".join(parse_arm(text).arguments) == flags


def test_an_arm_that_follows_a_trace_knows_it_by_its_content(tmp_path):
    trace = trace_in(tmp_path, [batch_of_trace(1)])
    texts = [f"follow:{trace}", f"follow:trace={tmp_path}"]
    before = {parse_arm(text).fingerprint for text in texts}
    trace_in(tmp_path, [batch_of_trace(1, repeats=2)])
    after = {parse_arm(text).fingerprint for text in texts}
    assert len(before) == len(after) == 1
    assert before.isdisjoint({*after, "", parse_arm("abr").fingerprint})
    assert parse_arm("abr").fingerprint == parse_arm("follow").fingerprint == ""  # the trace is in shared flags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("follow:nowhere", "--trace nowhere does not exist."),
        ("abrr", "Unknown repeat scheduler 'abrr'. Did you mean 'abr'?"),
        ("baseline:2", "baseline has no parameters, so 2 cannot be one"),
        ("fixed:0.5", "`repeats` must be at least 1, got 0.5"),
        ("nowhere:Rule", "Cannot import repeat scheduler 'nowhere:Rule': There is no module 'nowhere' in /"),
        ("fixd:2", "Unknown repeat scheduler 'fixd'. Did you mean 'fixed'?"),
        ("abrr:loss_threshold=2", "Unknown repeat scheduler 'abrr'. Did you mean 'abr'?"),
        ("abr:loss_treshold=2", "abr has no parameter loss_treshold. Did you mean loss_threshold?"),
        ("fixed:two", "Repeat scheduler 'fixed' cannot be built from"),
    ],
)
def test_an_arm_that_cannot_be_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message.replace("?", "\\?")):
        parse_arm(text)


def test_runs_of_a_seed_differ_in_the_scheduler_alone():
    experiment = Experiment(**EXPERIMENT, arms=[parse_arm("baseline"), parse_arm("abr")])
    baseline, abr, *others = experiment.final_runs(experiment.arms)
    assert (baseline.seed, abr.seed, len(others)) == (0, 0, 2)
    assert [one for one, two in zip(baseline.argv, abr.argv, strict=True) if one != two] == ["baseline"]
    assert experiment.reference == "baseline"


def test_what_a_comparison_decides_is_refused_to_the_runs():
    for flag in ("--seed", "--output_dir", "--repeat_scheduler", "--push_to_hub"):
        with pytest.raises(ValueError, match=f"{flag} cannot be set for the runs of a comparison"):
            complete_flags([flag, "1", "--max_passes", "9"], "passes", 10)
    with pytest.raises(ValueError, match="--match passes needs the budget"):
        complete_flags([], "passes", 10)
    with pytest.raises(ValueError, match="--max_steps cannot be used with --match passes"):
        complete_flags(["--max_passes", "9", "--max_steps", "3"], "passes", 10)
    with pytest.raises(ValueError, match="--max_passes cannot be used with --match batches"):
        complete_flags(["--max-passes", "9"], "batches", 10)
    with pytest.raises(ValueError, match="--max_seconds cannot be used with --match passes.* --match seconds goes"):
        complete_flags(["--max_seconds", "60"], "passes", 10)
    with pytest.raises(ValueError, match="--match seconds needs the budget of each run. Give --max_seconds N after"):
        complete_flags([], "seconds", 10)
    for flag in ("--max_passes", "--max_steps"):
        with pytest.raises(ValueError, match=f"{flag} cannot be used with --match seconds"):
            complete_flags(["--max_seconds", "60", flag, "9"], "seconds", 10)
    with pytest.raises(
        ValueError, match="--do_eval False cannot be used: a comparison trains and evaluates every run"
    ):
        complete_flags(["--max_passes", "9", "--do_eval", "False"], "passes", 10)


def test_flags_that_are_given_are_left_alone(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("max_passes: 9\neval_strategy: epoch\ntrain_file: a.txt\n")
    rest = expand_flags_file([str(config), "--save_steps", "7", "--report-to", "wandb"])
    assert rest[:2] == ["--max_passes", "9"], "in the records of a run: the file may change"
    assert asks_to_save(rest)
    added = complete_flags(rest, "passes", 10)[len(rest) :]
    quiet = ["--sample_prompts", "0", "--disable_tqdm", "true"]
    assert added == ["--do_train", "--do_eval", "--eval_on_start", *quiet]
    assert "--do_predict" in complete_flags(["--max_passes", "9", "--test_file", "b.txt"], "passes", 10)
    with pytest.raises(ValueError, match="--load_best_model_at_end needs both"):
        complete_flags(["--max_passes", "9", "--load_best_model_at_end", "--save_steps", "3"], "passes", 10)
    best = given_flags(complete_flags(["--max_passes", "9", "--load_best_model_at_end"], "passes", 4))
    assert (best["--eval_steps"], best["--save_steps"], best["--save_strategy"]) == (["0.25"], ["0.25"], ["steps"])
    seconds = given_flags(complete_flags(["--max_seconds", "60"], "seconds", 4))
    assert (seconds["--eval_passes"], seconds["--save_passes"]) == (["0.25"], ["0.1"])
    best = given_flags(complete_flags(["--max_seconds", "60", "--load_best_model_at_end"], "seconds", 4))
    assert (best["--eval_passes"], best["--save_strategy"], best["--save_passes"]) == (["0.25"], ["best"], ["0.1"])
    once = given_flags(complete_flags(["--max_passes", "9"], "passes", 1))
    assert once["--eval_strategy"] == ["no"]
    assert "--eval_passes" not in once, "1.0 would be every pass"
    assert complete_flags(["--max_steps", "9"], "batches", 4)[5:9] == [
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "0.25",
    ]


def test_an_arm_may_stop_early_and_a_seed_may_have_data_of_its_own():
    texts = ["baseline:max_passes=9", "abr:train_file=part-{seed}.jsonl"]
    experiment = Experiment(**EXPERIMENT, arms=[parse_arm(text) for text in texts])
    first, second = (experiment.run_of(arm, 3).argv for arm in experiment.arms)
    assert given_flags(first)["--max_passes"] == ["9"]
    assert given_flags(second)["--train_file"] == ["part-3.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": [parse_arm("abr"), parse_arm("abr")]}, "--schedulers has abr twice"),
        ({"reference": "fixed:2"}, "--reference fixed:2 must be one of --schedulers"),
        (
            {"arms": [parse_arm("baseline:max_passes=19")]},
            "--schedulers baseline:max_passes=19: --max_passes 19 must be",
        ),
        (
            {"arms": [parse_arm("baseline:max_passes=9")], "match": "batches", "flags": ["--max_steps", "9"]},
            "--schedulers baseline:max_passes=9: --max_passes must be",
        ),
        ({"tune": {"max_passes": ["8", "20"]}, "tune_seeds": [0]}, "--tune: --max_passes 20 must be at most 12"),
        (
            {"tune": {"max_seconds": ["8", "20"]}, "tune_seeds": [0], "flags": ["--max_seconds", "9"]}
            | {"match": "seconds"},
            "--tune: --max_seconds 20 must be at most 9",
        ),
        ({"arms": [parse_arm("abr:max_seconds=9")]}, "--schedulers abr:max_seconds=9: --max_seconds must be the same"),
        (
            {"match": "seconds", "flags": ["--max_seconds", "9"], "jobs": 2},
            "--jobs 2 cannot be used with --match seconds: runs at the same time slow each other down.",
        ),
        (
            {"arms": [parse_arm("abr:output_dir=x")]},
            "--schedulers abr:output_dir=x: --output_dir cannot be set for the runs",
        ),
        (
            {"tune": {"seed": ["1", "2"]}, "tune_seeds": [0]},
            "--tune: --seed cannot be set for the runs of a comparison",
        ),
        ({"seeds": []}, "--seeds must be"),
        ({"seeds": [1, 1]}, "--seeds must be"),
        ({"jobs": 0}, "--jobs must be at least 1"),
        ({"jobs": 2, "launcher": "torchrun"}, "--jobs cannot be used with --launcher"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        Experiment(**{**EXPERIMENT, "arms": [parse_arm("baseline"), parse_arm("abr")], **options})


def test_tuning_tries_every_combination():
    tune = parse_tuning([["learning_rate", "1e-4", "1e-3"], ["lora_r", "4", "8", "16"]])
    experiment = Experiment(**EXPERIMENT, arms=[parse_arm("abr")], tune=tune, tune_seeds=[0])
    runs = experiment.tuning_runs(experiment.arms)
    assert len(runs) == 6
    assert runs[0].argv[-6:] == ("--learning_rate", "1e-4", "--lora_r", "4", "--seed", "0")
    assert str(runs[0].directory) == "out/runs/abr/learning_rate=1e-4/lora_r=4/seed-0"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([["learning_rate"]], "--tune learning_rate needs values to try"),
        ([["learning_rate", "1", "1"]], "--tune learning_rate has the value 1 twice"),
        ([["learning_rate", "1"], ["learning-rate", "2"]], "--tune learning_rate is given twice"),
    ],
)
def test_tuning_that_cannot_be_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        parse_tuning(settings)


def leave_run(run, program=("abr", "train"), **results):
    """Leave in the directory of a run what a finished one leaves."""
    run.directory.mkdir(parents=True)
    provenance = {"argv": [*program, *run.argv], "versions": {}, "git": None, "machine": {}}
    costs = dict.fromkeys((f"train_{name}" for name in SPENT), 9) | {"train_skips": 0}
    (run.directory / "run.json").write_text(json.dumps(provenance))
    (run.directory / "all_results.json").write_text(json.dumps({"eval_perplexity": 5.0, **costs, **results}))
    (run.directory / "trainer_state.json").write_text('{"log_history": []}')
    (run.directory / "abr_trace.jsonl").touch()


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (
            {"eval_loss": 4.1, "eval_runtime": 0.2},
            "ended without an error, but did not measure perplexity; it measured ",
        ),
        ({}, "ended without an error, but did not measure perplexity; it measured nothing"),
        ({"test_perplexity": 4.1}, "ended without an error, but .* does not contain all results of a finished run"),
    ],
)
def test_a_run_that_ends_well_without_a_score_is_said_to_lack_it(tmp_path, results, message):
    experiment = Experiment(**{**EXPERIMENT, "out": tmp_path}, arms=[parse_arm("baseline")])
    run, *_ = experiment.final_runs(experiment.arms)
    leave_run(run)
    (run.directory / "all_results.json").write_text(json.dumps({"train_passes": 9.0, **results}))
    with pytest.raises(RunFailed, match=f"^baseline seed 0 {message}") as caught:
        experiment._finish(run, 0, seconds=1.0)
    assert "exit status" not in str(caught.value)


def test_a_candidate_that_diverged_or_lacks_a_run_is_not_chosen(tmp_path):
    tune = {"learning_rate": ["1", "2", "3"]}
    experiment = Experiment(**{**EXPERIMENT, "out": tmp_path}, arms=[parse_arm("abr")], tune=tune, tune_seeds=[0, 1])
    (arm,) = experiment.arms
    for value, perplexities in {"1": (5.0, 7.0), "2": (1.0, float("nan")), "3": (1.0,)}.items():
        for seed, perplexity in enumerate(perplexities):
            leave_run(experiment.run_of(arm, seed, (("learning_rate", value),)), eval_perplexity=perplexity)
    assert experiment.chosen(arm) == (("learning_rate", "1"),)


@pytest.mark.parametrize(
    ("arm", "flag", "is_tuned"),
    [
        ("abr", "learning_rate", True),
        ("abr:learning_rate=1e-3", "learning_rate", False),
        ("abr", "loss_threshold", True),
        ("abr:loss_threshold=2.0", "loss_threshold", False),
        ("baseline", "max_repeats", False),
        ("fixed", "max_repeats", True),
        ("fixed:2", "max_repeats", False),
        ("random:mean_repeats=2.5", "max_repeats", True),
    ],
)
def test_an_arm_keeps_what_it_sets_itself_and_is_not_tuned_in_what_is_nothing_to_it(arm, flag, is_tuned):
    experiment = Experiment(**EXPERIMENT, arms=[parse_arm(arm)], tune={flag: ["1", "2"]}, tune_seeds=[0])
    assert len(experiment.candidates(experiment.arms[0])) == 1 + is_tuned
    assert len(experiment.tuning_runs(experiment.arms)) == 2 * is_tuned


def test_a_shared_flag_reaches_the_arms_whose_rule_reads_it():
    texts = ["baseline", "abr", "fixed", "abr:skip_outliers=none", "abr:loss_threshold=3.0"]
    shared = ["--max_passes", "12", "--loss-threshold=2.0", "--max_repeats", "4", "--outlier_sigmas", "6"]
    experiment = Experiment(**{**EXPERIMENT, "flags": shared}, arms=[parse_arm(text) for text in texts])
    given = {run.arm.name: given_flags(run.argv) for run in experiment.final_runs(experiment.arms)}
    of_rules = ("--loss_threshold", "--max_repeats", "--outlier_sigmas")
    assert {name: [flag for flag in of_rules if flag in flags] for name, flags in given.items()} == {
        "baseline": ["--outlier_sigmas"],
        "abr": [*of_rules],
        "fixed": ["--max_repeats", "--outlier_sigmas"],
        "abr:skip_outliers=none": ["--loss_threshold", "--max_repeats"],
        "abr:loss_threshold=3.0": [*of_rules],
    }
    assert all(flags["--max_passes"] == ["12"] for flags in given.values())
    for run in experiment.final_runs(experiment.arms):  # each run takes what it gets
        parse_arguments(run_clm_abr.ARGUMENTS, [*run.argv, "--output_dir", "x", "--report_to", "none"])


def test_a_shared_flag_that_no_arm_reads_stays_for_the_run_to_refuse():
    shared = ["--max_passes", "12", "--loss_threshold", "2.0"]
    experiment = Experiment(**{**EXPERIMENT, "flags": shared}, arms=[parse_arm("baseline"), parse_arm("fixed:2")])
    first, *_ = experiment.final_runs(experiment.arms)
    with pytest.raises(ValueError, match="--loss_threshold 2.0 means nothing to --repeat_scheduler baseline"):
        parse_arguments(run_clm_abr.ARGUMENTS, first.argv)


def test_runs_that_an_earlier_version_gave_all_shared_flags_are_kept(tmp_path):
    shared = ["--max_passes", "12", "--loss_threshold", "2.0"]
    options = {**EXPERIMENT, "out": tmp_path, "flags": shared}
    experiment = Experiment(**options, arms=[parse_arm("baseline"), parse_arm("abr")])
    for run in experiment.final_runs(experiment.arms):
        earlier = dataclasses.replace(run, argv=(*shared, *run.arm.arguments, "--seed", str(run.seed)))
        leave_run(earlier)
        assert run.results() is not None
    other = Experiment(**{**options, "flags": ["--max_passes", "12", "--loss_threshold", "3.0"]}, arms=experiment.arms)
    kept, changed, *_ = other.final_runs(other.arms)
    assert kept.results() is not None, "the threshold is nothing to the baseline"
    with pytest.raises(ValueError, match="--loss_threshold: 2.0 -> 3.0"):
        changed.results()


def test_tuning_what_no_arm_leaves_open_is_refused(tmp_path):
    options = {**EXPERIMENT, "out": tmp_path, "tune": {"loss_threshold": ["1.0", "2.0"]}, "tune_seeds": [0]}
    experiment = Experiment(**options, arms=[parse_arm("baseline"), parse_arm("abr:loss_threshold=3.0")])
    with pytest.raises(
        ValueError, match="--tune loss_threshold: of --schedulers baseline abr:loss_threshold=3.0 none"
    ):
        experiment.prepare()


def test_a_control_says_its_most_repeats_where_they_are_tuned_or_given():
    plain, stated = (parse_arm("abr").controls(2.5, states_most)[1] for states_most in (False, True))
    assert (plain.name, stated.name) == ("random:mean_repeats=2.5", "random:mean_repeats=2.5,max_repeats=5")
    assert not stated.leaves_open("max_repeats")
    assert parse_arm("abr").controls(6.5, False)[1].name == "random:mean_repeats=6.5,max_repeats=7"


def test_there_is_no_verdict_while_tuning_is_not_finished(tmp_path):
    tune = {"learning_rate": ["1", "2"]}
    options = {**EXPERIMENT, "out": tmp_path, "tune": tune, "tune_seeds": [0, 1]}
    experiment = Experiment(**options, arms=[parse_arm("baseline"), parse_arm("abr")])
    *first, last = experiment.tuning_runs(experiment.arms)
    for run in first:
        leave_run(run, eval_perplexity=5.0 + run.seed)
    data = collect(experiment, [])
    assert data["missing"] == [last.title]
    verdicts = [arm["eval_perplexity"]["verdict"] for arm in data["arms"]]
    assert verdicts == ["no difference", "no verdict: tuning is not finished"]
    unfinished, flattering, *at_edge = shortcomings(data)
    assert at_edge[1] == "abr: the best learning_rate, 1, lies at an end of what was tried. Try further values."
    assert circumstances(data, data["arms"]) == [
        "Chosen by validation perplexity: baseline learning_rate 1; abr learning_rate 1."
    ]
    assert unfinished == "Not finished and left out: abr learning_rate 2 seed 1."
    assert "There is no test split" in flattering


@pytest.mark.parametrize(
    ("flag", "values", "at_edge"),
    [("learning_rate", ["1", "2"], ["learning_rate"]), ("lr_scheduler_type", ["linear", "cosine"], [])],
)
def test_only_numbers_have_ends_beyond_which_to_try(tmp_path, flag, values, at_edge):
    options = {**EXPERIMENT, "out": tmp_path, "tune": {flag: values}, "tune_seeds": [0]}
    experiment = Experiment(**options, arms=[parse_arm("abr")])
    for run in experiment.tuning_runs(experiment.arms):
        leave_run(run)
    assert tuning_of(experiment, experiment.arms[0])["at_edge"] == at_edge


def test_the_line_that_says_most_is_shown_of_a_run_that_failed(tmp_path):
    log = tmp_path / "run.log"
    assert error_in(log) == "the log is empty."
    log.write_text("error: no such file\n[rank1] ends\n=======\n")
    assert error_in(log) == "error: no such file"
    log.write_text("ValueError: a bug\n=======\n")
    assert error_in(log) == "ValueError: a bug"


def test_controls_stay_the_same_when_seeds_are_added_and_serve_every_rule_of_that_mean(tmp_path):
    texts = ["baseline", "fixed:2", "abr", "abr:loss_threshold=2.0", "abr:skip_outliers=none"]

    def experiment(seeds):
        return Experiment(**{**EXPERIMENT, "out": tmp_path, "seeds": seeds}, arms=[parse_arm(text) for text in texts])

    first = experiment([0])
    for run in first.final_runs(first.arms):
        leave_run(run, train_batches=11, train_skips=1, train_updates=20)
    added = [arm.name for arm in first.add_controls()]
    assert added == [
        "random:mean_repeats=2",  # fixed:2 is there already
        "fixed:2,skip_outliers=none",
        "random:mean_repeats=2,skip_outliers=none",
    ]
    assert first.controlled == [
        ("abr", "fixed:2"),
        ("abr", "random:mean_repeats=2"),
        ("abr:loss_threshold=2.0", "fixed:2"),
        ("abr:loss_threshold=2.0", "random:mean_repeats=2"),
        ("abr:skip_outliers=none", "fixed:2,skip_outliers=none"),
        ("abr:skip_outliers=none", "random:mean_repeats=2,skip_outliers=none"),
    ]
    more = experiment([0, 1])
    for run in more.final_runs(more.arms):
        if run.seed == 1:
            leave_run(run, train_batches=10, train_skips=0, train_updates=50)
    assert [arm.name for arm in more.add_controls()] == added


def test_one_gpu_of_several_is_given_to_a_run_and_all_of_them_to_a_launcher(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "told.py").write_text("import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))")
    for launcher, seen in {"": "0", sys.executable: "None"}.items():
        options = {**EXPERIMENT, "out": tmp_path / seen, "module": "told", "launcher": launcher}
        experiment = Experiment(**options, arms=[parse_arm("abr")])
        experiment._facts = {"device": "cuda", "devices": 2}
        (run, *_) = experiment.final_runs(experiment.arms)
        with experiment.locked():
            experiment._start(run, slot=0).wait()
        assert run.log.read_text() == f"{seen}\n"


def test_a_directory_stays_locked_while_a_launched_run_outlives_its_comparison(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    options = {**EXPERIMENT, "out": tmp_path / "out", "module": "slow", "launcher": sys.executable}
    experiment = Experiment(**options, arms=[parse_arm("abr")])
    with experiment.locked():
        process = experiment._start(experiment.final_runs(experiment.arms)[0], slot=0)
    with pytest.raises(ValueError, match="is in use by process"), experiment.locked():
        pass
    process.terminate()
    process.wait()
    with experiment.locked():
        pass


def test_a_run_of_a_version_that_did_not_turn_samples_off_is_the_same_run(tmp_path):
    arms = [parse_arm("abr")]
    first = Experiment(**{**EXPERIMENT, "out": tmp_path, "flags": ["--use_cpu"]}, arms=arms)
    leave_run(first.final_runs(arms)[0])
    again = Experiment(**{**EXPERIMENT, "out": tmp_path, "flags": ["--use_cpu", "--sample_prompts", "0"]}, arms=arms)
    assert again.final_runs(arms)[0].results()


def test_the_same_flags_in_another_order_are_the_same_run(tmp_path):
    arms = [parse_arm("abr")]
    first = Experiment(**{**EXPERIMENT, "out": tmp_path, "flags": ["--use_cpu", "--lora_r", "4"]}, arms=arms)
    leave_run(first.final_runs(arms)[0])
    again = Experiment(**{**EXPERIMENT, "out": tmp_path, "flags": ["--lora_r=4", "--use-cpu"]}, arms=arms)
    assert again.final_runs(arms)[0].results()
    other = Experiment(**{**EXPERIMENT, "out": tmp_path, "flags": ["--use_cpu"]}, arms=arms)
    with pytest.raises(ValueError, match=r"other arguments \(--lora_r: 4 -> not given\)"):
        other.final_runs(arms)[0].results()


@pytest.mark.parametrize("program", [["run_clm_abr.py"], ["/home/you/abr-trainer/run_clm_abr.py"], ["abr", "train"]])
def test_a_finished_run_is_kept_whatever_command_it_was_started_by(tmp_path, program):
    experiment = Experiment(**{**EXPERIMENT, "out": tmp_path}, arms=[parse_arm("abr")])
    for run in experiment.final_runs(experiment.arms):
        leave_run(run, program)
        assert run.results()
    shown = render_markdown(report_on_comparison(collect(experiment, [*program[:1], "--out", str(tmp_path)])))
    assert f"{'python ' * (len(program) == 1)}{' '.join(program)} --max_passes 12 --repeat_scheduler abr" in shown


def test_flags_of_the_runs_without_dashes_before_them_are_told_apart(capsys):
    with pytest.raises(SystemExit):
        compare_verb.main(["--out", "x", "--max_passes", "9"])
    assert (
        "--max_passes is not an argument of this command. Put flags of abr train after --." in capsys.readouterr().err
    )


def test_the_share_that_is_done_is_read_off_the_trace(tmp_path):
    trace = tmp_path / "abr_trace.jsonl"
    facts = {"max_passes": None, "max_seconds": None, "max_steps": -1, "epochs": 2.0}
    assert share_done(trace, facts) == 0
    trace.write_text('{"passes": 3.0, "step": 2, "epoch": 0.5, "progress": 0.4}\n')
    assert share_done(trace, {**facts, "max_passes": 12}) == 0.25
    assert share_done(trace, {**facts, "max_steps": 4}) == 0.5
    assert share_done(trace, {**facts, "max_seconds": 60, "max_steps": 4}) == 0.4
    assert share_done(trace, facts) == 0.25


# ---- Real comparisons ----


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Flags of runs that take a second or two: on a part of the demo, which takes a second to make."""
    directory = tmp_path_factory.mktemp("texts")
    flags = ["--block_size", "64", "--per_device_train_batch_size", "4", "--learning_rate", "2e-3", "--use_cpu"]
    for split, passages in {"train": 120, "validation": 16, "test": 16}.items():
        path = directory / f"{split}.txt"
        path.write_text("\n".join(demo_texts(split)[:passages]))
        flags += [f"--{split}_file", str(path)]
    return [*flags, "--max_eval_samples", "8", "--max_passes", "12"]


def compare(out, rest, *options, schedulers=("baseline", "abr:loss_threshold=0.8")):
    return compare_verb.main(["--schedulers", *schedulers, "--out", str(out), *options, "--", *rest])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick):
    """A comparison with controls, and what it returned."""
    out = tmp_path_factory.mktemp("compare") / "cmp"
    return out, compare(out, quick, "--seeds", "2", "--controls", "--jobs", "2", "--evaluations", "3")


@pytest.mark.launches
def test_runs_are_paired_and_spend_the_same(finished):
    out, data = finished
    assert data["warnings"] == data["missing"] == data["failures"] == []
    by_seed = {seed: {run["first_loss"] for run in data["runs"] if run["seed"] == seed} for seed in (0, 1)}
    assert all(len(losses) == 1 for losses in by_seed.values()), "the same weights on the same data"
    assert by_seed[0] != by_seed[1]
    assert all(11 < run["cost"]["passes"] <= 12 for run in data["runs"])
    for run in data["runs"]:
        last = list(read_lines(out / run["directory"] / "abr_trace.jsonl"))[-1]
        assert last["learning_rate"] <= 2e-3 * 5 / 12, "decayed: the last batch begins within the last passes"
    arms = {arm["name"]: arm for arm in data["arms"]}
    assert arms["abr:loss_threshold=0.8"]["cost"]["repeats"] > 1.5 > arms["baseline"]["cost"]["repeats"]
    assert arms["abr:loss_threshold=0.8"]["cost"]["batches"] < arms["baseline"]["cost"]["batches"]


@pytest.mark.launches
def test_controls_spend_the_mean_repeats_of_the_rule(finished):
    _, data = finished
    arms = {arm["name"]: arm for arm in data["arms"]}
    pairs = [(pair["name"], pair["control"].partition(":")[0]) for pair in data["against_controls"]]
    assert pairs == [("abr:loss_threshold=0.8", "fixed"), ("abr:loss_threshold=0.8", "random")]
    controls = [arms[pair["control"]] for pair in data["against_controls"]]

    def mean(arm):
        return arm["cost"]["updates"] / (arm["cost"]["batches"] - arm["cost"]["skips"])

    assert mean(controls[0]) == pytest.approx(mean(arms["abr:loss_threshold=0.8"]), abs=0.35)  # of 6 batches or so


@pytest.mark.launches
def test_every_run_is_evaluated_at_the_same_compute(finished):
    _, data = finished
    for arm in data["arms"]:
        most = 1 if arm["name"] == "baseline" else 5  # passes over the batch after which it is evaluated
        *evaluated, last = (point["passes"] for point in arm["curve"])
        assert [0 <= passes - due < most for passes, due in zip(evaluated, (0, 3.99, 7.99), strict=True)] == [True] * 3
        assert last == pytest.approx(12, abs=0.6)
        assert arm["curve"][0]["mean"] == data["arms"][0]["curve"][0]["mean"], "an untrained adapter changes nothing"


@pytest.mark.launches
def test_a_finished_comparison_is_kept_and_more_seeds_are_added(finished, quick, capfd):
    out, data = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("all_results.json")}
    again = compare(out, quick, "--seeds", "3", "--evaluations", "3")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(again["runs"]) == 6
    assert "4 runs are already finished" in capfd.readouterr().out
    kept = {(run["arm"], run["seed"]): run["metrics"] for run in data["runs"]}
    assert all(kept.get((run["arm"], run["seed"]), run["metrics"]) == run["metrics"] for run in again["runs"])
    assert not list(out.rglob("checkpoint-*")), "they were there to resume by"


@pytest.mark.launches
def test_other_arguments_in_the_same_directory_are_refused(finished, quick):
    out, _ = finished
    rest = ["1e-3" if flag == "2e-3" else flag for flag in quick]
    with pytest.raises(SystemExit, match=r"other arguments \(--learning_rate: 2e-3 -> 1e-3\)"):
        compare(out, rest, "--seeds", "2", "--evaluations", "3")


@pytest.mark.launches
def test_another_launcher_in_the_same_directory_is_refused(finished, quick):
    out, _ = finished
    with pytest.raises(SystemExit, match=r"--launcher torchrun: the runs in .* were started with none"):
        compare(out, quick, "--seeds", "2", "--evaluations", "3", "--launcher", "torchrun")


@pytest.mark.launches
def test_the_report_is_remade_from_the_data_alone(finished, tmp_path):
    out, _ = finished
    shutil.copy(out / "comparison.json", tmp_path)
    report_verb.main([str(tmp_path)])
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    names = {path.name for path in (out / "plots").iterdir()}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == names
    assert {"curves.png", "curves.svg", "final.png", "difference.svg", "repeats_over_loss.png"} <= names


@pytest.mark.launches
def test_tensorboard_shows_every_run_over_passes_with_its_hyperparameters(finished):
    out, _ = finished
    folders = {path.parent for path in (out / "tensorboard").rglob("events*")}
    assert len(folders) >= 4
    tags = set()
    for folder in folders:
        events = EventAccumulator(str(folder))
        events.Reload()
        tags.add(tuple(sorted(events.Tags()["scalars"])))
        assert [event.step for event in events.Scalars("eval/perplexity")][-1] in (11, 12)
        assert "_hparams_/session_start_info" in events.summary_metadata
        steps = [event.step for event in events.Scalars("eval/perplexity")]
        assert steps == sorted(set(steps)), "no evaluation is there twice"
        start = HParamsPluginData.FromString(
            events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        ).session_start_info.hparams
        assert {"scheduler", "seed"} <= start.keys()
        assert "flags" not in start
        assert ("loss_threshold" in start) == ("abr" in start["scheduler"].string_value)
        experiment = events.summary_metadata["_hparams_/experiment"].plugin_data.content
        columns = {info.name for info in HParamsPluginData.FromString(experiment).experiment.hparam_infos}
        assert {"scheduler", "seed", "repeat_scheduler", "loss_threshold"} <= columns, "each run names all of them"
    (shared,) = tags
    assert {"train/loss", "train/repeats", "train/skipped", "eval/perplexity", "test/perplexity"} <= set(shared)
    assert shared[0].startswith("eval/"), "what TensorBoard shows first"
    assert shared[-1].startswith("used/")


@pytest.mark.long  # on a busy machine, all attempts can end before they are interrupted
@pytest.mark.launches
def test_an_interrupted_comparison_goes_on_to_the_same_numbers(finished, quick, tmp_path):
    _, data = finished
    options = ["--schedulers", "baseline", "abr:loss_threshold=0.8", "--seeds", "1", "--evaluations", "3"]
    for attempt in range(4):  # on a busy machine, a run may have ended before it was seen to have a checkpoint
        out = tmp_path / f"cmp-{attempt}"
        directory = out / "runs" / "baseline" / "seed-0"  # after its first checkpoint ten batches are still to come
        command = [sys.executable, "-m", "abr_trainer", "compare", *options, "--out", str(out), "--", *quick]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while process.poll() is None and not list(directory.glob("checkpoint-*/trainer_state.json")):
            if (directory / "all_results.json").exists():
                break
            time.sleep(0.02)
        if process.poll() is None and not (directory / "all_results.json").exists():
            process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
        if process.returncode:
            break
    trace = directory / "abr_trace.jsonl"
    assert process.returncode == 1
    assert "interrupted: run the same command again to continue" in output
    assert "Traceback" not in output
    assert "Warning" not in output
    batches = trace.read_text()
    time.sleep(1)
    assert trace.read_text() == batches, "no process is left behind"

    resumed = compare(out, quick, "--seeds", "1", "--evaluations", "3")
    expected = {(run["arm"], run["seed"]): run["metrics"] for run in data["runs"]}
    assert {run["arm"]: run["resumed"] for run in resumed["runs"]} == {"baseline": 1, "abr:loss_threshold=0.8": 0}
    for run in resumed["runs"]:
        assert run["metrics"] == pytest.approx(expected[run["arm"], run["seed"]], rel=1e-6)


FAILING = """
from abr_trainer import RepeatScheduler

class Failing(RepeatScheduler):
    def decide(self, observation):
        raise ValueError("this rule has a bug")
"""


@pytest.mark.launches
def test_a_run_that_fails_is_no_result(quick, tmp_path, monkeypatch, capfd):
    (tmp_path / "failing_rule.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    schedulers = ["failing_rule:Failing", "baseline"]
    with pytest.raises(
        SystemExit, match=r"failing_rule:Failing seed 0 failed with exit status 1: .*this rule has a bug"
    ) as stopped:
        compare(tmp_path / "cmp", quick, "--seeds", "1", schedulers=schedulers)
    log = Path(str(stopped.value).partition("Its log: ")[2].partition(".log")[0] + ".log")
    assert "this rule has a bug" in log.read_text()
    assert not (tmp_path / "cmp" / "comparison.json").exists()

    with pytest.raises(SystemExit) as ended:
        compare(tmp_path / "cmp", quick, "--seeds", "1", "--keep-going", schedulers=schedulers)
    assert ended.value.code == 1
    data = json.loads((tmp_path / "cmp" / "comparison.json").read_text())
    assert [run["arm"] for run in data["runs"]] == ["baseline"]
    (reason,) = data["failures"]
    assert "failing_rule:Failing seed 0 failed with exit status 1" in reason
    assert data["missing"] == []
    assert "this rule has a bug" in (tmp_path / "cmp" / "report.md").read_text()

    (tmp_path / "failing_rule.py").write_text(FAILING.replace("raise ValueError", "return 1 #"))
    with pytest.raises(
        SystemExit, match=r"The code of failing_rule:Failing has changed\. Give another --out, or remove"
    ):
        compare(tmp_path / "cmp", quick, "--seeds", "1", schedulers=schedulers)


@pytest.mark.launches
def test_flags_are_checked_before_anything_is_run(quick, tmp_path):
    with pytest.raises(SystemExit, match="error: Unknown flag --lerning_rate. Did you mean --learning_rate?"):
        compare(tmp_path / "cmp", [*quick, "--lerning_rate", "1"])
    assert not (tmp_path / "cmp" / "runs").exists()


@pytest.mark.launches
def test_two_comparisons_do_not_work_in_one_directory(quick, tmp_path):
    experiment = Experiment(**{**EXPERIMENT, "out": tmp_path}, arms=[parse_arm("baseline")])
    with experiment.locked(), pytest.raises(SystemExit, match="error: --out .* is in use by process"):
        compare(tmp_path, quick)


@pytest.mark.launches
def test_the_published_protocol_gives_all_the_same_batches_and_says_what_that_hides(quick, tmp_path):
    rest = [*quick[:-2], "--max_steps", "4", "--logging_steps", "1"]
    options = ["--match", "batches", "--seeds", "1", "--evaluations", "2"]
    data = compare(tmp_path / "cmp", rest, *options, schedulers=["baseline", "fixed:2"])
    once, twice = (arm["cost"] for arm in data["arms"])
    assert (once["batches"], once["updates"], twice["batches"], twice["updates"]) == (4, 4, 4, 8)
    assert [point["passes"] for point in data["arms"][1]["curve"]] == [0, 4, 8]
    report = (tmp_path / "cmp" / "report.md").read_text()
    assert "It cannot show that repeating pays" in report
    assert "It spent 2.0 times the passes." in report
    assert re.search(r"\*\*One seed\*\*: With fixed:2, \w+ perplexity is", report)


@pytest.mark.launches
def test_equal_seconds_are_compared_over_seconds_and_an_interrupted_run_goes_on_in_them(quick, tmp_path):
    out = tmp_path / "cmp"
    rest = [*quick[:-2], "--max_seconds", "2", "--save_steps", "2"]
    options = ["--match", "seconds", "--seeds", "1", "--evaluations", "3"]
    data = compare(out, rest, *options, schedulers=["baseline", "fixed:2"])
    assert data["match"] == "seconds"
    once, twice = (arm["cost"] for arm in data["arms"])
    for run in data["runs"]:
        before, last = list(read_lines(out / run["directory"] / "abr_trace.jsonl"))[-2:]
        assert before["progress"] < 1
        assert 0 <= last["learning_rate"] <= 2.001e-3 * (1 - before["progress"])
        assert run["cost"]["seconds"] >= 2
    assert twice["repeats"] > 1 >= once["repeats"]
    for arm in data["arms"]:
        (start, *_), (*_, end) = [[point["seconds"] for point in arm["curve"]]] * 2
        assert (start, end) == (0, pytest.approx(arm["cost"]["seconds"]))
        assert sum(point["batches"] for point in arm["over_time"]) == arm["cost"]["batches"]
        assert 0 < arm["over_time"][0]["seconds"] < arm["over_time"][-1]["seconds"] < 1.5 * end
    (point, *_) = data["arms"][1]["relative_curve"]
    assert (point["seconds"], point["mean"]) == (0, 0)
    report = (out / "report.md").read_text()
    assert "All runs had the same time, 2 seconds of training" in report
    assert "Seconds depend on the machine and on what else it does: these were taken on Linux" in report
    assert "Validation perplexity against time" in report
    assert "Equal passes are not equal compute" not in report

    run = out / data["runs"][1]["directory"]
    first, *later = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    for left in [run / "all_results.json", run / "trainer_state.json", *later]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    spent = json.loads((first / "abr_state.json").read_text())["agreed_seconds"]
    again = compare(out, rest, *options, schedulers=["baseline", "fixed:2"])
    assert [each["resumed"] for each in again["runs"]] == [0, 1]
    assert again["runs"][0] == data["runs"][0]
    lines = list(read_lines(run / "abr_trace.jsonl"))
    assert sum(line["seconds"] for line in lines) == pytest.approx(again["runs"][1]["cost"]["seconds"])
    assert lines[2]["progress"] >= spent / 2
    assert lines[-2]["progress"] < 1


@pytest.mark.launches
def test_each_scheduler_is_reported_at_the_value_that_validation_chose(quick, tmp_path):
    rest = [*(flag for flag in quick if flag not in ("--learning_rate", "2e-3")), "--max_passes", "6"]
    options = ["--seeds", "2", "--evaluations", "1", "--tune", "learning_rate", "1e-9", "2e-3", "--tune_seeds", "1"]
    data = compare(tmp_path / "cmp", rest, *options, schedulers=["baseline"])
    assert [(run["seed"], run["tuned"]) for run in data["runs"]] == [
        (seed, {"learning_rate": "2e-3"}) for seed in (0, 1)
    ]
    low, high = data["arms"][0]["tuning"]["tried"]
    assert low["eval_perplexity"] > high["eval_perplexity"]
    assert data["arms"][0]["tuning"]["at_edge"] == ["learning_rate"]
    assert "lies at an end of what was tried" in (tmp_path / "cmp" / "report.md").read_text()


@pytest.mark.launches
def test_a_launcher_starts_each_run_on_all_ranks(quick, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"
    options = ["--seeds", "1", "--evaluations", "1", "--launcher", launcher]
    data = compare(tmp_path / "cmp", [*quick, "--max_passes", "2"], *options, schedulers=["baseline"])
    (run,) = data["runs"]
    assert run["machine"]["processes"] == 2
