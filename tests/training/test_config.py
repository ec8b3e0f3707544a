"""Arguments: from the command line, from files, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

from abr_trainer.cli.command_line import parse_arguments
from abr_trainer.cli.run_directory import check_output_dir, replacing_previous_run, write_provenance
from abr_trainer.data.arguments import DataArguments
from abr_trainer.models.arguments import ModelArguments
from abr_trainer.schedulers import (
    SCHEDULERS,
    ClassicOutlierSkip,
    ConstantScheduler,
    FollowScheduler,
    GradNormSkip,
    RepeatUntil,
    RobustOutlierSkip,
    ThresholdScheduler,
    UniformScheduler,
    WindowScheduler,
    reads_flag,
)
from abr_trainer.training.config import ABRConfig
from tests.schedulers.streams import batch_of_trace, trace_in

CLASSES = (ModelArguments, DataArguments, ABRConfig)


ABR = ("--repeat_scheduler", "abr")


def config(*flags: str) -> ABRConfig:
    (parsed,) = parse_arguments((ABRConfig,), ["--report_to", "none", *flags])
    return parsed


@pytest.mark.parametrize(
    ("flags", "scheduler"),
    [
        ([], RobustOutlierSkip(ConstantScheduler(repeats=1))),
        (["--repeat_scheduler", "abr", "--skip_outliers", "none"], ThresholdScheduler()),
        (
            ["--repeat_scheduler", "abr", "--loss_threshold", "q0.8", "--max_repeats", "2", "--skip_outliers", "none"],
            ThresholdScheduler(loss_threshold="q0.8", max_repeats=2),
        ),
        (["--repeat_scheduler", "fixed", "--skip_outliers", "none"], ConstantScheduler(repeats=2)),
        (
            ["--repeat_scheduler", "window", "--repeat_until", "0.85", "--skip_outliers", "none"],
            RepeatUntil(WindowScheduler(), until=0.85),
        ),
        (["--repeat_scheduler", "baseline", "--skip_outliers", "none"], ConstantScheduler(repeats=1)),
        (["--skip_grad_norm", "6"], RobustOutlierSkip(GradNormSkip(ConstantScheduler(), sigmas=6.0))),
        (
            ["--repeat_scheduler", "fixed", "--max_repeats", "3", "--skip_outliers", "none"],
            ConstantScheduler(repeats=3),
        ),
        (
            ["--repeat_scheduler", "random", "--max_repeats", "2", "--seed", "7", "--skip_outliers", "none"],
            UniformScheduler(max_repeats=2, seed=7),
        ),
        (
            [*ABR, "--loss_threshold", "0.5", "--skip_outliers", "classic", "--outlier_window", "50"],
            ClassicOutlierSkip(ThresholdScheduler(loss_threshold=0.5), window=50),
        ),
        ([*ABR, "--outlier_sigmas", "6"], RobustOutlierSkip(ThresholdScheduler(), sigmas=6.0)),
        (
            [*ABR, "--repeat_scheduler_kwargs", '{"max_repeats": 2}', "--max_repeats", "4", "--skip_outliers", "none"],
            ThresholdScheduler(max_repeats=2),
        ),
        (
            ["--repeat_scheduler", "abr_trainer.schedulers:ConstantScheduler", "--skip_outliers", "none"],
            ConstantScheduler(),
        ),
    ],
)
def test_flags_build_a_scheduler(flags, scheduler):
    assert config(*flags).build_repeat_scheduler() == scheduler


def test_flags_that_are_set_reach_a_rule_of_ones_own():
    own = ["--repeat_scheduler", "abr_trainer.schedulers:UniformScheduler", "--skip_outliers", "none"]
    assert config(*own).build_repeat_scheduler() == UniformScheduler(seed=42)
    mine = ["--repeat_scheduler", "tests.conftest:Capped", "--skip_outliers", "none"]
    assert config(*mine).build_repeat_scheduler().max_repeats == 1  # its own default
    assert config(*mine, "--max_repeats", "3").build_repeat_scheduler().max_repeats == 3


UNREAD = [
    (["--loss_threshold", "2.0"], "--loss_threshold 2.0 means nothing to --repeat_scheduler baseline: leave it out."),
    (
        ["--repeat_scheduler", "fixed", "--loss_threshold", "2.0"],
        "scheduler fixed: leave it out. It is for abr, learn",
    ),
    (
        ["--repeat_scheduler", "replay", "--max_repeats", "3"],
        "for abr, fixed, gain, kl, learnable, random, wait, window.",
    ),
    (
        ["--repeat_scheduler", "tests.conftest:Capped", "--loss_threshold", "1"],
        "to --repeat_scheduler tests.conftest:",
    ),
    (
        ["--repeat_until", "0.8"],
        "--repeat_until 0.8 means nothing to --repeat_scheduler baseline: leave it out. It is",
    ),
    (["--repeat_scheduler", "easy", "--repeat_until", "0.8"], "to --repeat_scheduler easy"),
    (["--skip_outliers", "none", "--outlier_sigmas", "3"], "none: leave it out. It is for classic, robust."),
    (["--skip_outliers", "none", "--outlier_window", "100"], "--outlier_window 100 means nothing to --skip_outliers"),
    (["--row_sigmas", "4"], "--row_sigmas 4.0 means nothing to --skip_rows none: leave it out. It is for robust."),
    (["--row_window", "256"], "--row_window 256 means nothing to --skip_rows none: leave it out. It is for robust."),
]


@pytest.mark.parametrize(("flags", "message"), UNREAD)
def test_a_flag_that_no_rule_of_the_run_reads_is_refused(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        config(*flags)
    assert "\n" not in str(caught.value)


def test_a_flag_is_refused_in_a_file_and_in_python_too(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("repeat_scheduler: fixed\nloss_threshold: 2.0\n")
    with pytest.raises(ValueError, match="--loss_threshold 2.0 means nothing to --repeat_scheduler fixed"):
        parse_arguments((ABRConfig,), [str(file)])
    with pytest.raises(ValueError, match="--loss_threshold 2.0 means nothing to --repeat_scheduler fixed"):
        ABRConfig(str(tmp_path), repeat_scheduler="fixed", loss_threshold=2.0)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_flag_that_a_rule_reads_changes_it(name, tmp_path):
    """And each that does not is refused: no flag of a rule is silently ignored."""
    other = trace_in(tmp_path / "other", [batch_of_trace(1)])
    values = {"loss_threshold": "0.5", "max_repeats": "7", "repeat_until": "0.5", "trace": other}
    for flag, value in values.items():
        flags = ["--repeat_scheduler", name, "--skip_outliers", "none"]
        if name == "follow":
            flags += ["--trace", trace_in(tmp_path / "one", [batch_of_trace(1)])]
        if reads_flag(name, flag):
            assert (
                config(*flags, f"--{flag}", value).build_repeat_scheduler() != config(*flags).build_repeat_scheduler()
            )
        else:
            with pytest.raises(ValueError, match=f"--{flag} .* means nothing to --repeat_scheduler {name}"):
                config(*flags, f"--{flag}", value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--repeat_scheduler follow needs --trace: the abr_trace.jsonl of a run, or its directory."),
        (["--trace", "{}/gone"], "gone does not exist. Give the abr_trace.jsonl of a run, or its directory."),
        (["--trace", "{}"], " holds no abr_trace.jsonl. Give the abr_trace.jsonl of a run, or its directory."),
        (["--trace", "{}/run", "--skip_outliers", "classic"], "--skip_outliers classic means nothing to --repeat_sch"),
        (
            ["--trace", "{}/run", "--outlier_sigmas", "3"],
            "--outlier_sigmas 3.0 means nothing to --repeat_scheduler fo",
        ),
        (
            ["--trace", "{}/run", "--skip_grad_norm", "6"],
            "--skip_grad_norm 6.0 means nothing to --repeat_scheduler fo",
        ),
        (["--trace", "{}/run", "--max_repeats", "2"], "--max_repeats 2 means nothing to --repeat_scheduler follow"),
        (
            ["--trace", "{}/run", "--output_dir", "{}/run"],
            "where this run writes its own trace. Use another --output_",
        ),
        (
            ["--trace", "{}/run/abr_trace.jsonl", "--output_dir", "{}/run"],
            "where this run writes its own trace. Use an",
        ),
        (
            ["--trace", "{}/run", "--output_dir", "{}", "--overwrite_output_dir"],
            "where this run writes its own trace.",
        ),
    ],
)
def test_a_trace_that_cannot_be_followed_is_refused(tmp_path, flags, message):
    trace_in(tmp_path / "run", [batch_of_trace(1)])
    flags = ["--repeat_scheduler", "follow", *(flag.format(tmp_path) for flag in flags)]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        config(*flags)
    assert "\n" not in str(caught.value)


def test_only_follow_reads_a_trace():
    with pytest.raises(
        ValueError, match="--trace run means nothing to --repeat_scheduler abr: leave it out. It is for"
    ):
        config("--repeat_scheduler", "abr", "--trace", "run")


def test_what_is_followed_is_not_judged_again(tmp_path):
    trace = trace_in(tmp_path / "run", [batch_of_trace(1)])
    assert config("--repeat_scheduler", "follow", "--trace", trace).build_repeat_scheduler() == FollowScheduler(trace)


def test_the_best_model_is_evaluated_whenever_it_is_saved():
    args = config("--do_eval", "--load_best_model_at_end", "--save_steps", "20")
    assert args.eval_strategy == args.save_strategy == "steps"


def test_published_and_robust_rules_have_their_own_sigmas():
    assert config("--skip_outliers", "classic").build_repeat_scheduler().sigmas == 2.5
    assert config("--skip_outliers", "robust").build_repeat_scheduler().sigmas == 4.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeat_scheduler", "abrr"], "Unknown repeat scheduler 'abrr'. Did you mean 'abr'?"),
        (["--loss_threshold", "0"], "`loss_threshold` must be positive, got 0."),
        (["--max_repeats", "0"], "--max_repeats must be at least 1, got 0."),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps must be at least 1, got 0."),
        (["--learning_rate", "-1"], "--learning_rate must be at least 0, got -1.0."),
        (["--max_passes", "0"], "--max_passes must be at least 1, got 0."),
        (["--max_seconds", "0"], "--max_seconds must be at least 1, got 0."),
        (["--max_seconds", "1.5"], "argument --max_seconds/--max-seconds: invalid int value: '1.5'"),
        (["--max_passes", "9", "--max_seconds", "60"], "--max_passes 9 and --max_seconds 60: a run has one budget."),
        (
            ["--max_seconds", "60", "--logging_steps", "0.1"],
            "--logging_steps 0.1 is a share of the batches, and --max_seconds does not tell how many they are. Give a "
            "number of batches.",
        ),
        (
            ["--max_seconds", "60", "--eval_strategy", "steps", "--eval_steps", "0.25"],
            "Give a number of batches, or use --eval_passes 0.25, a share of the seconds.",
        ),
        (["--max_seconds", "60", "--save_steps", "0.5"], "or use --save_passes 0.5, a share of the seconds."),
        (["--seed", "-1"], "--seed must be a whole number from 0 to 4294967295, got -1."),
        (["--seed", "100000000000000000000"], "--seed must be a whole number from 0 to 4294967295, got 1000"),
        (["--seed", "1.5"], "argument --seed: invalid int value: '1.5'"),
        (["--data_seed", "100000000000000000000"], "--data_seed must be a whole number from -9223372036854775808 to"),
        (["--max_consecutive_skips", "0"], "--max_consecutive_skips must be at least 1, got 0."),
        (["--primer_batches", "-1"], "--primer_batches must be at least 0, got -1."),
        (["--outlier_sigmas", "-1"], "`outlier_sigmas` must be positive, got -1.0."),
        (["--repeat_scheduler_kwargs", "{max: 2}"], "--repeat_scheduler_kwargs is not valid JSON"),
        (["--repeat_scheduler_kwargs", "[2]"], "--repeat_scheduler_kwargs must be a JSON object"),
        (
            [*ABR, "--repeat_scheduler_kwargs", '{"speed": 2}'],
            "'speed'. It takes: loss_threshold, max_repeats, window.",
        ),
        (["--loss_threshold", "hard"], "`loss_threshold` must be nats such as 1.0, a quantile such as q0.8 or robust"),
        ([*ABR, "--loss_threshold", "q1.5"], "`loss_threshold` must be a quantile below 1, got q1.5."),
        (["--skip_grad_norm", "0"], "`skip_grad_norm` must be positive, got 0.0."),
        (["--repeat_until", "1.5"], "`repeat_until` must be between 0 and 1, got 1.5."),
        (["--los_threshold", "1"], "Unknown flag --los_threshold. Did you mean --loss_threshold?"),
        (["--hub_token", "hf_secret"], "--hub_token would be written to training_args.bin"),
    ],
)
def test_bad_flags_are_told_in_one_line(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        config(*flags)
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_holds_flags_and_the_command_line_wins(tmp_path, suffix):
    file = tmp_path / f"run{suffix}"
    file.write_text(
        json.dumps(
            {
                "learning_rate": 1e-3,
                "repeat_scheduler": "abr",
                "repeat_scheduler_kwargs": {"max_repeats": 2},
                "lora_target_modules": ["q_proj", "v_proj"],
                "do_train": True,
                "use_lora": False,
                "report_to": "none",
                "max_train_samples": None,
            }
        )
    )
    model, data, args = parse_arguments(CLASSES, [str(file), "--learning_rate", "0.5"])
    assert (args.learning_rate, args.do_train) == (0.5, True)
    assert args.build_repeat_scheduler().inner == ThresholdScheduler(max_repeats=2)
    assert (model.lora_target_modules, model.use_lora) == (["q_proj", "v_proj"], False)
    assert data.max_train_samples is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must contain a mapping"),
        ("a: [", "is not valid"),
        ("learning_rat: 1\n", "Unknown flag --learning_rat."),
    ],
)
def test_a_bad_file_is_told(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_arguments(CLASSES, [str(file)])


def test_a_missing_file_is_told():
    with pytest.raises(ValueError, match=re.escape("missing.yaml cannot be read: No such file")):
        parse_arguments(CLASSES, ["missing.yaml"])


def test_defaults_differ_from_stock_where_the_docstring_says():
    ours, stock = ABRConfig(output_dir="x"), TrainingArguments(output_dir="x")
    differing = {name for name in stock.to_dict() if ours.to_dict()[name] != stock.to_dict()[name]}
    assert differing == {"report_to", "logging_steps"}
    assert ABRConfig(output_dir="x", do_eval=True).eval_strategy == "epoch"
    assert ABRConfig(output_dir="x", do_eval=True, eval_strategy="no").eval_strategy == "no"


def test_a_budget_bounds_the_batches_and_survives_a_copy():
    # The cheapest batch is a skip under activation checkpointing, a quarter of a pass.
    args = ABRConfig(output_dir="x", max_passes=10, report_to="none")
    assert args.max_steps == 40
    assert ABRConfig(output_dir="x", max_passes=10, max_steps=15, report_to="none").max_steps == 15


def in_directory(path, *flags):
    return config("--output_dir", str(path), *flags)


@pytest.fixture
def used(tmp_path):
    """A directory with a finished run and a file of the user's."""
    (tmp_path / "checkpoint-3").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "all_results.json", "run.json", "notes.txt"):
        (tmp_path / name).write_text(name)
    return tmp_path


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_a_directory_in_use_is_left_alone_unless_told_otherwise(used):
    with pytest.raises(ValueError, match="is not empty"):
        check_output_dir(in_directory(used, "--do_train"), "model")
    check_output_dir(in_directory(used, "--do_train", "--resume_from_checkpoint", "true"), "model")
    check_output_dir(in_directory(used, "--do_train", "--overwrite_output_dir"), "model")


def test_what_a_run_leaves_that_is_killed_at_its_start_is_in_nobodys_way(tmp_path):
    for name in ("_lock", "_push.json", "run.json.tmp"):
        (tmp_path / name).touch()
    check_output_dir(in_directory(tmp_path, "--do_train"), "model")


def test_a_run_that_is_overwritten_goes_when_the_new_one_is_trained(used):
    with replacing_previous_run(in_directory(used, "--do_train", "--overwrite_output_dir")):
        assert names(used) == ["_previous-run", "notes.txt"]
        (used / "model.safetensors").touch()
    assert names(used) == ["model.safetensors", "notes.txt"]


def fail_in_the_place_of_a_run(args):
    with replacing_previous_run(args):
        Path(args.output_dir, "run.json").write_text("failed")
        raise RuntimeError


def test_a_run_is_not_lost_to_one_that_fails(used):
    overwriting = in_directory(used, "--do_train", "--overwrite_output_dir")
    for _ in range(2):  # however often it fails
        with pytest.raises(RuntimeError):
            fail_in_the_place_of_a_run(overwriting)
        assert (used / "_previous-run" / "run.json").read_text() == "run.json"
    check_output_dir(overwriting, "model")
    with replacing_previous_run(overwriting):
        pass
    assert names(used) == ["notes.txt"]


def test_a_run_that_was_moved_aside_in_part_is_moved_whole_by_the_next_attempt(used, monkeypatch):
    overwriting = in_directory(used, "--do_train", "--overwrite_output_dir")
    rename, before = Path.rename, names(used)

    def killed_at_the_last(path, target):
        if path.name == "run.json":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed_at_the_last)
    with pytest.raises(KeyboardInterrupt), replacing_previous_run(overwriting):
        pass
    monkeypatch.setattr(Path, "rename", rename)
    assert "run.json" in names(used)
    assert len(names(used)) < len(before)
    check_output_dir(overwriting, "model")
    with pytest.raises(RuntimeError):
        fail_in_the_place_of_a_run(overwriting)
    kept = names(used / "_previous-run")
    assert kept == sorted({*before} - {"notes.txt"}), "nothing of it is taken for the rest of a failed attempt"


def test_a_resumed_attempt_takes_the_place_of_the_run_before(used):
    with pytest.raises(RuntimeError):
        fail_in_the_place_of_a_run(in_directory(used, "--do_train", "--overwrite_output_dir"))
    with replacing_previous_run(in_directory(used, "--do_train", "--resume_from_checkpoint", "true")):
        assert "_previous-run" in names(used)
    assert names(used) == ["notes.txt", "run.json"], "or the next attempt would take this run for a failed one"


def test_only_a_run_is_overwritten(tmp_path):
    (tmp_path / "model.safetensors").touch()
    overwriting = in_directory(tmp_path, "--do_train", "--overwrite_output_dir")
    with pytest.raises(ValueError, match="is the directory of --model_name_or_path"):
        check_output_dir(overwriting, str(tmp_path))
    with pytest.raises(ValueError, match="holds no run"):
        check_output_dir(overwriting, "model")


def test_evaluating_into_the_directory_of_a_trained_model_is_refused(used, tmp_path):
    with pytest.raises(ValueError, match="holds a trained model, and without --do_train the one evaluated would be"):
        check_output_dir(in_directory(used, "--do_eval"), "model")


def test_a_resumed_run_keeps_its_provenance_and_warns_of_changes(tmp_path, caplog):
    begun = in_directory(tmp_path, "--do_train", "--learning_rate", "1e-3")
    write_provenance(begun, ["run", "--do_train"], DataArguments(block_size=64))
    resumed = in_directory(tmp_path, "--do_train", "--learning_rate", "1e-2", "--resume_from_checkpoint", "true")
    write_provenance(resumed, ["run", "again"], DataArguments(block_size=32))
    written = json.loads((tmp_path / "run.json").read_text())
    assert (written["argv"], written["resumed"]) == (["run", "--do_train"], [["run", "again"]])
    assert written["arguments"]["block_size"] == 64
    warned = [line for line in caplog.text.splitlines() if "This run is resumed with" in line]
    assert [line.split("--")[1] for line in warned] == [
        "learning_rate 0.01; it was begun with 0.001.",
        "block_size 32; it was begun with 64.",
    ]


def test_an_output_directory_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        check_output_dir(in_directory(tmp_path / "file", "--do_train"), "model")


def test_yaml_reads_no_as_false_and_we_do_not(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("save_strategy: no\nresume_from_checkpoint: no\nuse_lora: no\nreport_to: none\n")
    model, _, args = parse_arguments(CLASSES, [str(file)])
    assert (args.save_strategy, model.use_lora) == ("no", False)


@pytest.mark.parametrize("value", ["false", "False"])
def test_resuming_can_be_switched_off(value):
    assert config("--resume_from_checkpoint", value).resume_from_checkpoint is None


SCALED = {"scale_with_batch_size": True, "base_learning_rate": 5e-6, "base_samples": 10_000, "use_cpu": True}


@pytest.mark.parametrize(
    ("rows", "accumulation", "steps", "rate"), [(8, 1, 1250, 1.414e-5), (4, 4, 625, 2e-5), (3, 1, 3333, 8.66e-6)]
)
def test_rate_and_steps_follow_the_size_of_a_batch(tmp_path, rows, accumulation, steps, rate):
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    args = ABRConfig(str(tmp_path), **SCALED, **sizes)
    assert args.max_steps == args.most_batches == steps
    assert args.learning_rate == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1e-4}, "--learning_rate 0.0001 contradicts --scale_with_batch_size, which makes it 1.414"),
        ({"max_steps": 100}, "--max_steps 100 contradicts --scale_with_batch_size, which makes it 1250 for a batch"),
        ({"base_samples": None}, "--scale_with_batch_size needs --base_samples, above 0; got None."),
        ({"base_learning_rate": -1.0}, "--scale_with_batch_size needs --base_learning_rate, above 0; got -1.0."),
        ({"base_samples": 7}, "--base_samples 7 is less than one batch, which has 8."),
        ({"scale_with_batch_size": False, "base_samples": None}, "--base_learning_rate means nothing without"),
    ],
)  # fmt: skip
def test_what_contradicts_the_scaling_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ABRConfig(str(tmp_path), per_device_train_batch_size=8, **{**SCALED, **options})


def test_values_that_agree_with_the_scaling_are_taken(tmp_path):
    args = ABRConfig(str(tmp_path), per_device_train_batch_size=16, max_steps=625, learning_rate=2e-5, **SCALED)
    assert (args.max_steps, args.learning_rate) == (625, 2e-5)
