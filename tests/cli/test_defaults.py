"""The line on defaults that are not those of transformers' scripts."""

from __future__ import annotations

import run_clm_abr
from abr_trainer.classification.sentences import SentenceArguments
from abr_trainer.classification.trainer import ClassifierArguments, ClassifierConfig
from abr_trainer.cli.command_line import parse_arguments
from abr_trainer.cli.defaults import describe_defaults

QUIET = ["--do_train", "--use_cpu", "--report_to", "none", "--output_dir", "run"]
OF_CLASSIFIERS = (ClassifierArguments, SentenceArguments, ClassifierConfig)


def described(classes, argv):
    *others, args = parse_arguments(classes, argv)
    return describe_defaults(["abr", "train", *argv], args, others)


def test_one_line_tells_ours_and_theirs():
    assert described(run_clm_abr.ARGUMENTS, QUIET) == [
        "defaults here (in transformers' scripts): --use_lora true (false), --skip_outliers robust (none), "
        "--logging_steps 10 (500)"
    ]
    (line,) = described(run_clm_abr.ARGUMENTS, [*QUIET, "--do_eval"])
    assert line.endswith("--eval_strategy epoch (no), --eval_on_start true (false)")


def test_what_was_asked_for_is_no_surprise(tmp_path):
    asked = ["--no_use_lora", "--skip-outliers", "robust", "--logging_steps=10"]
    assert described(run_clm_abr.ARGUMENTS, [*QUIET, *asked]) == []
    flags = tmp_path / "run.yaml"
    flags.write_text("use_lora: true\nlogging_steps: 10\n")
    (line,) = described(run_clm_abr.ARGUMENTS, [str(flags), *QUIET])
    assert line == "defaults here (in transformers' scripts): --skip_outliers robust (none)"


def test_where_nothing_is_trained_nothing_is_said():
    assert described(run_clm_abr.ARGUMENTS, ["--do_eval", *QUIET[1:]]) == []


def test_a_classifier_has_more_of_them():
    (line,) = described(OF_CLASSIFIERS, [*QUIET, "--max_seq_length", "64"])
    for told in ("--learning_rate 0.0003 (5e-05)", "--save_strategy epoch (steps)", "--num_train_epochs 10 (3)"):
        assert told in line
    assert "max_seq_length" not in line
    assert "skip_outliers" not in line, "it skips none either"
