"""Token-exact perplexity against a few lines of arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertForMaskedLM,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from abr_trainer import ABRConfig, ABRTrainer
from abr_trainer.perplexity.windows import TokenPerplexity, causal_nll
from abr_trainer.training.evaluation import NoSuchMetric
from abr_trainer.training.targets import shifts_labels
from tests.conftest import QUIET, VOCABULARY, Scripted, Stream, broken_row, tiny_llama, token_rows, weights
from tests.training.test_loss_scale import class_rows, classifier, own_bart, translator

pytestmark = pytest.mark.slow


def ragged_rows():
    """Rows of 12 tokens, of which 11, 8, 5, 2 are targets: what padding does to a data set."""
    rows = token_rows(4)
    for row, padded in zip(rows, (0, 3, 6, 9), strict=True):
        row["labels"] = row["labels"].clone()
        row["labels"][12 - padded :] = -100
    return rows


def expected_perplexity(model, rows):
    """exp(sum of nll / number of targets), token by token in Python floats."""
    nll, targets = 0.0, 0
    for row in rows:
        logits = model(row["input_ids"][None]).logits[0].double()
        for position, label in enumerate(row["labels"][1:].tolist()):
            if label != -100:
                nll -= math.log(
                    math.exp(logits[position, label]) / sum(math.exp(x) for x in logits[position].tolist())
                )
                targets += 1
    return math.exp(nll / targets), targets


@torch.no_grad()
def test_nll_of_each_row_is_summed_over_its_targets():
    model, rows = tiny_llama().eval(), ragged_rows()
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    total = TokenPerplexity()
    total.add(*causal_nll(model(batch["input_ids"]).logits, batch["labels"]))
    expected, targets = expected_perplexity(model, rows)
    assert targets == 11 + 8 + 5 + 2
    assert total.tokens == targets
    assert total.perplexity == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_evaluate_reports_it_whatever_the_batch_size(build, batch_size):
    rows = ragged_rows()
    trainer = build(per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate(rows)
    with torch.no_grad():
        expected, targets = expected_perplexity(trainer.model.eval(), rows)
    assert metrics["eval_perplexity"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval_target_tokens"] == targets
    assert trainer.state.log_history[-1]["eval_perplexity"] == metrics["eval_perplexity"]


def test_a_row_without_targets_changes_nothing(build):
    rows = token_rows(3)
    trainer = build(per_device_eval_batch_size=1)
    plain = trainer.evaluate(rows)["eval_perplexity"]
    assert trainer.evaluate([*rows, broken_row(rows[0])])["eval_perplexity"] == plain


def test_a_likelihood_that_is_not_finite_is_counted_and_not_dropped(build, caplog):
    rows = token_rows(5)
    used = {token for row in rows[1:] for token in row["input_ids"].tolist()}
    rows[0]["input_ids"] = rows[0]["labels"] = torch.tensor([next(t for t in range(64) if t not in used)] * 12)
    trainer = build(model=tiny_llama(tie_word_embeddings=False), per_device_eval_batch_size=2)
    assert "eval_non_finite_rows" not in trainer.evaluate(rows)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[rows[0]["input_ids"][0]] = math.inf
    metrics = trainer.evaluate(rows)
    assert math.isnan(metrics["eval_perplexity"])
    assert metrics["eval_non_finite_rows"] == 1
    assert "1 of 5 rows of the eval set have a likelihood that is not finite" in caplog.text


@torch.no_grad()
def test_positions_before_the_labels_do_not_count():
    # Prompt tuning puts virtual tokens before the text: their logits have no labels.
    model, row = tiny_llama().eval(), token_rows(1)[0]
    logits = model(row["input_ids"][None]).logits
    plain = causal_nll(logits, row["labels"][None])
    prompted = causal_nll(torch.cat([torch.randn(1, 3, 64), logits], dim=1), row["labels"][None])
    assert torch.equal(plain[0], prompted[0])


def test_predict_reports_it_too_and_returns_the_logits_as_before(build):
    rows = token_rows(3)
    output = build().predict(rows)
    assert output.predictions.shape == (3, 12, 64)
    assert output.metrics["test_perplexity"] > 1


# ---- Every causal language model ----

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32}
SMALL |= {"num_hidden_layers": 1, "num_attention_heads": 2}
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
NO_DROPOUT_GPT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NO_DROPOUT_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
SHIFTING = {
    "bert": SMALL | NO_DROPOUT_BERT | {"is_decoder": True},
    "bert-generation": SMALL | NO_DROPOUT_BERT | {"is_decoder": True},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 1, "n_head": 2} | NO_DROPOUT,
    "ctrl": GPT | NO_DROPOUT_GPT | {"dff": 32},
    "falcon": SMALL | NO_DROPOUT,
    "gemma": SMALL | {"head_dim": 8, "num_key_value_heads": 1},
    "gpt2": GPT | NO_DROPOUT_GPT,
    "gpt_neo": {"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    | {"attention_types": [[["global"], 1]], "max_position_embeddings": 32},
    "gpt_neox": SMALL | NO_DROPOUT,
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "mistral": SMALL | {"num_key_value_heads": 1},
    "olmo": SMALL,
    "openai-gpt": GPT | NO_DROPOUT_GPT,
    "opt": {"vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "dropout": 0.0}
    | {"num_attention_heads": 2, "max_position_embeddings": 32, "word_embed_proj_dim": 16},
    "phi": SMALL | {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "qwen2": SMALL | {"num_key_value_heads": 1},
    "qwen3": SMALL | {"num_key_value_heads": 1, "head_dim": 8},
}


XLNET = {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "dropout": 0.0}


def small_model(kind):
    set_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model(kind, **{**special, **(XLNET if kind == "xlnet" else SHIFTING[kind])})
    return AutoModelForCausalLM.from_config(config)


def nlls(model, rows, predicts_first=False):
    """The summed nll of the targets of each row and their number, from logits in float64, row by row."""
    found = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"][None], use_cache=False).logits[0].double()
        before = len(logits) - len(row["labels"])  # virtual tokens
        first = 0 if predicts_first else 1
        logs = logits.log_softmax(-1)[before + first - 1 : len(logits) - 1]
        targets = row["labels"][first:]
        kept = targets != -100
        found.append((-logs[kept].gather(1, targets[kept][:, None]).sum().item(), int(kept.sum())))
    return found


def mean_nll(some):
    return sum(nll for nll, _ in some) / sum(targets for _, targets in some)


@pytest.mark.parametrize("kind", SHIFTING)
def test_every_causal_model_logs_and_evaluates_its_perplexity(train, kind):
    rows, accumulation = ragged_rows(), 1 + len(kind) % 2
    trainer = train(
        model=small_model(kind),
        data=rows,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.0,
        logging_steps=2 // accumulation,
    )
    found = nlls(trainer.model.eval(), rows)
    batches = [mean_nll(found[:2]), mean_nll(found[2:])] if accumulation == 1 else [mean_nll(found)]
    logged = trainer.state.log_history[0]
    assert logged["perplexity"] == pytest.approx(math.exp(sum(batches) / len(batches)), rel=1e-5)
    metrics = trainer.evaluate(rows)
    assert metrics["eval_target_tokens"] == 11 + 8 + 5 + 2
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(mean_nll(found)), rel=1e-5)


class GPT2WithHabits(GPT2LMHeadModel):
    """Somebody's own class, which leaves the loss to the one that it derives from."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


def gpt2_with_habits():
    set_seed(0)
    return GPT2WithHabits(AutoConfig.for_model("gpt2", **SHIFTING["gpt2"]))


def with_adapter(kind, config):
    model = tiny_llama() if kind == "llama" else small_model(kind)
    return get_peft_model(model, config)


LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
PREFIX = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
WRAPPED = {
    "own forward": (gpt2_with_habits, False),
    "LoRA on GPT-2": (
        lambda: with_adapter(
            "gpt2", LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
        ),
        False,
    ),
    "prompt tuning": (lambda: with_adapter("llama", PROMPT), True),
    "prompt tuning of GPT-2": (lambda: with_adapter("gpt2", PROMPT), True),
    "prefix tuning": (lambda: with_adapter("llama", PREFIX), False),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", WRAPPED)
def test_what_is_put_around_a_model_leaves_its_perplexity_right(train, kind, accumulation):
    build, predicts_first = WRAPPED[kind]
    rows, scheduler = ragged_rows(), Scripted(2)
    trainer = train(
        model=build(),
        data=rows,
        repeat_scheduler=scheduler,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.0,
        logging_steps=2 // accumulation,
    )
    model = trainer.model.eval()
    found = nlls(model, rows, predicts_first)
    batches = [mean_nll(found[:2]), mean_nll(found[2:])] if accumulation == 1 else [mean_nll(found)]
    for outcome, expected in zip(scheduler.outcomes, batches, strict=True):
        assert outcome.losses == pytest.approx([expected] * 2, rel=1e-5)
    assert trainer.state.log_history[0]["perplexity"] == pytest.approx(math.exp(sum(batches) / len(batches)), rel=1e-5)
    evaluated = nlls(
        model, rows
    )  # in an evaluation the first token is no target, with virtual tokens before it or not
    assert trainer.evaluate(rows)["eval_perplexity"] == pytest.approx(math.exp(mean_nll(evaluated)), rel=1e-5)


def test_a_compiled_model_is_known_for_what_it_is(build):
    assert shifts_labels(build(model=torch.compile(small_model("gpt2"))))
    assert not shifts_labels(build(model=torch.compile(small_model("xlnet"))))


def test_gpt2_is_trained_as_by_stock_trainer(train):
    rows = ragged_rows()
    theirs = train(trainer_cls=Trainer, config_cls=TrainingArguments, model=small_model("gpt2"), data=rows)
    ours = train(model=small_model("gpt2"), data=rows)
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert ours.state.log_history[0]["loss"] == theirs.state.log_history[0]["loss"]


def masked_model():
    set_seed(0)
    return BertForMaskedLM(AutoConfig.for_model("bert", **SMALL))


@pytest.mark.parametrize("build_model", [lambda: small_model("xlnet"), own_bart, masked_model, translator, classifier])
def test_a_model_that_predicts_no_next_token_has_no_perplexity(train, build_model, caplog):
    data = class_rows() if build_model is classifier else token_rows(4)
    trainer = train(model=build_model(), data=data)
    metrics = trainer.evaluate(data)
    trainer.evaluate(data)
    assert "perplexity" not in trainer.state.log_history[0]
    assert "eval_perplexity" not in metrics
    told = caplog.text.count("No perplexity is measured, because the loss of")
    assert told == (type(trainer.model).__name__ in ("XLNetLMHeadModel", "BartForCausalLM"))
    with pytest.raises(ValueError, match="--metric_for_best_model perplexity: no perplexity is measured, because"):
        build_best(type(trainer), trainer.model, data, trainer.args.output_dir)


def build_best(trainer_cls, model, data, output_dir, **options):
    args = {"metric_for_best_model": "perplexity", "eval_strategy": "epoch", "save_strategy": "epoch"}
    config = ABRConfig(output_dir=output_dir, load_best_model_at_end=True, **QUIET, **args)
    return trainer_cls(model=model, args=config, train_dataset=data, eval_dataset=data, **options)


def test_the_best_model_is_not_looked_for_in_an_evaluation_set_without_targets(tmp_path):
    rows = [broken_row(row) for row in token_rows(4)]
    match = r"perplexity: no row of the eval set has a target \(a label other than -100\)"
    with pytest.raises(ValueError, match=match):
        build_best(ABRTrainer, tiny_llama(), rows, str(tmp_path))
    one_label = [{**row, "labels": row["labels"].where(torch.arange(12) == 0, -100)} for row in token_rows(4)]
    with pytest.raises(ValueError, match=match):  # nothing predicts the first token
        build_best(ABRTrainer, tiny_llama(), one_label, str(tmp_path))


@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize("patience", [None, 1])
def test_an_evaluation_without_the_metric_of_the_best_model_ends_the_run_in_one_line(build, at_start, patience):
    rows = token_rows(4)
    trainer = build(
        data=rows,
        trainer_options={"eval_dataset": Stream([broken_row(row) for row in rows])},  # not known before
        metric_for_best_model="perplexity",
        load_best_model_at_end=True,
        early_stopping_patience=patience,
        eval_strategy="epoch",
        save_strategy="epoch",
        eval_on_start=at_start,
    )
    with pytest.raises(NoSuchMetric) as caught:
        trainer.train()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        "--metric_for_best_model perplexity was not measured in the evaluation after "
        f"{0 if at_start else 2} batches: no row of the eval set has a target"
    )


def test_an_evaluation_set_without_targets_is_told(build, caplog):
    metrics = build().evaluate([broken_row(row) for row in token_rows(4)])
    assert "eval_perplexity" not in metrics
    assert "No row of the eval set has a target (a label other than -100), so there is no perplexity." in caplog.text
