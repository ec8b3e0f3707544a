"""Help, mistyped flags, unknown rules and missing files: answered from data, without torch and transformers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from argparse import ArgumentTypeError
from importlib.metadata import version

import pytest
import transformers

import run_clm_abr
from abr_trainer.cli import describe, quick
from abr_trainer.cli.command_line import build_parser, parse_arguments
from abr_trainer.cli.help_page import help_page
from abr_trainer.cli.parsing import boolean

KNOWN = json.loads(quick.FLAGS_FILE.read_text())
of_this_version = pytest.mark.skipif(
    version("transformers") != KNOWN["transformers"], reason="the data are those of another version"
)
ON_DEMO = ["--dataset_name", "demo"]
COMPARE = ["--schedulers", "baseline", "abr", "--out", "runs/cmp", "--"]
BUDGET = [*ON_DEMO, "--max_passes", "20"]
HEAVY = ("torch", "transformers", "datasets", "numpy", "scipy", "matplotlib")


def answer(capsys, verb, *argv):
    """Return the exit status of the quick answer and what it printed; status None where there is none."""
    try:
        quick.check(verb, [str(each) for each in argv])
    except SystemExit as end:
        shown = capsys.readouterr()
        return end.code, shown.out + shown.err
    return None, "".join(capsys.readouterr())


@of_this_version
def test_the_data_are_what_the_commands_parse():
    fresh = json.loads(json.dumps(describe.describe()))
    for verb, described in fresh["verbs"].items():
        assert KNOWN["verbs"][verb] == described, f"{verb}: run python -m abr_trainer.cli.describe"
    assert fresh == KNOWN, "run python -m abr_trainer.cli.describe"


@of_this_version
def test_neither_torch_nor_transformers_is_imported():
    asked = [
        *((verb, ["--help"]) for verb in KNOWN["verbs"]),
        ("train", ["--lerning_rate", "1"]),
        ("train", ["--repeat_scheduler", "abt"]),
        ("train", ["--repeat_scheduler", "learnable", "--do_train"]),
        ("train", ["--train_file", "missing.txt"]),
        ("compare", [*COMPARE, *BUDGET]),
        ("compare", [*COMPARE, *BUDGET, "--lerning_rate", "1"]),
    ]
    script = (
        "import contextlib, sys; from abr_trainer.cli.quick import check\n"
        f"for verb, argv in {asked!r}:\n"
        "    with contextlib.suppress(SystemExit): check(verb, argv)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr.count("error: ") == 4


@pytest.mark.parametrize("verb", KNOWN["verbs"])
def test_every_verb_has_a_page(verb, capsys):
    status, shown = answer(capsys, verb, "--help")
    assert status == 0
    assert shown.startswith(f"usage: abr {verb} ")
    assert max(map(len, shown.splitlines()), default=0) <= 130, "examples are as written"
    positional = [flag for flag in KNOWN["verbs"][verb]["flags"] if not flag["names"]]
    assert all(flag["dest"].upper() in shown for flag in positional)


@pytest.mark.parametrize("verb", ["train", "classify", "sft"])
def test_help_is_a_page_and_help_all_is_everything(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    page = help_page(verb, KNOWN, None, whole=False)
    assert len(page.splitlines()) <= 75
    assert max(map(len, page.splitlines())) <= 100
    groups = [line for line in page.splitlines() if re.fullmatch(r"[a-z][a-z ]*", line)]
    assert groups == ["model", "data", "which batches", "training and budget", "evaluation", "output"]
    whole = help_page(verb, KNOWN, None, whole=True)
    flags = [*KNOWN["verbs"][verb]["flags"], *KNOWN["trainer"]]
    shown = set(re.findall(r"^  (--\w+)", whole, flags=re.MULTILINE))
    assert shown == {f"--{flag['dest']}" for flag in flags}
    assert "\nfsdp\n" in whole
    assert "\ndataloader\n" in whole


def test_a_page_tells_defaults_and_what_turns_a_flag_off(capsys):
    train, classify = (" ".join(answer(capsys, verb, "--help")[1].split()) for verb in ("train", "classify"))
    assert "--use_lora Train a LoRA adapter; --no_use_lora trains all weights [on]" in train
    assert "--lora_alpha N Scale of the adapter: its output is multiplied by alpha / r [32]" in train
    assert "--lora_alpha N Scale of the adapter: its output is multiplied by alpha / r [16]" in classify
    assert "--learning_rate X Learning rate of the first batch after warm-up [5e-05]" in train
    assert "--learning_rate X Highest learning rate, reached after warm-up [0.0003]" in classify


def test_the_parser_itself_does_not_describe_a_switch_by_its_opposite():
    parser = build_parser(run_clm_abr.ARGUMENTS)
    told = {action.option_strings[0]: action.help for action in parser._actions}
    assert told["--no_use_lora"] == "The opposite of --use_lora."


@of_this_version
@pytest.mark.parametrize(
    ("verb", "argv", "message"),
    [
        ("train", ["--lerning_rate", "1"], "Unknown flag --lerning_rate. Did you mean --learning_rate?"),
        ("train", ["--learning_rate", "much"], "--learning_rate/--learning-rate: invalid float value: 'much'"),
        ("train", ["--max_passes", "1.5"], "invalid int value: '1.5'"),
        ("train", ["--learning_rate", "nan"], "--learning_rate nan is not a finite number."),
        ("train", ["--row_sigmas", "1e400"], "--row_sigmas inf is not a finite number."),
        ("train", ["--run_name=--"], "--run_name cannot have the value --."),
        ("why", ["run", "1", "--x=--"], "--x cannot have the value --."),
        ("train", ["--train_file", "a" * 3000], "aaa...: File name too long."),
        ("train", ["--do_train", "perhaps"], "'perhaps' is neither true nor false"),
        ("train", ["--save_strategy", "never"], "invalid choice: 'never'"),
        ("train", ["--output_dir"], "expected one argument"),
        ("train", ["runs/mine", "--do_train"], "runs/mine does not belong to any flag"),
        ("train", ["--repeat_scheduler", "abt"], "Unknown repeat scheduler 'abt'. Did you mean 'abr'?"),
        (
            "train",
            ["--repeat_scheduler", "abr", "--repeat_scheduler_kwargs", '{"treshold": 1}'],
            "Repeat scheduler 'abr' has no parameter 'treshold'. It takes: loss_threshold",
        ),
        ("train", ["--repeat_scheduler", "abr", "--loss_threshold", "q2"], "must be a quantile below 1"),
        (
            "train",
            ["--do_eval", "--loss_threshold", "2"],
            "--loss_threshold 2 means nothing to --repeat_scheduler base",
        ),
        (
            "sft",
            ["--do_eval", "--row_sigmas", "4"],
            "--row_sigmas 4.0 means nothing to --skip_rows none: leave it out",
        ),
        ("train", ["--repeat_scheduler_kwargs", "{"], "--repeat_scheduler_kwargs is not valid JSON"),
        ("train", ["--train_file", "missing.txt"], "--train_file missing.txt does not exist."),
        ("train", ["missing.yaml"], "missing.yaml cannot be read"),
        ("classify", ["--validation_file", "missing.csv"], "--validation_file missing.csv does not exist."),
        ("classify", ["--task_name", "mrcp"], "Unknown --task_name 'mrcp'. Did you mean 'mrpc'?"),
        ("classify", ["--prompt", "perfekt"], "--prompt perfekt: did you mean perfect?"),
        ("train", [], "Nothing to do. Give --do_train, --do_eval or --do_predict."),
        ("classify", ["--block_size", "8"], "--block_size is not a flag here. Use --max_seq_length."),
        ("classify", ["--model_name_or_path", "./no/model"], "--model_name_or_path ./no/model does not exist."),
        ("train", ["--dataset_name", "/no/texts"], "--dataset_name /no/texts does not exist."),
        ("sft", ["--chat_template", "./no.jinja"], "--chat_template ./no.jinja does not exist."),
        ("sft", ["--config"], "--config takes a .yaml, .yml or .json file of flags, got nothing."),
        ("sft", ["--config", "missing.yaml"], "missing.yaml cannot be read"),
        (
            "compare",
            ["--command", "sft", "--out", "x", "--max_length", "2"],
            "--max_length is a flag of abr sft. Put it",
        ),
        ("compare", ["--command", "classify", "--out", "x"], "argument --command: invalid choice: 'classify'"),
        (
            "compare",
            ["--command", "sft", "--out", "x", "--", *BUDGET, "--block_size", "2"],
            "--block_size is not a flag here. Use --max_length.",
        ),
        ("push", ["no/run"], "no/run is not a directory."),
        ("perplexity", ["--text_file", "missing.txt"], "--text_file missing.txt does not exist."),
        ("perplexity", [*ON_DEMO, "--output_file", "no/where.json"], "--output_file no/where.json: its directory"),
        ("prune", [], "the following arguments are required: --output_dir"),
        ("export", ["--output_dir", "x", "--keep_mask", "8"], "'8' is neither true nor false"),
        ("evaluate", ["--splitt", "test"], "Unknown flag --splitt. Did you mean --split?"),
        ("push", [], "the following arguments are required: directory"),
        ("compare", ["--out", "x", "--jobs", "two"], "argument --jobs: invalid int value: 'two'"),
        ("compare", ["--out", "x", "--max_passes", "2"], "--max_passes is a flag of abr train. Put it after --."),
        ("compare", ["--out", "x", "--sheds", "abr"], "Unknown flag --sheds."),
        ("compare", [*COMPARE, *ON_DEMO], "--match passes needs the budget of each run"),
        ("compare", [*COMPARE, *BUDGET, "--lerning_rate", "1"], "Did you mean --learning_rate?"),
        (
            "compare",
            ["--match", "seconds", "--out", "x", "--", *BUDGET],
            "--max_passes cannot be used with --match seconds: runs could end at different seconds.",
        ),
        (
            "compare-prompts",
            ["--prompts", "none", "--out", "x", "--", "--max_seconds", "9"],
            "--max_seconds cannot be",
        ),
        ("compare", [*COMPARE, *BUDGET, "--train_file", "missing.txt"], "--train_file missing.txt does not exist."),
        ("compare", ["--schedulers", "abt", "--out", "x", "--", *BUDGET], "Unknown repeat scheduler 'abt'."),
        ("compare", ["--schedulers", "abr:lora_rr=2", "--out", "x", "--", *BUDGET], "Unknown flag --lora_rr."),
        ("compare", ["--tune", "lora_r", "8", "many", "--out", "x", "--", *BUDGET], "invalid int value: 'many'"),
        (
            "compare-prompts",
            ["--prompts", "none", "--out", "x", "--", "--prompt", "a"],
            "--prompt cannot be set for the runs",
        ),
        ("compare-prompts", ["--prompts", "none", "--out", "x", "--", "--max_seq_len", "9"], "--max_seq_length?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(verb, argv, message, capsys):
    status, shown = answer(capsys, verb, *argv)
    assert status == 2
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert message in shown


@pytest.mark.parametrize(
    ("verb", "argv"),
    [
        ("train", ["--do-train", "--bf16", "false", "--no_use_lora", "--lora_r=8", "--label_names", "a", "b"]),
        ("train", ["--do_eval", "--repeat_scheduler", "a_module:MyRule", "--repeat_scheduler_kwargs", '{"x": 1}']),
        ("train", ["--lr_scheduler_kwargs", '{"a": 2}', "--debug", "underflow_overflow", "--dtype=auto", "--do_eval"]),
        ("classify", ["--do_predict", "--adapter", "runs/mine", "--classes", "a", "b", "--regression"]),
        (
            "compare",
            ["--sched", "abr:2", "fixed:3,lora_r=4", "--out", "x", "--keep-going", "--", *BUDGET, "--do_eval"],
        ),
        (
            "compare",
            [
                "--schedulers",
                "baseline",
                "abr",
                "--out",
                "x",
                "--",
                *BUDGET,
                "--loss_threshold",
                "2",
                "--row_sigmas=4",
            ],
        ),
        ("train", ["--do_eval", "--skip_rows", "no.such:Rule", "--row_window", "9"]),
        ("compare", ["--schedulers", "my.module:Rule:a=1", "--tune", "lora_r", "8", "4", "--out", "x", "--", *BUDGET]),
        ("compare-prompts", ["--prompts", "none", "Is it?", "--out", "x", "--", "--task_name", "demo"]),
        ("push", [".", "--hub_private"]),
        ("train", ["--do_eval", "--model_name_or_path", "someone/model", "--tokenizer_name", "."]),
        ("no-such-verb", ["--anything"]),
    ],
)
def test_what_the_command_takes_is_left_to_it(verb, argv, capsys):
    assert answer(capsys, verb, *argv) == (None, "")


@of_this_version
def test_a_file_of_flags_is_read_first(tmp_path, capsys):
    flags = tmp_path / "run.yaml"
    flags.write_text("repeat_scheduler: abr\nlerning_rate: 1\n")
    assert answer(capsys, "train", flags)[1] == "error: Unknown flag --lerning_rate. Did you mean --learning_rate?\n"
    flags.write_text('{"repeat_scheduler": "abr", "repeat_scheduler_kwargs": {"max_repeats": 0}}')
    assert "must be at least 1, got 0" in answer(capsys, "train", flags)[1]
    flags.write_text("do_train: true\nrepeat_scheduler: abr\nsave_strategy: no\n")
    assert answer(capsys, "train", flags)[0] is None
    assert "invalid float" in answer(capsys, "train", flags, "--learning_rate", "x")[1], "flags after it count, too"


def test_a_file_of_flags_may_stand_behind_config_and_sets_its_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ABR_COLOUR", "none")
    path = tmp_path / "run.yaml"
    path.write_text("env:\n  ABR_COLOUR: green\n  ABR_SIZE: 7\nlearning_rate: much\n")
    for argv in (["--do_train", "--config", path], ["--do_train", f"--config={path}"], [path, "--do_train"]):
        status, said = answer(capsys, "sft", *argv)
        assert (status, "invalid float value: 'much'" in said) == (2, True)
    assert (os.environ.pop("ABR_COLOUR"), os.environ.pop("ABR_SIZE")) == ("green", "7")
    path.write_text("env: green\n")
    assert "env must be a mapping of environment variables" in answer(capsys, "train", path)[1]


def test_a_comparison_takes_a_file_of_flags_before_and_behind_the_dashes(tmp_path, capsys):
    own, runs = tmp_path / "comparison.yaml", tmp_path / "runs.yaml"
    own.write_text("command: sft\nschedulers: [baseline, abr]\nout: runs/cmp\nseeds: 2\ncontrols: true\n")
    runs.write_text("dataset_name: demo\nmax_passes: 20\nchat_template: alpaca\n")
    assert answer(capsys, "compare", own, "--", runs) == (None, "")
    assert answer(capsys, "compare", own, "--keep-going", "no", "--", runs) == (None, "")
    assert "Unknown flag --chat_template" in answer(capsys, "compare", own, "--command", "train", "--", runs)[1]


@of_this_version
def test_the_data_of_each_seed_must_be_there(tmp_path, capsys):
    def compare(*own):
        train, arm = tmp_path / "part-{seed}.jsonl", f"abr:train_file={tmp_path}/other-{{seed}}.jsonl"
        own = ["--schedulers", "baseline", arm, "--out", "runs/cmp", *own]
        return answer(capsys, "compare", *own, "--", "--train_file", train, "--max_passes", "20")

    for name in ("part-0", "part-7", "other-0", "other-7"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    assert compare("--seeds", "1") == compare("--seeds", "0", "7") == (None, "")
    (tmp_path / "part-1.jsonl").write_text('{"text": "a"}\n')
    assert compare("--seeds", "2") == (2, f"error: --train_file {tmp_path}/other-1.jsonl does not exist.\n")
    assert compare("--seeds", "7", "8") == (2, f"error: --train_file {tmp_path}/part-8.jsonl does not exist.\n")


def test_flags_of_another_trl_are_left_to_it(monkeypatch, capsys):
    assert "Unknown flag" in answer(capsys, "sft", "--do_train", "--new_flag_of_trl")[1]
    monkeypatch.setitem(KNOWN["verbs"]["sft"], "needs", {"trl": "0"})
    monkeypatch.setattr(quick.json, "loads", lambda _: KNOWN)
    assert answer(capsys, "sft", "--do_train", "--new_flag_of_trl") == (None, "")


def test_with_another_transformers_its_flags_are_left_to_it(monkeypatch, capsys):
    monkeypatch.setattr(quick.importlib.metadata, "version", lambda name: "5.17.0")
    assert answer(capsys, "train", "--a_flag_of_another_version", "1")[0] is None
    assert answer(capsys, "train", "--do_train", "--optim", "one_of_another_version")[0] is None
    assert "Nothing to do" in answer(capsys, "train", "--optim", "one_of_another_version")[1]
    assert "invalid int value" in answer(capsys, "train", "--lora_r", "x")[1], "a flag of ours"
    assert "invalid int value" in answer(capsys, "perplexity", *ON_DEMO, "--stride", "x")[1]


@of_this_version
def test_real_and_quick_answers_are_the_same(capsys):
    wrong = [["--lerning_rate", "1"], ["--learning_rate", "x"], ["--token", "hf_x"], ["--lora_r"], ["word"]]
    for argv in wrong:
        with pytest.raises(ValueError, match="--|word") as refused:
            parse_arguments(run_clm_abr.ARGUMENTS, argv)
        assert answer(capsys, "train", *argv)[1] == f"error: {refused.value}\n"


def test_true_and_false_are_what_transformers_takes_for_them():
    string_to_bool = transformers.hf_argparser.string_to_bool
    for text in ("yes", "True", "t", "Y", "1", "no", "FALSE", "f", "n", "0"):
        assert boolean(text) is string_to_bool(text)
    for text in ("", "2", "on"):
        with pytest.raises(ArgumentTypeError):
            boolean(text)
