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

OF_TRL_SFT = """
    dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming datasets streaming
    test_split_size model_name_or_path model_revision dtype trust_remote_code attn_implementation use_peft lora_r
    lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora
    use_dora load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
    model_init_kwargs router_aux_loss_coef chat_template_path dataset_text_field dataset_kwargs dataset_num_proc
    eos_token max_length truncation_mode shuffle_dataset packing packing_strategy padding_free pad_to_multiple_of
    eval_packing completion_only_loss assistant_only_loss loss_type activation_offloading pad_token
    gradient_checkpointing bf16
"""


def answers_of(name):
    return [INSTEAD[name]] if isinstance(INSTEAD[name], str) else INSTEAD[name]


def flags_of(verb):
    return {name for flag in KNOWN["verbs"][verb]["flags"] + KNOWN["trainer"] for name in flag["names"]}


@pytest.mark.parametrize(("verb", "theirs"), [("train", OF_RUN_CLM), ("classify", OF_RUN_GLUE), ("sft", OF_TRL_SFT)])
def test_every_flag_of_their_script_has_an_answer(verb, theirs):
    known = flags_of(verb)
    for name in theirs.split():
        if f"--{name}" not in known and name not in SAME_HERE:
            with pytest.raises(ValueError, match=f"--{name} is not a flag here. {answers_of(name)[0][:10]}"):
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
    for name in INSTEAD:
        assert f"--{name}" not in flags_of("train") & flags_of("classify"), f"--{name} is a flag: it needs no advice"
        for word in " ".join(answers_of(name)).replace(",", " ").replace(".", " ").replace(":", " ").split():
            assert not word.startswith("--") or word in everywhere, word


@pytest.mark.parametrize(
    ("verb", "flag", "answer"),
    [
        ("train", "--max_seq_length", "Use --block_size."),
        ("sft", "--max_seq_length", "Use --max_length."),
        ("sft", "--block_size", "Use --max_length."),
        ("classify", "--block_size", "Use --max_seq_length."),
    ],
)
def test_of_several_answers_the_one_that_fits_the_command_is_given(verb, flag, answer):
    with pytest.raises(ValueError, match=f"{flag} is not a flag here. {answer}"):
        accepted([flag, "8"], flags_of(verb))
