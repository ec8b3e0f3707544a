"""Rows that are dropped: the gradient is that of data whose labels are masked, and nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from abr_trainer import ABRConfig, ABRTrainer
from abr_trainer.records.files import read_lines
from abr_trainer.report.rows import broken_rows, explain_rows, read_judged_rows
from abr_trainer.report.why import read_trace
from abr_trainer.schedulers import ConstantScheduler, ReplayScheduler, RowRule
from abr_trainer.training.row_seams import RowsUnsupported
from tests.conftest import VOCABULARY, Scripted, tiny_llama, tiny_mixture, token_rows, weights
from tests.jobs import StopAfter
from tests.training.test_clock import Slow

pytestmark = pytest.mark.slow

IGNORED = -100


class Named(RowRule):
    """Drop the rows that are named: batch and position. Remembers what it was shown."""

    def __init__(self, *named: tuple[int, int]) -> None:
        self.named = set(named)
        self.asked: list[Any] = []
        self.seen: list[tuple[list[Any], list[bool]]] = []

    def decide(self, row):
        self.asked.append(row)
        return (row.batch, row.position) not in self.named

    def observe(self, rows, kept):
        self.seen.append((list(rows), list(kept)))


def masked(rows: list[dict[str, Any]], dropped: set[int]) -> list[dict[str, Any]]:
    """Rows of which some have no targets."""
    return [
        {**row, "labels": torch.full_like(row["labels"], IGNORED)} if i in dropped else row
        for i, row in enumerate(rows)
    ]


class DividesByAll(Trainer):
    """Stock Trainer, told how many targets there were before labels were masked."""

    targets = 11  # a row of twelve tokens

    def _get_num_items_in_batch(self, batch_samples, device):
        return torch.tensor(sum(len(each["input_ids"]) for each in batch_samples) * self.targets)


class Masked(ABRTrainer):
    """Repeats on rows whose labels are masked, divided by the targets of all."""

    targets = DividesByAll.targets
    _get_num_items_in_batch = DividesByAll._get_num_items_in_batch


DROPPED = {1, 6, 7}
"""Of 12 rows: in batches of two micro-batches of two, (0, 1), (1, 2) and (1, 3)."""


def named(accumulation: int) -> Named:
    return Named(*((row // (2 * accumulation), row % (2 * accumulation)) for row in DROPPED))


def small(kind: str) -> Any:
    if kind == "lora":
        model = tiny_llama()
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
    if kind == "mixtral":
        return tiny_mixture("mixtral", output_router_logits=True)
    if kind == "prompt tuning":
        torch.manual_seed(0)
        return get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    if kind == "gpt2":
        torch.manual_seed(0)
        sizes = dict(n_embd=16, n_layer=1, n_head=2, n_positions=32)
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes))
    return tiny_llama()


@pytest.mark.parametrize(("rows", "accumulation"), [(4, 1), (2, 2), (2, 4)])
@pytest.mark.parametrize(
    "kind", ["full", "lora", "mixtral", "bf16", "checkpointing", "noise", "prompt tuning", "gpt2"]
)
def test_dropped_rows_are_masked_labels(train, kind, rows, accumulation):
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": rows}
    options |= {"bf16": {"bf16": True}, "checkpointing": {"gradient_checkpointing": True}}.get(kind, {})
    options |= {"neftune_noise_alpha": 5.0} if kind == "noise" else {}
    rule = named(rows * accumulation // 2)
    ours = train(model=small(kind), trainer_options={"row_rule": rule}, skip_outliers="none", **options)
    theirs = train(
        model=small(kind),
        data=masked(token_rows(12), DROPPED),
        # Of GPT-2, stock Trainer counts the first labels, too.
        trainer_cls=type("DividesByAllLabels", (DividesByAll,), {"targets": 12}) if kind == "gpt2" else DividesByAll,
        config_cls=TrainingArguments,
        **options,
    )
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert ours.ledger.rows == 12
    assert ours.ledger.rows_dropped == 3
    assert ours.ledger.forwards == 12 // rows


def test_a_row_rule_is_enough_beside_plain_arguments(train):
    options: dict[str, Any] = {"config_cls": TrainingArguments, "gradient_accumulation_steps": 2}
    ours = train(trainer_options={"row_rule": named(2)}, **options)
    theirs = train(data=masked(token_rows(12), DROPPED), trainer_cls=DividesByAll, **options)
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert ours.ledger.rows_dropped == 3


def test_a_batch_of_which_half_is_dropped_is_trained_on_and_of_which_more_is_not(train):
    scheduler = Scripted(1)
    ours = train(
        repeat_scheduler=scheduler,
        trainer_options={"row_rule": Named((0, 0), (0, 1), (1, 0), (1, 2), (1, 3))},
        per_device_train_batch_size=4,
    )
    assert [(o.repeats, o.reason, o.rows, o.rows_dropped) for o in scheduler.outcomes] == [
        (1, "scheduler", 4, 2),
        (0, "rows", 4, 3),
        (1, "scheduler", 4, 0),
    ]
    assert ours.ledger.skips == 1


@pytest.mark.parametrize("accumulation", [1, 3])
def test_nothing_dropped_is_ordinary_training(train, accumulation):
    ours = train(trainer_options={"row_rule": Named()}, gradient_accumulation_steps=accumulation, skip_outliers="none")
    theirs = train(trainer_cls=Trainer, config_cls=TrainingArguments, gradient_accumulation_steps=accumulation)
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert "_loss_function" not in vars(ours.model)


def test_repeats_use_the_same_rows(train):
    ours = train(
        repeat_scheduler=Scripted(3, 1, 2), trainer_options={"row_rule": named(2)}, gradient_accumulation_steps=2
    )
    theirs = train(
        repeat_scheduler=Scripted(3, 1, 2),
        data=masked(token_rows(12), DROPPED),
        trainer_cls=Masked,
        gradient_accumulation_steps=2,
    )
    assert torch.equal(weights(ours.model), weights(theirs.model))


@pytest.mark.parametrize("is_resumed", [False, True])
def test_replays_use_the_same_rows(train, build, is_resumed):
    def rule() -> ReplayScheduler:
        return ReplayScheduler(quantile=0.0, spacing=2, buffer_size=3)

    options: dict[str, Any] = {"gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1}
    ours = build(repeat_scheduler=rule(), trainer_options={"row_rule": named(1)}, **options)
    if is_resumed:
        ours.add_callback(StopAfter(4))
    ours.train()
    if is_resumed:
        ours = train(
            repeat_scheduler=rule(),
            trainer_options={"row_rule": named(1)},
            resume_from_checkpoint=True,
            **options,
        )
    theirs = train(repeat_scheduler=rule(), data=masked(token_rows(12), DROPPED), trainer_cls=Masked, **options)
    assert ours.ledger.updates > ours.ledger.batches
    assert ours.ledger.rows_dropped == 3
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=0, atol=0)


def test_a_resumed_run_drops_the_same_rows_and_says_so_once(build, train, tmp_path):
    rows = [row if i % 5 == 4 else token_rows(1)[0] for i, row in enumerate(token_rows(60, seed=2))]
    options: dict[str, Any] = {
        "data": rows,
        "skip_rows": "robust",
        "row_sigmas": 2.0,
        "row_window": 64,
        "save_strategy": "steps",
        "save_steps": 10,
        "rank_rows": True,
    }
    whole = train(output_dir=str(tmp_path / "whole"), **options)
    written = {path.name: path.read_bytes() for path in Path(whole.args.output_dir).glob("_[dr]*")}
    assert written.keys() == {"_dropped_rows.jsonl", "_row_trace.jsonl", "_row_losses.npz", "_ranked_rows.jsonl"}
    assert whole.ledger.rows_dropped > 5
    stopped = build(**options)
    stopped.add_callback(StopAfter(20))
    stopped.train()
    resumed = train(resume_from_checkpoint=True, **options)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert {path.name: path.read_bytes() for path in Path(resumed.args.output_dir).glob("_[dr]*")} == written
    assert resumed.row_rule.state_dict() == whole.row_rule.state_dict()
    assert resumed.ledger.rows_dropped == whole.ledger.rows_dropped
    assert resumed._run.notices == whole._run.notices


def test_visits_are_known_without_a_ranking(train):
    options = {"gradient_accumulation_steps": 1, "num_train_epochs": 3, "max_steps": -1}
    trainer = train(trainer_options={"row_rule": named(1)}, **options)
    found = broken_rows(Path(trainer.args.output_dir))
    assert len(found) == 3
    assert {(len(row.steps), row.visits) for row in found} == {(1, 3)}


def test_rules_see_the_rows_and_the_batch_rule_the_mean_of_those_that_are_kept(train):
    rule, scheduler = named(2), Scripted(1)
    rows = token_rows(12)
    rows[0]["labels"] = torch.cat([torch.full((8,), IGNORED), rows[0]["input_ids"][8:]])
    ours = train(
        model=tiny_llama(),
        data=rows,
        repeat_scheduler=scheduler,
        trainer_options={"row_rule": rule},
        gradient_accumulation_steps=2,
        learning_rate=1e-9,
        logging_steps=1,
    )
    model = tiny_llama().eval()
    for batch, (seen, kept) in enumerate(rule.seen):
        assert [(row.batch, row.position) for row in seen] == [(batch, i) for i in range(4)]
        total = targets = 0.0
        for row, keep in zip(seen, kept, strict=True):
            of = rows[4 * batch + row.position]
            with torch.no_grad():
                loss = model(input_ids=of["input_ids"][None], labels=of["labels"][None]).loss.item()
            assert row.loss == pytest.approx(loss, rel=1e-5)
            assert row.targets == (4 if (batch, row.position) == (0, 0) else 11)
            total, targets = total + keep * row.loss * row.targets, targets + keep * row.targets
        assert scheduler.outcomes[batch].observation.loss == pytest.approx(total / targets, rel=1e-6)
        assert ours.state.log_history[batch]["loss"] == pytest.approx(total / targets, rel=1e-6)
    assert [logs["rows_dropped"] for logs in ours.state.log_history[:3]] == [1, 2, 0]


# ---- Rows that are not finite ----


def poison(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Break the row that begins with the last token."""
    broken = args[0][:, 0] == VOCABULARY - 1
    if broken.any():
        output = output.clone()
        output[broken] = output[broken] * math.nan
    return output


def rows_with_broken_ones(*broken: int) -> list[dict[str, torch.Tensor]]:
    rows = token_rows(12)
    for i, row in enumerate(rows):
        ids = row["input_ids"].clamp(max=VOCABULARY - 2)
        ids[0] = VOCABULARY - 1 if i in broken else ids[0]
        row["input_ids"] = row["labels"] = ids
    return rows


def without_rows(rows: list[dict[str, Any]], broken: set[int], accumulation: int) -> Any:
    """Train by hand on micro-batches of two rows, without those that are broken."""
    model = tiny_llama().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    size = 2 * accumulation
    for batch in range(0, 12, size):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (12 - batch) / 12
        for i in range(batch, batch + size, 2):
            stay = [rows[j]["input_ids"] for j in (i, i + 1) if j not in broken]
            if stay:
                ids = torch.stack(stay)
                model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(size * 11)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("broken", [{1}, {4, 9}, {2, 3}], ids=str)
def test_a_row_that_is_not_finite_costs_a_row(train, broken):
    rows, model, rule = rows_with_broken_ones(*broken), tiny_llama(), Named()
    model.get_input_embeddings().register_forward_hook(poison)
    ours = train(
        model=model,
        data=rows,
        repeat_scheduler=ConstantScheduler(),
        trainer_options={"row_rule": rule},
        gradient_accumulation_steps=2,
        optim="adamw_torch",
        weight_decay=0.0,
        logging_steps=1,
    )
    assert torch.equal(weights(ours.model), weights(without_rows(rows, broken, 2)))
    assert ours.ledger.rows_dropped == len(broken)
    assert ours.ledger.skips == 0
    assert ours.ledger.forwards == 6 + 2 * len({row // 4 for row in broken})
    # Rows of 12 tokens. In place of a micro-batch that is broken as a whole, the other one is passed over.
    again = {frozenset({1}): 3, frozenset({4, 9}): 3 + 3, frozenset({2, 3}): 2 + 2}[frozenset(broken)]
    assert ours.ledger.tokens == 12 * (12 + again)
    assert all(math.isfinite(logs["loss"]) for logs in ours.state.log_history[:3])
    shown = [(row.batch, row.position) for rows, _ in rule.seen for row in rows]
    assert set(shown) == {(i // 4, i % 4) for i in range(12) if i not in broken}


def test_a_batch_without_a_finite_row_is_skipped(train):
    model, scheduler = tiny_llama(), Scripted(1)
    model.get_input_embeddings().register_forward_hook(poison)
    ours = train(
        model=model,
        data=rows_with_broken_ones(2, 3),
        repeat_scheduler=scheduler,
        trainer_options={"row_rule": Named()},
    )
    assert [outcome.reason for outcome in scheduler.outcomes][:2] == ["scheduler", "rows"]
    assert torch.isfinite(weights(ours.model)).all()


# ---- Other models ----


@pytest.mark.parametrize("why", ["by a rule", "not finite"])
@pytest.mark.parametrize("kind", ["classes", "regression", "several labels", "bert classes"])
def test_rows_of_classifiers_are_dropped(train, kind, why):
    labels = {
        "classes": lambda i: i % 3,
        "bert classes": lambda i: i % 3,
        "regression": lambda i: i / 12,
        "several labels": lambda i: [float(i % 2), float(i % 3 == 0), 1.0],
    }[kind]
    of_tokens = rows_with_broken_ones(*DROPPED)
    rows = [{"input_ids": row["input_ids"], "labels": labels(i)} for i, row in enumerate(of_tokens)]

    def model() -> Any:
        torch.manual_seed(0)
        sizes = dict(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        config = AutoConfig.for_model("bert" if "bert" in kind else "llama", **sizes, pad_token_id=0)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        config.num_labels = 1 if kind == "regression" else 3
        config.problem_type = "multi_label_classification" if kind == "several labels" else None
        return AutoModelForSequenceClassification.from_config(config)

    network, scheduler = model(), Scripted(1)
    if why == "not finite":
        network.get_input_embeddings().register_forward_hook(poison)
    ours = train(
        model=network,
        data=rows,
        repeat_scheduler=scheduler,
        trainer_options={"row_rule": named(1) if why == "by a rule" else Named()},
        optim="adamw_torch",
        weight_decay=0.0,
        logging_steps=1,
    )
    reference = model().train()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0)
    torch.manual_seed(42)
    for i in range(0, 12, 2):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (12 - i) / 12
        keep = [j for j in (i, i + 1) if j not in DROPPED]
        if keep:
            ids = torch.stack([rows[j]["input_ids"] for j in (i, i + 1)])
            output = reference(input_ids=ids)
            wanted = torch.tensor([rows[j]["labels"] for j in (i, i + 1)])
            by_row = _losses_by_hand(kind, output.logits, wanted)
            kept_mean = sum(by_row[j - i].item() for j in keep) / len(keep)
            assert scheduler.outcomes[i // 2].observation.loss == pytest.approx(kept_mean, rel=1e-3)
            assert ours.state.log_history[i // 2]["loss"] == pytest.approx(kept_mean, rel=1e-3)
            (sum(by_row[j - i] for j in keep) / 2).backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(weights(ours.model), weights(reference), rtol=1e-3, atol=1e-5)
    assert ours.ledger.rows_dropped == 3


def _losses_by_hand(kind: str, logits: torch.Tensor, wanted: torch.Tensor) -> list[torch.Tensor]:
    if "classes" in kind:
        return [-logits[i].log_softmax(0)[wanted[i]] for i in range(len(wanted))]
    if kind == "regression":
        return [(logits[i, 0] - wanted[i]) ** 2 for i in range(len(wanted))]
    signs = 2 * wanted - 1
    return [-(torch.nn.functional.logsigmoid(signs[i] * logits[i])).mean() for i in range(len(wanted))]


# ---- Label smoothing, and losses that are computed in the forward ----


@pytest.mark.parametrize("accumulation", [2, 4])
def test_dropped_rows_under_label_smoothing(train, accumulation):
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "label_smoothing_factor": 0.1}
    ours = train(trainer_options={"row_rule": named(accumulation)}, skip_outliers="none", **options)
    theirs = train(
        data=masked(token_rows(12), DROPPED), trainer_cls=DividesByAll, config_cls=TrainingArguments, **options
    )
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert ours.ledger.rows_dropped == 3


def encoder_decoder(kind: str) -> Any:
    sizes = {
        "t5": dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2, dropout_rate=0.0),
        "bart": dict(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            dropout=0.0,
            max_position_embeddings=64,
        ),
    }[kind]
    torch.manual_seed(0)
    ids = dict(pad_token_id=0, decoder_start_token_id=0, bos_token_id=1, eos_token_id=1)
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, vocab_size=VOCABULARY, **sizes, **ids))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_rows_of_encoder_decoders_are_dropped(train, kind):
    def model() -> Any:
        return encoder_decoder(kind)

    options = dict(optim="adamw_torch", weight_decay=0.0)
    ours = train(model=model(), trainer_options={"row_rule": named(1)}, skip_outliers="none", **options)
    rows, reference = token_rows(12), model().train()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0)
    for i in range(0, 12, 2):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (12 - i) / 12
        labels = torch.stack([each["labels"] for each in masked(rows, DROPPED)[i : i + 2]])
        if (labels != IGNORED).any():
            ids = torch.stack([each["input_ids"] for each in rows[i : i + 2]])
            logits = reference(input_ids=ids, labels=torch.stack([each["labels"] for each in rows[i : i + 2]])).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 24
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(weights(ours.model), weights(reference), rtol=1e-4, atol=1e-6)
    assert ours.ledger.rows_dropped == 3


@pytest.mark.parametrize("seed", [0, 3])
def test_a_compiled_model_drops_the_same_rows(train, seed):
    """A model that has learnt nothing loses as much by the labels of a position as by those of the next."""

    def model() -> Any:
        return tiny_llama(seed, tie_word_embeddings=False)

    rule = named(1)
    eager = train(model=model(), trainer_options={"row_rule": named(1)})
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = train(model=model(), trainer_options={"row_rule": rule}, **options)
    assert {row.targets for rows, _ in rule.seen for row in rows} == {11}
    torch.testing.assert_close(weights(compiled.model), weights(eager.model), rtol=1e-5, atol=1e-6)
    assert compiled.ledger.rows_dropped == 3


# ---- Documents in one row of a tensor ----


def test_documents_in_one_row_are_rows(train):
    def flatten(features: list[Any]) -> dict[str, torch.Tensor]:
        ids = torch.cat([feature["input_ids"] for feature in features])
        labels = torch.cat([torch.cat([torch.tensor([IGNORED]), feature["labels"][1:]]) for feature in features])
        positions = torch.cat([torch.arange(len(feature["input_ids"])) for feature in features])
        return {"input_ids": ids[None], "labels": labels[None], "position_ids": positions[None]}

    rule = named(1)
    options: dict[str, Any] = {"trainer_options": {"data_collator": flatten}}
    ours = train(trainer_options={"row_rule": rule, **options.pop("trainer_options")}, skip_outliers="none")
    theirs = train(
        data=masked(token_rows(12), DROPPED),
        trainer_cls=type("Flat", (Trainer,), {"_get_num_items_in_batch": lambda *_: torch.tensor(22)}),
        config_cls=TrainingArguments,
        trainer_options={"data_collator": flatten},
        max_steps=6,
    )
    assert [[row.targets for row in rows] for rows, _ in rule.seen] == [[11, 11]] * 6
    reference = tiny_llama()
    assert not torch.equal(weights(ours.model), weights(reference))
    assert ours.ledger.rows_dropped == 3
    assert theirs.state.global_step == 6


# ---- What is refused ----


class OwnLoss(ABRTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


def test_rows_are_not_dropped_where_the_loss_is_somebody_elses(build):
    with pytest.raises(RowsUnsupported, match=r"--skip_rows does not work here: OwnLoss computes the loss itself"):
        build(trainer_cls=OwnLoss, skip_rows="robust")
    with pytest.raises(RowsUnsupported, match="`compute_loss_func` computes the loss"):
        build(skip_rows="robust", trainer_options={"compute_loss_func": lambda *_, **__: 0})
    model = tiny_llama()
    model.loss_function = lambda **_: 0
    with pytest.raises(RowsUnsupported, match="is not known to be a sum over rows"):
        build(model=model, skip_rows="robust")
    with pytest.raises(RowsUnsupported, match="fused_linear_cross_entropy"):
        build(skip_rows="robust", use_liger_kernel=True)
    build(trainer_cls=OwnLoss)


class NoLogits(torch.nn.Module):
    """A model that shows its loss only, as one with a fused loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()
        self.config = self.inner.config

    def forward(self, input_ids, labels=None, **kwargs):
        return {"loss": self.inner(input_ids=input_ids, labels=labels, **kwargs).loss}


def test_a_model_without_logits_is_refused_before_its_first_update(build):
    trainer = build(model=NoLogits(), trainer_options={"row_rule": Named()})
    before = weights(trainer.model)
    with pytest.raises(RowsUnsupported, match="returns no logits while it trains"):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"skip_rows": "rubust"}, "Unknown row rule 'rubust'"),
        ({"row_sigmas": 4.0}, "--row_sigmas 4.0 means nothing to --skip_rows none"),
        (
            {"skip_rows": "tests.training.test_rows:Named", "row_window": 10},
            "--row_window 10 means nothing to --skip_rows tests",
        ),
        ({"skip_rows": "tests.training.test_rows:OwnLoss"}, "is not a RowRule subclass"),
    ],
)
def test_flags_for_rows_are_checked(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        ABRConfig(output_dir=str(tmp_path), use_cpu=True, **config)


def test_what_rows_cannot_be_seen_in_is_named(build):
    """Multiple choice has a row of logits for each choice, question answering no labels by that name."""
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    config = AutoConfig.for_model("bert", **sizes, num_attention_heads=2, pad_token_id=0)
    ids = token_rows(4)
    choices = [{"input_ids": row["input_ids"].view(3, 4), "labels": 1} for row in ids]
    trainer = build(model=BertForMultipleChoice(config), data=choices, trainer_options={"row_rule": Named()})
    with pytest.raises(RowsUnsupported, match="not a sum over the targets of its rows"):
        trainer.train()
    answers = [{"input_ids": row["input_ids"], "start_positions": 1, "end_positions": 2} for row in ids]
    trainer = build(model=BertForQuestionAnswering(config), data=answers, rank_rows=True)
    with pytest.raises(RowsUnsupported, match=r'--rank_rows does not work here: the batches have no "labels"'):
        trainer.train()


class NotTheHighest(Named):
    """Drop the row of each micro-batch that has the highest loss."""

    def __init__(self, highest: float = math.inf) -> None:
        super().__init__()
        self.highest = highest

    def beside(self, rows):
        return NotTheHighest(max(row.loss for row in rows))

    def decide(self, row):
        return row.loss < self.highest

    def evidence(self, row):
        return {"limit": self.highest}


@pytest.mark.parametrize(("rows", "accumulation"), [(4, 1), (2, 2), (3, 2)])
def test_a_rule_sees_the_rows_beside_a_row_and_why_shows_it_the_same(train, rows, accumulation):
    rule = NotTheHighest()
    options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": rows}
    trainer = train(data=token_rows(12), trainer_options={"row_rule": rule}, skip_outliers="none", **options)
    directory = Path(trainer.args.output_dir)
    drops = list(read_lines(directory / "_dropped_rows.jsonl"))
    assert len(drops) == 12 // rows, "one of each micro-batch"
    for seen, kept in rule.seen:
        assert [row.micro_batch for row in seen] == [i // rows for i in range(len(seen))]
        for start in range(0, len(seen), rows):
            losses = [row.loss for row in seen[start : start + rows]]
            assert [not keep for keep in kept[start : start + rows]] == [loss == max(losses) for loss in losses]
    assert all(drop["limit"] == pytest.approx(drop["loss"]) for drop in drops)
    trace = read_trace(directory)
    told = "\n".join(explain_rows(NotTheHighest(), trace[0], drops, read_judged_rows(directory)))
    assert told.count("dropped: row") == accumulation
    assert told.count("  limit  ") == accumulation
    assert "the code of the rule has changed since" not in told


class Forgetful(RowRule):
    """A rule without a return."""

    def decide(self, row):
        row.loss  # noqa: B018


def test_a_rule_must_say_whether_to_train_on_a_row(build):
    with pytest.raises(TypeError, match="Forgetful returned None. It must return True to train on"):
        build(trainer_options={"row_rule": Forgetful()}).train()


@pytest.mark.parametrize("budget", ["max_passes", "max_seconds"])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_budget_without_room_for_a_second_first_pass_is_kept(train, accumulation, budget):
    model, made = tiny_llama(), []
    model.get_input_embeddings().register_forward_hook(poison)
    model.register_forward_hook(lambda *_: made.append(1))
    scheduler = Scripted(1)
    ours = train(
        model=model,
        data=Slow(rows_with_broken_ones(1), 0.3 if budget == "max_seconds" else 0.0),  # four before a pass
        repeat_scheduler=scheduler,
        trainer_options={"row_rule": Named()},
        gradient_accumulation_steps=accumulation,
        **{budget: 1},
    )
    assert ours.ledger.forwards == len(made) == accumulation
    assert ours.ledger.passes <= 1
    assert [(outcome.repeats, outcome.reason) for outcome in scheduler.outcomes] == [(0, "no room")]


def test_labels_of_a_classifier_may_be_smoothed(train):
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=2, pad_token_id=0, num_labels=3)
    rows = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(token_rows(12))]
    model = AutoModelForSequenceClassification.from_config(config)
    rule = named(1)
    ours = train(model=model, data=rows, trainer_options={"row_rule": rule}, label_smoothing_factor=0.1)
    assert ours.ledger.rows_dropped == 3
    assert [[row.targets for row in rows] for rows, _ in rule.seen] == [[1, 1]] * 6


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_the_log_keeps_the_scale_that_trainer_has(train, kind):
    """Stock Trainer logs sums over micro-batches of T5, and divides by the first labels of GPT-2, too."""
    model = small(kind) if kind == "gpt2" else encoder_decoder("t5")
    options: dict[str, Any] = {
        "model": model,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.0,
        "logging_steps": 1,
    }
    dropped = train(trainer_options={"row_rule": named(2)}, skip_outliers="none", **options)
    stock = train(trainer_cls=Trainer, config_cls=TrainingArguments, **options)
    for ours, theirs in zip(dropped.state.log_history[:3], stock.state.log_history[:3], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.2)
    assert dropped.state.log_history[2]["loss"] == pytest.approx(stock.state.log_history[2]["loss"], rel=1e-6)


class WantsAccuracy(Scripted):
    wants = frozenset({"accuracy"})


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_accuracy_is_that_of_the_kept_rows(train, repeats):
    options: dict[str, Any] = {"learning_rate": 0.0, "num_train_epochs": 1}
    ours = train(repeat_scheduler=WantsAccuracy(repeats), trainer_options={"row_rule": named(1)}, **options)
    theirs = train(repeat_scheduler=WantsAccuracy(repeats), data=masked(token_rows(12), DROPPED), **options)
    pairs = zip(ours.repeat_scheduler.outcomes, theirs.repeat_scheduler.outcomes, strict=True)
    found = [(one.observation.accuracy, other.observation.accuracy) for one, other in pairs if other.repeats]
    assert len(found) == 5
    assert all(one == other for one, other in found)


def test_a_resumed_run_says_if_rows_are_dropped_no_more(train, caplog):
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    train(trainer_options={"row_rule": Named()}, **options)
    train(resume_from_checkpoint=True, num_train_epochs=2, **options)
    assert "was written under Named(); no rows are dropped now" in caplog.text


def test_a_ranking_alone_counts_no_rows_as_judged(train):
    ours = train(rank_rows=True)
    assert (ours.ledger.rows, ours._run.rows.rule) == (0, None)
    assert "rows_dropped" not in ours.state.log_history[0]
