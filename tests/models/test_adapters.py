"""Runs that start from an adapter: the same model as the run that made it left, and refusals of what does not fit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_clm_abr
from abr_trainer.cli import perplexity
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.models.arguments import ModelArguments
from abr_trainer.models.loading import describe_model, load_config, load_model, load_tokenizer
from abr_trainer.records.files import read_lines
from tests.conftest import tiny_llama, token_rows

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"
QUICK = ["--block_size", "32", "--per_device_train_batch_size", "8", "--use_cpu", "--disable_tqdm", "true"]
QUICK += ["--report_to", "none", "--learning_rate", "5e-3", "--skip_outliers", "none"]


def load(checkpoints=False, **options):
    arguments = ModelArguments(**options)
    return load_model(arguments, load_config(arguments), load_tokenizer(arguments), "cpu", checkpoints)


def random_adapter(path, config=LoraConfig, **options):
    """An adapter that changes what the demo model says."""
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **options}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), config(**options))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """As many tokens as a batch holds: the text that is trained on is that which is evaluated."""
    path = tmp_path_factory.mktemp("text") / "talk.txt"
    path.write_text("".join(f"Where is lamp {i}? By the river.\n" for i in range(16)))
    return ["--train_file", str(path), "--validation_file", str(path)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    output = tmp_path_factory.mktemp("first") / "run"
    flags = ["--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0", "--lora_target_modules", "q_proj", "v_proj"]
    flags += ["--do_train", "--do_eval", "--max_steps", "4", "--output_dir", str(output)]
    return str(output), run_clm_abr.main([*QUICK, *text, *flags])


def test_an_adapter_is_evaluated_as_the_run_that_made_it_was(finished, text, tmp_path, capsys):
    adapter, results = finished
    flags = ["--adapter_name_or_path", adapter, "--do_eval", "--output_dir", str(tmp_path / "run")]
    again = run_clm_abr.main([*QUICK, *text, *flags])
    assert again["eval_perplexity"] == pytest.approx(results["eval_perplexity"], rel=1e-6)
    told = " ".join(capsys.readouterr().out.split())
    assert f"adapter starts from {adapter}, r 4, alpha 8 " in told
    arguments = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    told = {"model_name_or_path": str(DEMO_MODEL), "adapter_name_or_path": adapter, "lora_r": 4, "lora_dropout": 0}
    assert told.items() <= arguments.items()


def test_training_goes_on_from_the_adapter_and_resumes(finished, text, tmp_path):
    adapter, results = finished
    flags = ["--adapter_name_or_path", adapter, "--do_train", "--max_steps", "4", "--save_steps", "2", *QUICK, *text]
    run_clm_abr.main([*flags, "--output_dir", str(tmp_path / "whole")])
    first = next(read_lines(tmp_path / "whole" / "abr_trace.jsonl"))
    assert first["loss"] == pytest.approx(results["eval_loss"], rel=1e-5)
    before, after = (load_file(f"{path}/{WEIGHTS}") for path in (adapter, tmp_path / "whole"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, str(DEMO_MODEL))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    shutil.copy(tmp_path / "whole" / "abr_trace.jsonl", tmp_path / "part")
    run_clm_abr.main([*flags, "--output_dir", str(tmp_path / "part"), "--resume_from_checkpoint", "true"])
    assert (tmp_path / "part" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("targets", [["embed_tokens"], ["q_proj", "lm_head"]])
def test_an_adapter_of_embeddings_or_head_is_loaded(tmp_path, targets):
    model = load(adapter_name_or_path=random_adapter(tmp_path, target_modules=targets))
    trained = {name.partition(".lora_")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(targets)


def test_what_the_adapter_trained_is_loaded_and_trains_and_the_rest_is_frozen(build, tmp_path):
    adapter = random_adapter(tmp_path, modules_to_save=["lm_head"])
    model = load(adapter_name_or_path=adapter, lora_dropout=0.3)
    saved = load_file(tmp_path / WEIGHTS)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    named = {re.sub(r"(\.modules_to_save)?\.default", "", name): parameter for name, parameter in trained.items()}
    assert named.keys() == saved.keys()
    assert all(torch.equal(parameter, saved[name]) for name, parameter in named.items())
    assert any(isinstance(module, torch.nn.Dropout) and module.p == 0.3 for module in model.modules())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    build(model=model, data=token_rows(4), repeat_scheduler=None).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained.keys()


@pytest.mark.parametrize(
    "options",
    [{"torch_dtype": "bfloat16"}, {"torch_dtype": "float16"}, {"load_in_4bit": True}, {"load_in_8bit": True}],
)
def test_it_trains_in_the_precision_of_a_new_adapter(build, tmp_path, options):
    new = load(**options, lora_target_modules=["q_proj", "v_proj"])
    old = load(checkpoints=True, adapter_name_or_path=random_adapter(tmp_path), **options)
    kinds = [[(name, p.dtype, p.requires_grad) for name, p in model.named_parameters()] for model in (new, old)]
    assert kinds[0] == kinds[1]
    if "torch_dtype" not in options:
        before = [p.detach().clone() for p in old.parameters() if p.requires_grad]
        build(model=old, data=token_rows(4), repeat_scheduler=None, gradient_checkpointing=True).train()
        after = [p for p in old.parameters() if p.requires_grad]
        assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_table_of_embeddings_that_had_grown_comes_back(text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.add_tokens(["river", "lamp"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    output = str(tmp_path / "run")
    flags = ["--tokenizer_name", str(tmp_path / "tokenizer"), "--do_train", "--do_eval", "--max_steps", "2"]
    results = run_clm_abr.main([*QUICK, *text, *flags, "--output_dir", output])
    assert load_file(f"{output}/{WEIGHTS}")["base_model.model.model.embed_tokens.weight"].shape[0] == 1026
    flags = ["--adapter_name_or_path", output, "--do_eval", "--output_dir", str(tmp_path / "again")]
    again = run_clm_abr.main([*QUICK, *text, *flags])
    assert again["eval_perplexity"] == pytest.approx(results["eval_perplexity"], rel=1e-6)
    flags = ["--text_file", text[1], "--token_length", "32", "--definition", "trainer", "--use_cpu"]
    found = perplexity.main(["--adapter", output, *flags])
    assert found["perplexity"] == pytest.approx(results["eval_perplexity"], rel=1e-5)
    tokenizer.add_tokens(["lamps"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(
        ValueError, match="has 1027 tokens, but --adapter_name_or_path .* base model have 1026 embeddings"
    ):
        load(adapter_name_or_path=output, tokenizer_name=str(tmp_path / "tokenizer"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 16}, "--lora_r 16 contradicts --adapter_name_or_path {}, which has 8: leave it out."),
        ({"lora_r": 8, "lora_alpha": 32}, "--lora_alpha 32 contradicts --adapter_name_or_path {}, which has 8: "),
        (
            {"lora_target_modules": ["q_proj", "k_proj"]},
            "--lora_target_modules q_proj k_proj contradicts --adapter_name_or_path {}, which has q_proj v_proj: ",
        ),
        ({"lora_dropout": 1.0}, "--lora_dropout must be in [0, 1), got 1.0."),
        ({"use_lora": False}, "--use_lora false cannot be used with --adapter_name_or_path {}. "),
    ],
)
def test_flags_that_contradict_the_adapter_are_told(tmp_path, options, message):
    adapter = random_adapter(tmp_path)
    ModelArguments(adapter_name_or_path=adapter, lora_r=8, lora_alpha=8, lora_target_modules=["v_proj", "q_proj"])
    with pytest.raises(ValueError, match=re.escape(message.format(adapter))):
        ModelArguments(adapter_name_or_path=adapter, **options)


def test_an_adapter_that_cannot_be_trained_on_is_told_before_a_model_is_loaded(finished, tmp_path):
    def error_of(adapter, **options):
        with pytest.raises(ValueError, match="--adapter_name_or_path") as caught:
            load_config(ModelArguments(adapter_name_or_path=str(adapter), **options))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"{tmp_path} is not an adapter: " in error_of(tmp_path)
    other = random_adapter(tmp_path / "ia3", config=IA3Config, feedforward_modules=[])
    assert f"{other} is of the kind IA3, but only LoRA can be trained." in error_of(other)
    changed = shutil.copytree(finished[0], tmp_path / "changed")
    config = json.loads((changed / "adapter_config.json").read_text())

    def change(**changes):
        (changed / "adapter_config.json").write_text(json.dumps({**config, **changes}))

    change(base_model_name_or_path=None)
    assert "does not record its base model. Give --model_name_or_path." in error_of(changed)
    change(base_model_name_or_path="/gone/away")
    line = f"--model_name_or_path /gone/away, the base model of --adapter_name_or_path {changed}, cannot be loaded"
    assert line in error_of(changed)
    change(task_type="SEQ_CLS")
    assert "is an adapter for SEQ_CLS, not for a causal language model." in error_of(changed)


def test_an_adapter_of_another_base_is_told(finished, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"{finished[0]} does not fit --model_name_or_path {tmp_path}; it was trained"
    ):
        load(adapter_name_or_path=finished[0], model_name_or_path=str(tmp_path), tokenizer_name=str(DEMO_MODEL))


def test_a_run_does_not_overwrite_what_it_starts_from(finished, text):
    flags = [
        "--adapter_name_or_path",
        finished[0],
        "--do_train",
        "--overwrite_output_dir",
        "--output_dir",
        finished[0],
    ]
    with pytest.raises(SystemExit, match=f"error: --output_dir {finished[0]} holds --adapter_name_or_path"):
        run_clm_abr.main([*QUICK, *text, *flags])


def test_a_new_adapter_is_not_said_to_start_from_one():
    assert not any(line.startswith("adapter") for line in describe_model(load()))


def test_an_adapter_of_the_demo_model_in_another_installation_is_loaded(tmp_path, caplog):
    path = Path(random_adapter(tmp_path / "adapter"), "adapter_config.json")
    config = json.loads(path.read_text())
    for earlier in ("/gone/abr_trainer/demo/model", "/gone/site-packages/abr_trainer/data/demo/model"):
        path.write_text(json.dumps({**config, "base_model_name_or_path": earlier}))
        model = load(adapter_name_or_path=str(path.parent))
        assert model.peft_config["default"].base_model_name_or_path == str(DEMO_MODEL)
    assert "was trained on" not in caplog.text
