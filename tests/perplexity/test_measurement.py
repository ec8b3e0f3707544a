"""`abr perplexity`, as a user runs it."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_outputs import CausalLMOutput

import run_clm_abr
from abr_trainer.cli import perplexity
from abr_trainer.data.demo import DEMO_MODEL, demo_texts
from abr_trainer.models.pruning import nonzero_shares
from abr_trainer.perplexity.definitions import DEFINITIONS
from abr_trainer.perplexity.windows import Window, sliding_windows, window_nlls
from tests.conftest import RUN, model_for, tiny_llama, tokenizer_that_adds

pytestmark = pytest.mark.slow

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
QUICK = ["--token_length", "64", "--use_cpu", "--max_rows", "10"]
DEMO = ["--dataset_name", "demo", *QUICK]


def run(*flags):
    return perplexity.main([*flags])


def error_of(*flags):
    with pytest.raises(SystemExit) as ended:
        run(*flags)
    message = str(ended.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that changes what the demo model says."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), LoraConfig(target_modules=["q_proj"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    directory = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(directory)
    return directory


def test_the_number_is_printed_and_written_with_all_that_defines_it(tmp_path, capsys):
    found = run(*DEMO, "--stride", "32", "--output_file", str(tmp_path / "found.json"))
    shown = capsys.readouterr().out
    assert f"perplexity  {found['perplexity']:.4f} (token): exp(sum of nll / number of target tokens)" in shown
    assert "text        --dataset_name demo test, 10 rows" in shown
    assert f"windows     {found['windows']} of 64 tokens every 32, {found['target_tokens']:,} targets" in shown
    assert "not zero    embed_tokens 100.0%, q_proj 100.0%" in shown
    written = json.loads((tmp_path / "found.json").read_text())
    assert written == found
    assert {"definition", "says", "dtype", "quantisation", "tokenizer", "versions", "git", "machine"} <= set(written)
    assert written["non_finite_windows"] == []


def test_it_measures_what_a_run_has_logged(tmp_path):
    flags = ["--dataset_name", "demo", "--block_size", "64", "--use_cpu", "--disable_tqdm", "true", "--do_predict"]
    logged = run_clm_abr.main([*flags, "--max_passes", "8", "--do_train", "--output_dir", str(tmp_path / "run")])
    found = run(
        "--dataset_name",
        "demo",
        "--token_length",
        "64",
        "--use_cpu",
        "--adapter",
        str(tmp_path / "run"),
        "--definition",
        "trainer",
    )
    assert found["perplexity"] == pytest.approx(logged["test_perplexity"], rel=1e-6)
    assert found["target_tokens"] == logged["test_target_tokens"]


def test_an_adapter_is_measured_on_its_base(adapter):
    plain, adapted = run(*DEMO), run(*DEMO, "--adapter", str(adapter))
    assert adapted["perplexity"] > 1.01 * plain["perplexity"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    ids = [x for text in demo_texts("test")[:10] for x in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    windows = [Window(ids[a:b], scored, scored) for a, b, scored in sliding_windows(len(ids), 64, 64)]
    nll = math.fsum(window_nlls(model, windows, 4))
    assert adapted["perplexity"] == pytest.approx(math.exp(nll / adapted["target_tokens"]), rel=1e-6)
    assert adapted["nonzero_share"] == plain["nonzero_share"]


@pytest.mark.parametrize(("flag", "kind"), [("--load_in_8bit", "8-bit"), ("--load_in_4bit", "4-bit")])
def test_quantised_models_are_measured(flag, kind, adapter):
    plain = run(*DEMO)["perplexity"]
    found = run(*DEMO, flag, "--torch_dtype", "float32", "--bnb_4bit_compute_dtype", "float32")
    assert found["quantisation"] == kind
    assert found["perplexity"] != plain
    assert found["perplexity"] == pytest.approx(plain, rel=0.05)
    assert run(*DEMO, flag, "--adapter", str(adapter))["perplexity"] > found["perplexity"]


def test_half_precision_is_summed_in_whole():
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16).eval()
    ids = AutoTokenizer.from_pretrained(DEMO_MODEL)(demo_texts("test")[0])["input_ids"][:60]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    exact = -torch.log_softmax(logits, dim=-1)[range(len(ids) - 1), ids[1:]].sum()
    assert window_nlls(model, [Window(ids, len(ids) - 1, 1)], 1)[0] == pytest.approx(float(exact), rel=1e-6)
    assert run(*DEMO, "--torch_dtype", "bfloat16")["dtype"] == "bfloat16"


def test_a_text_of_ones_own_a_pruned_model_and_the_configuration_of_another(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    weight = model.model.layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        weight[:, ::2] = 0
    model.save_pretrained(tmp_path / "pruned")
    (tmp_path / "own.txt").write_text("\n\n".join(demo_texts("test")[:4]))
    flags = ["--text_file", str(tmp_path / "own.txt"), "--token_length", "32", "--use_cpu"]
    own = [
        "--model_name_or_path",
        str(tmp_path / "pruned"),
        "--config_name",
        str(DEMO_MODEL),
        "--tokenizer_name",
        str(DEMO_MODEL),
    ]
    found = run(*flags, *own)
    assert found["perplexity"] > run(*flags)["perplexity"]
    assert found["nonzero_share"]["v_proj"] == 1 - 0.5 / 4  # half of one layer in four
    assert found["nonzero_share"]["q_proj"] == 1


def test_a_likelihood_that_is_not_finite_is_counted_and_named(tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    (tmp_path / "own.txt").write_text(demo_texts("test")[0] * 3)
    token = tokenizer(demo_texts("test")[0])["input_ids"][5]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan  # tied: whatever follows it, and all that it may be
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    found = run(
        "--text_file",
        str(tmp_path / "own.txt"),
        "--token_length",
        "8",
        "--use_cpu",
        "--model_name_or_path",
        str(tmp_path / "broken"),
        "--output_file",
        str(tmp_path / "found.json"),
    )
    assert found["perplexity"] is None
    assert found["non_finite_windows"] == list(range(found["windows"]))
    assert found["perplexity_without_them"] is None
    assert f"not finite  {found['windows']} of {found['windows']} windows: 0, 1, 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["perplexity"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*DEMO, "--stride", "65"], "--stride 65 must not exceed --token_length 64"),
        ([*DEMO, "--definition", "wanda", "--stride", "8"], "--stride cannot be used with --definition wanda, only"),
        ([*DEMO, "--definition", "wnda"], "Unknown --definition 'wnda'. Did you mean 'wanda'?"),
        ([*DEMO, "--definition", "lm-eval", "--max_windows", "3"], "Give --max_rows"),
        (["--dataset_name", "demo", "--token_length", "4096"], "exceeds the model's context of 256 tokens"),
        (["--use_cpu"], "Give either --dataset_name or --text_file"),
        ([*DEMO, "--text_file", "x.txt"], "Give either --dataset_name or --text_file"),
        (["--text_file", "no-such.txt"], "--text_file no-such.txt does not exist."),
        ([*DEMO, "--adapter", "no-such"], "--adapter_name_or_path no-such is not an adapter"),
        ([*DEMO, "--output_file", "no/such.json"], "--output_file no/such.json: its directory does not exist."),
        ([*DEMO, "--batch_size", "0"], "--batch_size must be at least 1, got 0."),
        ([*DEMO, "--split", "tset"], "--split must be one of validation, train, test, got tset."),
        ([*DEMO, "--lora_r", "8"], "Unknown flag --lora_r."),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_line(flags, message):
    assert message in error_of(*flags)


@pytest.mark.parametrize("content", ["", " \n\n \n"])
def test_an_empty_text_is_told(tmp_path, content):
    (tmp_path / "own.txt").write_text(content)
    message = error_of("--text_file", str(tmp_path / "own.txt"), "--use_cpu")
    assert re.search("own.txt (is empty|contains no text)", message)


@pytest.mark.parametrize("definition", ["token", "trainer", "hf-stride", "wanda", "wanda-lora"])
def test_a_text_shorter_than_a_window_is_told(tmp_path, definition):
    (tmp_path / "own.txt").write_text("The committee met.")
    message = error_of("--text_file", str(tmp_path / "own.txt"), "--definition", definition, "--token_length", "64")
    assert f"own.txt is shorter than one window of --definition {definition}: --token_length is 64" in message


# ---- Tokenizers that add special tokens, or have none ----


@pytest.fixture(scope="module", params=["bos", "eos", "both", "none"])
def begun(request, tmp_path_factory):
    """A model whose tokenizer puts special tokens around a text, or could and does not."""
    directory, tokenizer = tmp_path_factory.mktemp("begun"), tokenizer_that_adds(request.param)
    model_for(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return request.param, directory


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_every_definition_takes_a_tokenizer_that_adds_special_tokens(begun, tmp_path, definition):
    kind, model = begun
    (tmp_path / "own.txt").write_text("\n".join(demo_texts("test")[:4]))
    found = run(
        *("--text_file", str(tmp_path / "own.txt"), "--use_cpu", "--model_name_or_path", str(model)),
        *("--definition", definition, "--token_length", "32"),
    )
    adds = kind in ("bos", "both") and definition in ("hf-stride", "wanda", "wanda-lora")
    assert found["begun_by"] == ("<s>" if adds or definition in ("lm-eval", "evaluate") else None)
    assert math.isfinite(found["perplexity"])


def test_the_published_number_of_a_llama_begins_with_one_bos(tmp_path, capsys):
    tokenizer = tokenizer_that_adds("bos")
    model = model_for(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    Dataset.from_dict({"text": demo_texts("test")[:6]}).to_parquet(tmp_path / "own.parquet")
    found = run(
        *("--text_file", str(tmp_path / "own.parquet"), "--use_cpu", "--model_name_or_path", str(tmp_path)),
        *("--definition", "wanda", "--token_length", "32"),
    )
    ids = [tokenizer.bos_token_id, *tokenizer(" ".join(demo_texts("test")[:6]), add_special_tokens=False)["input_ids"]]
    blocks = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        logits = model(blocks).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert "targets, starting with <s>" in capsys.readouterr().out


def test_a_text_that_begins_with_a_special_token_is_measured(begun, tmp_path):
    _, model = begun
    (tmp_path / "own.txt").write_text("<s>" + "\n".join(demo_texts("test")[:4]))
    found = run(
        *("--text_file", str(tmp_path / "own.txt"), "--use_cpu", "--model_name_or_path", str(model)),
        *("--token_length", "32"),
    )
    assert found["begun_by"] == "<s>"


def test_a_tokenizer_without_an_end_of_text_token_is_told(tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    found = run(*DEMO, "--model_name_or_path", str(tmp_path))
    assert f"{tmp_path} has no end-of-text token, so nothing separates documents" in caplog.text
    assert found["target_tokens"] < run(*DEMO)["target_tokens"]


# ---- Models that have no such perplexity, or not for such windows ----


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            BertForMaskedLM(BertConfig(**TINY)),
            "but a masked language model, which can see the tokens that it should pr",
        ),
        (
            BertLMHeadModel(BertConfig(**TINY)),
            "but a masked language model, which can see the tokens that it should pr",
        ),
        (T5Model(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)), "but an encoder-deco"),
        (ViTModel(ViTConfig(**TINY)), "but another kind of model (vit, ViTModel)."),
    ],
)
@pytest.mark.parametrize("script", [perplexity, run_clm_abr])
def test_what_is_no_causal_language_model_is_refused(tmp_path, model, message, script):
    model.save_pretrained(tmp_path / "model")
    flags = DEMO if script is perplexity else [*RUN, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        script.main([*flags, "--model_name_or_path", str(tmp_path / "model"), "--tokenizer_name", str(DEMO_MODEL)])
    told = str(ended.value)
    assert told.startswith(
        f"error: --model_name_or_path {tmp_path / 'model'} is not a causal language model {message}"
    )
    assert "\n" not in told


def test_a_masked_model_that_was_made_a_decoder_is_measured(tmp_path):
    config = BertConfig(**{**TINY, "vocab_size": 1024}, is_decoder=True, max_position_embeddings=64)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    found = run(*DEMO, "--model_name_or_path", str(tmp_path), "--tokenizer_name", str(DEMO_MODEL))
    assert found["perplexity"] == pytest.approx(1024, rel=0.1)


def test_windows_leave_room_for_virtual_tokens(tmp_path):
    """GPT-2 has a row of its table for each position, and none beyond."""
    base = GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "base")
    for name, kind in (("prompt", PromptTuningConfig), ("prefix", PrefixTuningConfig)):
        adapter = tmp_path / name
        get_peft_model(
            GPT2LMHeadModel(base.config), kind(task_type="CAUSAL_LM", num_virtual_tokens=10)
        ).save_pretrained(adapter)
        flags = ["--dataset_name", "demo", "--max_rows", "4", "--use_cpu", "--model_name_or_path"]
        flags += [str(tmp_path / "base"), "--adapter", str(adapter)]
        assert run(*flags)["token_length"] == 54
        assert "context of 64 tokens, of which the adapter uses 10: give at most 54." in error_of(
            *flags, "--token_length", "55"
        )


class ShyConfig(PreTrainedConfig):
    model_type = "shy"


class ShyModel(PreTrainedModel):
    """32 positions, of which its configuration says nothing."""

    config_class = ShyConfig

    def __init__(self, config):
        super().__init__(config)
        self.tokens, self.positions = torch.nn.Embedding(1024, 8), torch.nn.Embedding(32, 8)
        self.head = torch.nn.Linear(8, 1024)
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        seen = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        return CausalLMOutput(logits=self.head(seen))


def test_a_model_that_does_not_tell_its_positions_is_told(tmp_path):
    AutoConfig.register("shy", ShyConfig)
    AutoModelForCausalLM.register(ShyConfig, ShyModel)
    ShyModel(ShyConfig()).save_pretrained(tmp_path)
    flags = ["--model_name_or_path", str(tmp_path), "--tokenizer_name", str(DEMO_MODEL)]
    assert run(*DEMO, *flags, "--token_length", "33")["perplexity"] > 1
    message = error_of(*DEMO, *flags, "--token_length", "34")
    assert "The model has too few positions for windows of 34 tokens. Give a lower --token_length." in message


def test_an_adapter_of_another_base_is_told(tmp_path):
    narrow = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    narrow.save_pretrained(tmp_path / "narrow")
    base, narrow = ["--model_name_or_path", "demo"], tmp_path / "narrow"
    message = error_of(*DEMO, "--adapter", str(narrow))
    assert f"{narrow} does not record its base model. Give --model_name_or_path." in message
    message = error_of(*DEMO, *base, "--adapter", str(narrow))
    assert f"--adapter_name_or_path {narrow} does not fit --model_name_or_path {DEMO_MODEL}; it was trained" in message
    shallow = LlamaForCausalLM(
        LlamaConfig(**{**AutoModelForCausalLM.from_pretrained(DEMO_MODEL).config.to_dict(), "num_hidden_layers": 2})
    )
    get_peft_model(shallow, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "shallow")
    assert "does not fit" in error_of(*DEMO, *base, "--adapter", str(tmp_path / "shallow"))


def test_an_adapter_of_a_deeper_base_is_told(tmp_path):
    config = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).config.to_dict()
    deeper = LlamaForCausalLM(LlamaConfig(**{**config, "num_hidden_layers": 6}))
    get_peft_model(deeper, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "the model has no base_model.model.model.layers.4.self_attn.q_proj.lora_A" in error_of(
        *DEMO, "--model_name_or_path", "demo", "--adapter", str(tmp_path)
    )


def test_an_adapter_on_another_base_of_the_same_shape_is_warned_of(adapter, tmp_path, caplog):
    AutoModelForCausalLM.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path)
    run(*DEMO, "--model_name_or_path", str(tmp_path), "--adapter", str(adapter))
    assert f"was trained on {DEMO_MODEL}, but is used on {tmp_path}" in caplog.text


def test_a_split_that_is_not_there_is_told(tmp_path):
    Dataset.from_dict({"text": ["One."]}).to_parquet(tmp_path / "train.parquet")
    message = error_of("--dataset_name", str(tmp_path), "--split", "test")
    assert "has no test split. Give --split train, or a --text_file." in message


def test_a_tokenizer_of_another_model_is_told(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    message = error_of(*DEMO, "--model_name_or_path", str(tmp_path), "--tokenizer_name", str(DEMO_MODEL))
    assert "but the model has only 64 embeddings. Give the model's tokenizer as --tokenizer_name." in message


def test_measuring_leaves_the_model_as_it_was():
    model = tiny_llama().train()
    before = torch.get_rng_state()
    window_nlls(model, [Window([1, 2, 3], 2, 2), Window([1, 2, 3, 4], 1, 1)], 2)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_windows_of_different_lengths_do_not_touch_each_other():
    model = tiny_llama()
    windows = [Window([5, 9, 3, 7, 1], 2, 2), Window([4, 8], 1, 1), Window([2, 2, 6], 2, 2)]
    alone = [window_nlls(model, [window], 1)[0] for window in windows]
    assert window_nlls(model, windows, 3) == pytest.approx(alone, rel=1e-6)


def test_tied_weights_are_counted_once():
    tied, untied = tiny_llama(), tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        untied.lm_head.weight.zero_()
    assert "lm_head" not in nonzero_shares(tied)
    shares = nonzero_shares(untied)
    assert (shares["lm_head"], shares["embed_tokens"]) == (0, 1)


# ---- In the course of a run ----


def test_a_run_follows_the_definition_and_the_text_that_are_chosen(tmp_path, capsys):
    text = tmp_path / "talk.txt"
    text.write_text("\n".join(demo_texts("test")[:4]))
    chosen = ["--eval_definition", "hf-stride", "--eval_text", str(text), "--eval_stride", "24"]
    output = tmp_path / "run"
    results = run_clm_abr.main([*RUN, *chosen, "--num_train_epochs", "2", "--output_dir", str(output)])
    measured = ["--text_file", str(text), "--definition", "hf-stride", "--stride", "24", "--token_length", "64"]
    found = run(*measured, "--max_windows", "6", "--use_cpu", "--adapter", str(output))
    assert results["eval_hf_stride_perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)
    assert results["eval_hf_stride_perplexity"] != pytest.approx(results["eval_perplexity"], rel=1e-3)
    history = json.loads((output / "perplexity_history.json").read_text())
    assert history["metric"] == "eval_hf_stride_perplexity"
    before, _, after = (each["perplexity"] for each in history["evaluations"])
    assert after == results["eval_hf_stride_perplexity"]
    shown = capsys.readouterr().out
    assert re.search(rf" {before:.2f} +Before training\n", shown)
    assert re.search(rf" {after:.2f} +Epoch 2: [-+]\d+\.\d %", shown)
    assert f"evaluation  hf stride perplexity {before:.2f} before, {after:.2f} after" in shown


def test_what_is_measured_besides_changes_nothing_in_what_is_trained(tmp_path):
    weights = []
    for name, more in (("plain", []), ("measured", ["--eval_definition", "wanda"])):
        run_clm_abr.main([*RUN, *more, "--lora_dropout", "0.5", "--output_dir", str(tmp_path / name)])
        weights.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_stride", "8"], "--eval_stride needs --eval_definition."),
        (["--eval_text", "x.txt"], "--eval_text needs --eval_definition."),
        (["--eval_definition", "hf-strid"], "Unknown --eval_definition 'hf-strid'. Did you mean 'hf-stride'?"),
        (["--eval_definition", "wanda", "--eval_stride", "8"], "--eval_stride cannot be used with --eval_def"),
        (["--eval_definition", "hf-stride", "--eval_stride", "65"], "--eval_stride 65 must not exceed --block_size"),
        (["--eval_definition", "lm-eval"], "--max_eval_samples cannot be used with --eval_definition lm-eval"),
        (["--eval_definition", "token", "--eval_text", "no/such.txt"], "--eval_text no/such.txt cannot be loaded: "),
        (["--eval_definition", "token", "--do_eval", "false"], "--eval_definition needs --do_eval."),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_in_a_run_is_refused_in_one_line(tmp_path, flags, message):
    with pytest.raises(SystemExit) as ended:
        run_clm_abr.main([*RUN, *flags, "--output_dir", str(tmp_path / "run")])
    assert str(ended.value).startswith(f"error: {message}")
    assert "\n" not in str(ended.value)
    assert not (tmp_path / "run").exists()


def test_rows_of_a_training_file_are_not_measured_as_if_they_were_new(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n".join(demo_texts("test")[:40]))
    mix = ["--dataset_mix", f"{tmp_path}/a.txt=0.5,{tmp_path}/b.txt=0.5", "--eval_definition", "token"]
    rest = [flag for flag in RUN if flag not in ("--dataset_name", "demo")]
    with pytest.raises(
        SystemExit, match="error: --eval_definition needs a text. Give --eval_text or --validation_fil"
    ):
        run_clm_abr.main([*rest, *mix, "--output_dir", str(tmp_path / "run")])


def test_a_text_shorter_than_a_window_is_refused_in_a_run(tmp_path):
    (tmp_path / "short.txt").write_text("A word.")
    flags = ["--eval_definition", "wanda", "--eval_text", str(tmp_path / "short.txt")]
    with pytest.raises(SystemExit, match="is shorter than one window of --eval_definition wanda: --block_size is 64."):
        run_clm_abr.main([*RUN, *flags, "--output_dir", str(tmp_path / "run")])
