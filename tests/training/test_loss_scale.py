"""What a rule sees is the mean loss per target, whatever the model, its loss and the accumulation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from abr_trainer import ABRMixin, ABRTrainer
from tests.conftest import VOCABULARY, Scripted, tiny_llama, token_rows, weights

pytestmark = pytest.mark.slow


def llama_rows():
    """Eight rows, of which half a row each of the last four are no targets: micro-batches of unequal weight."""
    rows = token_rows(8)
    for row in rows[4:]:
        row["labels"] = row["labels"].clone()
        row["labels"][:6] = -100
    return rows


def classifier():
    set_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=3,
            pad_token_id=0,
        )
    )


def class_rows():
    return [{"input_ids": row["input_ids"], "labels": torch.tensor(i % 3)} for i, row in enumerate(token_rows(8))]


def translator():
    set_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def own_bart():
    """Named like a causal language model, but its loss ignores how many targets the batch has."""
    set_seed(0)
    return BartForCausalLM(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
            dropout=0.0,
        )
    )


class Regressor(nn.Module):
    """No model of transformers: it takes no keywords, so that Trainer divides its loss by the accumulation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}


def regression_rows():
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(3, generator=generator), "labels": torch.tensor(float(i))} for i in range(8)]


class OwnLoss:
    """Computes a mean over the micro-batch and ignores how many targets the batch has."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OwnLossABRTrainer(OwnLoss, ABRTrainer):
    pass


class OwnLossTrainer(OwnLoss, Trainer):
    pass


class Noisy:
    """Its loss draws random numbers, so that two calls differ by more than the number of targets could make them."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss * (
            1 + 0.01 * torch.rand(()) * model.training + 0.1 * torch.rand(()) * (not model.training)
        )
        return (loss, outputs) if return_outputs else loss


class NoisyABRTrainer(Noisy, ABRTrainer):
    pass


class NoisyTrainer(Noisy, Trainer):
    pass


class TrainerOfMeans(Trainer):
    loss_is_scaled_for_ga = False


class ABRTrainerOfMeans(ABRTrainer):
    loss_is_scaled_for_ga = False


def mean_over_tokens(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


KINDS = {
    "causal LM": (tiny_llama, llama_rows, Trainer, ABRTrainer, {}),
    "label smoothing": (tiny_llama, llama_rows, Trainer, ABRTrainer, {"label_smoothing_factor": 0.1}),
    "compute_loss_func": (
        tiny_llama,
        llama_rows,
        Trainer,
        ABRTrainer,
        {"trainer_options": {"compute_loss_func": mean_over_tokens}},
    ),
    "own compute_loss": (tiny_llama, llama_rows, OwnLossTrainer, OwnLossABRTrainer, {}),
    "causal LM, divided": (tiny_llama, llama_rows, TrainerOfMeans, ABRTrainerOfMeans, {}),
    "causal LM with a loss of its own": (own_bart, llama_rows, Trainer, ABRTrainer, {}),
    "random compute_loss": (tiny_llama, llama_rows, NoisyTrainer, NoisyABRTrainer, {}),
    "classification": (classifier, class_rows, Trainer, ABRTrainer, {}),
    "classification, divided": (classifier, class_rows, TrainerOfMeans, ABRTrainerOfMeans, {}),
    "seq2seq": (translator, llama_rows, Trainer, ABRTrainer, {}),
    "regression": (Regressor, regression_rows, Trainer, ABRTrainer, {}),
}


NEEDS_DECLARATION = pytest.mark.skipif(
    not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="this version of transformers asks no class for its scale"
)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=NEEDS_DECLARATION if "divided" in kind else ()) for kind in KINDS]
)
def test_the_first_pass_loss_does_not_depend_on_accumulation_and_the_gradients_are_stock(train, kind):
    model, rows, stock, ours, options = KINDS[kind]
    seen = []
    for accumulation in (1, 2, 4):
        batches = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        theirs = train(
            trainer_cls=stock, config_cls=TrainingArguments, model=model(), data=rows(), **batches, **options
        )
        scheduler = Scripted(1)
        trainer = train(trainer_cls=ours, repeat_scheduler=scheduler, model=model(), data=rows(), **batches, **options)
        assert torch.equal(weights(trainer.model), weights(theirs.model))
        assert trainer.state.log_history[0].get("loss") == theirs.state.log_history[0].get("loss")
        seen.append(scheduler.outcomes[0].observation.loss)
    assert seen == pytest.approx([seen[0]] * 3, rel=0.01 if "random" in kind else 1e-5)


def test_the_first_pass_loss_is_the_mean_over_targets(train):
    scheduler = Scripted(1)
    train(model=classifier(), data=class_rows(), repeat_scheduler=scheduler, gradient_accumulation_steps=4)
    rows, model = class_rows(), classifier()
    logits = model(input_ids=torch.stack([row["input_ids"] for row in rows])).logits
    by_hand = nn.functional.cross_entropy(logits, torch.stack([row["labels"] for row in rows])).item()
    assert scheduler.outcomes[0].observation.loss == pytest.approx(by_hand, rel=1e-5)


def test_later_passes_are_measured_alike(train):
    scheduler = Scripted(3)
    options = {"model": classifier(), "data": class_rows(), "repeat_scheduler": scheduler}
    train(**options, gradient_accumulation_steps=4, learning_rate=0.0)
    (outcome,) = scheduler.outcomes
    assert outcome.losses == pytest.approx([outcome.observation.loss] * 3, rel=1e-6)


def test_a_batch_without_a_loss_leaves_the_question_to_the_next(train):
    rows = llama_rows()
    broken = [{"input_ids": row["input_ids"], "labels": torch.full((12,), -100)} for row in rows]
    scheduler = Scripted(1)
    train(model=translator(), data=broken + rows, repeat_scheduler=scheduler, gradient_accumulation_steps=4)
    alone = Scripted(1)
    train(model=translator(), data=rows, repeat_scheduler=alone, gradient_accumulation_steps=4)
    assert scheduler.outcomes[0].skipped
    assert scheduler.outcomes[1].observation.loss == alone.outcomes[0].observation.loss


class Seq2SeqABRTrainer(ABRMixin, Seq2SeqTrainer):
    pass


def test_a_seq2seq_trainer_repeats_and_generates(build, train):
    scheduler = Scripted(2)
    arguments = {"config_cls": Seq2SeqTrainingArguments, "data": llama_rows(), "predict_with_generate": True}
    trainer = train(trainer_cls=Seq2SeqABRTrainer, model=translator(), repeat_scheduler=scheduler, **arguments)
    assert trainer.ledger.updates == 2 * trainer.ledger.batches
    assert all(outcome.losses[1] < outcome.losses[0] for outcome in scheduler.outcomes)
    stock = build(trainer_cls=Seq2SeqTrainer, model=trainer.model, **arguments)
    ours, theirs = (each.predict(llama_rows()).predictions[:, :10] for each in (trainer, stock))
    assert (ours == theirs).all()
