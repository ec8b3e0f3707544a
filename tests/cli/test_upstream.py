"""Flags of transformers' example scripts: each is accepted, or refused with what to use instead."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from abr_trainer.cli import quick
from abr_trainer.cli.upstream import INSTEAD, SAME_HERE, accepted

KNOWN = json.loads(quick.FLAGS_FILE.read_text())
of_this_version = pytest.mark.skipif(
    version("transformers") != KNOWN["transformers"], reason="the data are those of another version"
)

OF_RUN_CLM = """
    model_name_or_path model_type config_overrides config_name tokenizer_name cache_dir use_fast_tokenizer
    model_revision token use_auth_token trust_remote_code torch_dtype dtype low_cpu_mem_usage dataset_name
    dataset_config_name train_file validation_file max_train_samples max_eval_samples streaming block_size
    overwrite_cache validation_split_percentage preprocessing_num_workers keep_linebreaks
"""

OF_RUN_GLUE = """
    task_name dataset_name dataset_config_name max_seq_length overwrite_cache pad_to_max_length max_train_samples
    max_eval_samples max_predict_samples train_file validation_file test_file model_name_or_path config_name
    tokenizer_name cache_dir use_fast_tokenizer model_revision token use_auth_token trust_remote_code
    ignore_mismatched_sizes
"""


def flags_of(verb):
    return {name for flag in KNOWN["verbs"][verb]["flags"] + KNOWN["trainer"] for name in flag["names"]}


@pytest.mark.parametrize(("verb", "theirs"), [("train", OF_RUN_CLM), ("classify", OF_RUN_GLUE)])
def test_every_flag_of_their_script_has_an_answer(verb, theirs):
    known = flags_of(verb)
    for name in theirs.split():
        if f"--{name}" not in known and name not in SAME_HERE:
            with pytest.raises(ValueError, match=f"--{name} is not a flag here. {INSTEAD[name][:10]}"):
                accepted([f"--{name}", "x"], known)


def test_flags_that_say_what_is_done_anyway_are_accepted():
    pasted = "--use_fast_tokenizer --low_cpu_mem_usage False --keep-linebreaks true --no_pad_to_max_length --seed 1"
    assert accepted(pasted.split(), ["--seed"]) == ["--seed", "1"]
    assert accepted(["--pad_to_max_length=False", "--save_safetensors"], []) == []


@pytest.mark.parametrize(
    "argv",
    [["--use_fast_tokenizer", "no"], ["--no_keep_linebreaks"], ["--pad_to_max_length"], ["--save_safetensors=0"]],
)
def test_their_opposite_is_refused_with_the_reason(argv):
    with pytest.raises(ValueError, match=r"is not supported. \w"):
        accepted(argv, [])


@of_this_version
@pytest.mark.parametrize("argv", [["--token", "hf_secret"], ["--token=hf_secret"], ["--use-auth-token", "hf_secret"]])
@pytest.mark.parametrize("verb", ["train", "classify", "perplexity", "export"])
def test_a_token_is_refused_and_not_repeated(verb, argv, capsys):
    with pytest.raises(SystemExit):
        quick.check(verb, [*argv, "--output_dir", "x"])
    said = capsys.readouterr().err
    assert "HF_TOKEN" in said
    assert "hf auth login" in said
    assert "secret" not in said


def test_what_is_said_instead_names_flags_that_there_are():
    everywhere = set.union(*map(flags_of, KNOWN["verbs"]))
    for name, instead in INSTEAD.items():
        assert f"--{name}" not in flags_of("train") & flags_of("classify"), f"--{name} is a flag: it needs no advice"
        for word in instead.replace(",", " ").replace(".", " ").replace(":", " ").split():
            assert not word.startswith("--") or word in everywhere, word
