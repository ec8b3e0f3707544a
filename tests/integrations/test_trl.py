"""TRL's trainers with repeats: the same training, and counters that count a batch once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PromptTuningConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    set_seed,
)

pytest.importorskip("trl")

from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from abr_trainer import ABRMixin
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.data.identity import name_sources, with_rows
from abr_trainer.integrations.trl import ABRSFTConfig, ABRSFTTrainer
from abr_trainer.perplexity.windows import causal_nll
from abr_trainer.records.files import read_lines
from abr_trainer.report.why import explain_batch
from abr_trainer.schedulers import ConstantScheduler, RobustOutlierSkip, RowRule, ThresholdScheduler
from abr_trainer.training.identity import source_of, taken_out
from tests.conftest import Scripted, log_without_times, tiny_llama, weights

pytestmark = pytest.mark.slow

PAIRS = Dataset.from_list(
    [
        {"prompt": f"The fox saw {count} birds.", "completion": " One of them " + "flew away " * (1 + count % 3)}
        for count in range(12)
    ]
)
COUNTED = ("num_tokens", "entropy", "mean_token_accuracy")


def demo_model():
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL)


def demo_classifier():
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(DEMO_MODEL, num_labels=1)
    model.config.pad_token_id = 0
    return model


OPTIONS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_length": 64,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "bf16": False,
    "num_train_epochs": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
SAME_ORDER = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}


@pytest.fixture
def fine_tune(tmp_path):
    def fine_tune(
        trainer_cls=ABRSFTTrainer, config_cls=ABRSFTConfig, repeat_scheduler=None, resumed_from=None, **config
    ):
        trainer = trainer_cls(
            model=demo_model(),
            args=config_cls(**{**OPTIONS, "output_dir": str(tmp_path / "run"), **config}),
            train_dataset=PAIRS,
            eval_dataset=PAIRS.select(range(5)),
            processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL),
            **({} if repeat_scheduler is None else {"repeat_scheduler": repeat_scheduler}),
        )
        trainer.train(resume_from_checkpoint=resumed_from)
        return trainer

    return fine_tune


@pytest.mark.parametrize("packing", [False, True])
def test_one_repeat_is_ordinary_fine_tuning(fine_tune, packing):
    options = {"packing": packing, "completion_only_loss": True}
    ours = fine_tune(repeat_scheduler=Scripted(1), **options)
    theirs = fine_tune(trainer_cls=SFTTrainer, config_cls=SFTConfig, **options)
    assert torch.equal(weights(ours.model), weights(theirs.model))
    for mine, stock in zip(log_without_times(ours), log_without_times(theirs), strict=True):
        assert stock.items() <= mine.items()


@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_run_goes_on_with_the_counters_of_trl(fine_tune, tmp_path, step):
    options = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "epoch"}
    options["repeat_scheduler"] = ConstantScheduler(2)
    whole = fine_tune(**options)
    checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
    resumed = fine_tune(resumed_from=checkpoint, output_dir=str(tmp_path / "resumed"), **options)
    assert log_without_times(resumed)[:-1] == log_without_times(whole)[:-1]
    assert {*COUNTED} <= whole.state.log_history[0].keys()


def test_a_run_over_trl_leaves_its_record_and_our_card(fine_tune):
    trainer = fine_tune(repeat_scheduler=ThresholdScheduler(), save_strategy="steps", save_steps=2)
    run = Path(trainer.args.output_dir)
    assert not (run / "README.md").exists(), "TRL would write its own with each checkpoint"
    assert "ThresholdScheduler(loss_threshold=1.0" in "\n".join(explain_batch(run, 2))
    trainer.save_model()
    assert "trained with adaptive batch repetition" in (run / "README.md").read_text()


class DropsRows(RowRule):
    """Drop each third row of a batch from the second on."""

    def __init__(self):
        self.seen = []

    def decide(self, row):
        return row.position % 3 != 1

    def observe(self, rows, kept):
        self.seen.append([row.targets for row in rows])


class MasksRows(SFTTrainer):
    """Stock fine-tuning on labels that are masked after their number was taken."""

    first = 0

    def get_batch_samples(self, *args, **kwargs):
        self.first = 0
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        labels = inputs["labels"]
        owners = (inputs["position_ids"] == 0).cumsum(1) - 1 if "position_ids" in inputs else None
        rows = len(labels) if owners is None else int(owners.max()) + 1
        owners = torch.arange(rows)[:, None].expand_as(labels) if owners is None else owners
        inputs["labels"] = labels.masked_fill((owners + self.first) % 3 == 1, -100)
        self.first += rows
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`")
@pytest.mark.parametrize("kind", ["padded", "padding-free", "packed", "smoothed", "dft", "NEFTune"])
def test_dropped_rows_are_masked_labels(tmp_path, kind):
    options = {
        "padding-free": {"padding_free": True, "max_length": None},
        "packed": {"packing": True},
        "smoothed": {"label_smoothing_factor": 0.1},
        "dft": {"loss_type": "dft"},
        "NEFTune": {"neftune_noise_alpha": 5.0},
    }.get(kind, {})
    trained = []
    for trainer_cls, config_cls, rule in [
        (ABRSFTTrainer, ABRSFTConfig, {"row_rule": DropsRows(), "repeat_scheduler": ConstantScheduler()}),
        (MasksRows, SFTConfig, {}),
    ]:
        trainer = trainer_cls(
            model=demo_model(),
            args=config_cls(**{**OPTIONS, **SAME_ORDER, "output_dir": str(tmp_path), **options}),
            train_dataset=PAIRS if kind != "packed" else concatenate_datasets([PAIRS] * 4),
            processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL),
            **rule,
        )
        trainer.train()
        trained.append(trainer)
    ours, theirs = trained
    assert ours.ledger.rows_dropped >= 3
    assert ours.ledger.rows_dropped == sum((len(rows) + 1) // 3 for rows in ours.row_rule.seen)
    assert ours.ledger.rows == (48 if kind == "packed" else 12)
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=1e-5, atol=1e-7)
    assert not torch.equal(weights(ours.model), weights(demo_model()))
    if kind == "smoothed":
        return  # its metrics are of a forward of their own, over all rows
    for mine, stock in zip(log_without_times(ours)[:-1], log_without_times(theirs)[:-1], strict=True):
        assert mine["entropy"] == pytest.approx(stock["entropy"], rel=1e-4)
        assert mine["mean_token_accuracy"] == pytest.approx(stock["mean_token_accuracy"])


@pytest.mark.parametrize("padding_free", [False, True])
def test_rows_know_the_row_of_the_file_that_they_were_made_of(tmp_path, padding_free):
    options = {**OPTIONS, "output_dir": str(tmp_path), "padding_free": padding_free, "rank_rows": True}
    trainer = ABRSFTTrainer(
        model=demo_model(),
        args=ABRSFTConfig(**{**options, "max_length": None}),
        train_dataset=name_sources(with_rows(PAIRS), ["talks.jsonl"]),
        processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL),
    )
    seen = []
    for batch in trainer.get_train_dataloader():
        inputs, indices = taken_out(batch)
        tokens = [token for index in indices for token in trainer.train_dataset[int(index)]["input_ids"]]
        is_text = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...
        assert inputs["input_ids"][is_text].flatten().tolist() == tokens
        sources = [source_of(trainer.train_dataset, index) for index in indices]
        assert all(source["source"] == "talks.jsonl" for source in sources)
        seen += [source["first_row"] for source in sources]
    assert sorted(seen) == list(range(1, 13))


class Mixed(ABRMixin, SFTTrainer):
    """What a user writes who does not know of `ABRSFTTrainer`."""


@pytest.mark.parametrize("trainer_cls", [ABRSFTTrainer, Mixed])
def test_repeats_and_skips_do_not_inflate_counters(fine_tune, trainer_cls):
    scheduler = Scripted(3, 0, 2)
    ours = fine_tune(trainer_cls=trainer_cls, repeat_scheduler=scheduler, learning_rate=0.0)
    theirs = fine_tune(trainer_cls=SFTTrainer, config_cls=SFTConfig, learning_rate=0.0)
    assert ours.ledger.updates == 5
    for mine, stock in zip(ours.state.log_history[:3], theirs.state.log_history[:3], strict=True):
        assert {key: mine[key] for key in COUNTED} == {key: stock[key] for key in COUNTED}
        assert mine["loss"] == stock["loss"]
    assert [outcome.observation.loss for outcome in scheduler.outcomes] == pytest.approx(
        [logs["loss"] for logs in theirs.state.log_history[:3]], rel=1e-6
    )


def test_the_perplexity_is_that_of_completion_tokens(fine_tune):
    trainer = fine_tune(repeat_scheduler=Scripted(2), completion_only_loss=True)
    metrics = trainer.evaluate()
    nll, tokens = 0.0, 0
    for batch in trainer.get_eval_dataloader():
        with torch.no_grad():
            logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:].flatten()
        nll += torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum").item()
        tokens += int((targets != -100).sum())
    assert metrics["eval_target_tokens"] == tokens < 5 * 30
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def long_prompts(count):
    """Prompts longer than `max_length`, packed in order: of the blocks, some hold nothing but prompt."""
    prompt = "The fox saw a bird. " * 40
    return Dataset.from_list([{"prompt": prompt, "completion": " It flew away." * 30} for _ in range(count)])


@pytest.mark.parametrize("trainer_cls", [ABRSFTTrainer, Mixed])
def test_blocks_without_targets_are_skipped_and_no_good_one_for_their_sake(tmp_path, trainer_cls, caplog):
    rule = RobustOutlierSkip(ConstantScheduler(2))
    options = {"packing": True, "packing_strategy": "wrapped", "completion_only_loss": True, "max_length": 32}
    trainer = trainer_cls(
        model=demo_model(),
        args=ABRSFTConfig(output_dir=str(tmp_path), **{**OPTIONS, **SAME_ORDER, **options}),
        train_dataset=long_prompts(4),
        processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL),
        repeat_scheduler=rule,
    )
    labels = [torch.tensor(row["labels"]) for row in trainer.train_dataset]
    has_targets = [bool((row[1:] != -100).any()) for row in labels]
    batches = [any(has_targets[i : i + 4]) for i in range(0, len(labels), 4)]
    assert True in batches, "a batch has targets"
    assert False in batches, "a batch has none"
    trainer.train()
    reasons = [batch["reason"] for batch in read_lines(tmp_path / "abr_trace.jsonl")]
    assert [reason != "no targets" for reason in reasons] == batches
    assert "outlier" not in reasons
    assert 0.0 not in rule.history
    told = f"{has_targets.count(False)} of the {len(labels)} rows of the training set"
    assert told in caplog.text


@pytest.mark.parametrize(("accumulation", "rule"), [(1, "robust"), (1, "none"), (2, "none")])
def test_the_perplexity_of_gpt2_is_that_of_its_completions(tmp_path, accumulation, rule):
    set_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **dropout))
    options = {"learning_rate": 0.0, "completion_only_loss": True, "skip_outliers": rule}
    options |= {"gradient_accumulation_steps": accumulation}
    trainer = ABRSFTTrainer(
        model=model,
        args=ABRSFTConfig(output_dir=str(tmp_path), **{**OPTIONS, **SAME_ORDER, **options}),
        train_dataset=PAIRS,
        eval_dataset=PAIRS,
        processing_class=tokenizer,
    )
    trainer.train()
    counted = []
    for batch in trainer.get_train_dataloader():
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        counted.append([float(each.sum()) for each in causal_nll(logits, batch["labels"])])
    groups = [counted[i : i + accumulation] for i in range(0, len(counted), accumulation)]
    means = [sum(nll for nll, _ in group) / sum(tokens for _, tokens in group) for group in groups]
    whole = sum(nll for nll, _ in counted) / sum(tokens for _, tokens in counted)
    logged = [logs["perplexity"] for logs in trainer.state.log_history if "loss" in logs]
    assert logged == pytest.approx([math.exp(mean) for mean in means], rel=1e-5)
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(math.exp(whole), rel=1e-5)


class MixedDPOTrainer(ABRMixin, DPOTrainer):
    pass


class MixedKTOTrainer(ABRMixin, KTOTrainer):
    pass


class MixedRewardTrainer(ABRMixin, RewardTrainer):
    pass


CHOICES = [{"chosen": " ran." * (1 + i % 3), "rejected": " flew away."} for i in range(12)]
KINDS = {
    "SFT": (ABRSFTTrainer, SFTTrainer, SFTConfig, [*PAIRS], demo_model),
    "DPO": (MixedDPOTrainer, DPOTrainer, DPOConfig, [{"prompt": "The fox", **row} for row in CHOICES], demo_model),
    "KTO": (
        MixedKTOTrainer,
        KTOTrainer,
        KTOConfig,
        [{"prompt": "The fox", "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(CHOICES)],
        demo_model,
    ),
    "reward": (MixedRewardTrainer, RewardTrainer, RewardConfig, CHOICES, demo_classifier),
}


@pytest.mark.parametrize("kind", KINDS)
def test_repeats_are_stock_training_on_the_batches_as_trained_on(tmp_path, kind):
    ours_cls, stock_cls, config_cls, rows, build_model = KINDS[kind]
    first, second, third = rows[:4], rows[4:8], rows[8:]

    def run(trainer_cls, data, **scheduler):
        trainer = trainer_cls(
            model=build_model(),
            args=config_cls(**{**OPTIONS, "output_dir": str(tmp_path), **SAME_ORDER}),
            train_dataset=Dataset.from_list(data),
            eval_dataset=Dataset.from_list(rows[:4]),
            processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL),
            **scheduler,
        )
        trainer.train()
        return trainer

    scheduler = Scripted(3, 0, 2)
    ours = run(ours_cls, rows, repeat_scheduler=scheduler)
    theirs = run(stock_cls, first * 3 + third * 2)
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert [outcome.repeats for outcome in scheduler.outcomes] == [3, 0, 2]
    assert ("eval_perplexity" in ours.evaluate()) == ("perplexity" in ours.state.log_history[0]) == (kind == "SFT")
    once = run(stock_cls, first + second + third)
    assert not torch.equal(weights(ours.model), weights(once.model))
    tokens = [[logs["num_tokens"] for logs in each.state.log_history if "num_tokens" in logs] for each in (ours, once)]
    assert tokens[0] == tokens[1]


# ---- Speed options, and what a rule wants to see under them ----


def mean_over_targets(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def mean_of_its_own(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


SPEED_OPTIONS = {
    "fused head": {},
    "loss_type dft": {"loss_type": "dft"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {"compute_loss_func": mean_over_targets},
    "compute_loss_func, a mean of each micro-batch": {"compute_loss_func": mean_of_its_own},
    "packing": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "padding-free": {"padding_free": True, "max_length": None},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "torch.compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "LoRA": {"peft_config": {"r": 4}},
    "prompt tuning": {"peft_config": {"num_virtual_tokens": 3}},
}
EXTRA_FORWARD = ("label smoothing", "compute_loss_func", "compute_loss_func, a mean of each micro-batch")


class Seeing(Scripted):
    wants = frozenset({"accuracy"})


def adapter(options):
    if options is None:
        return None
    kind = LoraConfig if "r" in options else PromptTuningConfig
    return kind(task_type="CAUSAL_LM", **options)


def sft(tmp_path, rows, option, trainer_cls=SFTTrainer, config_cls=SFTConfig, rule=None, **arguments):
    options = {**SPEED_OPTIONS[option], **arguments}
    given = {"compute_loss_func": options.pop("compute_loss_func", None)}
    given["peft_config"] = adapter(options.pop("peft_config", None))
    set_seed(0)
    trainer = trainer_cls(
        model=tiny_llama(vocab_size=2048, max_position_embeddings=128, num_hidden_layers=1),
        args=config_cls(**{**OPTIONS, **SAME_ORDER, "output_dir": str(tmp_path), **options}),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL),
        **given,
        **({} if rule is None else {"repeat_scheduler": rule}),
    )
    trainer.train()
    return trainer


def tokens_of_equal_length(count):
    """Rows that packing leaves as they are, a block each, and for which the compiler compiles once."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 2048, (16,), generator=generator).tolist()} for _ in range(count)]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*padding-free.*")
@pytest.mark.parametrize("option", SPEED_OPTIONS)
def test_repeats_and_skips_under_a_speed_option_are_sft_on_the_batches_as_trained_on(tmp_path, option):
    rows = tokens_of_equal_length(12) if option in ("packing", "torch.compile") else [*PAIRS]
    # NEFTune draws noise in the forward of a skip, too: there, no batch is skipped.
    decisions = (2, 1, 2) if option == "NEFTune" else (2, 0, 2)
    as_trained_on = [row for i, n in enumerate(decisions) for row in rows[4 * i : 4 * i + 4] * n]
    seeing, blind = Seeing(*decisions), Scripted(*decisions)
    ours = sft(tmp_path, rows, option, ABRSFTTrainer, ABRSFTConfig, seeing)
    theirs = sft(tmp_path, as_trained_on, option)
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert torch.equal(
        weights(sft(tmp_path, rows, option, ABRSFTTrainer, ABRSFTConfig, blind).model), weights(ours.model)
    )
    # TRL's figure is the mean of the micro-batches' accuracies, ours is over their tokens.
    logged = ours.state.log_history[0]
    observed = seeing.outcomes[0].observation
    assert observed.accuracy == pytest.approx(logged["mean_token_accuracy"], abs=0.01)
    if option != "compute_loss_func, a mean of each micro-batch":  # Trainer logs the sum of the means
        assert observed.loss == pytest.approx(logged["loss"], rel=1e-5)
    forwards_of_a_pass = 2 * (1 + (option in EXTRA_FORWARD))
    assert ours.ledger.forwards == forwards_of_a_pass * (sum(decisions) + (0 in decisions))
    assert ours.ledger.updates == sum(decisions)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("option", [option for option in SPEED_OPTIONS if "loss" in option or "smooth" in option])
def test_what_a_rule_sees_does_not_depend_on_accumulation(tmp_path, option):
    seen = []
    for accumulation in (1, 2, 4):
        rule = Seeing(1)
        batches = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        sft(tmp_path, [*PAIRS][:8], option, ABRSFTTrainer, ABRSFTConfig, rule, completion_only_loss=False, **batches)
        seen.append(rule.outcomes[0].observation)
    assert [each.loss for each in seen[1:]] == pytest.approx([seen[0].loss] * 2, rel=1e-5)
    assert {each.accuracy for each in seen} == {seen[0].accuracy}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_budget_buys_fewer_passes_where_each_makes_an_extra_forward(tmp_path):
    rule = Scripted(3, 1)
    budget = {"max_passes": 5, "num_train_epochs": 3}
    trainer = sft(tmp_path, [*PAIRS], "label smoothing", ABRSFTTrainer, ABRSFTConfig, rule, **budget)
    # A pass costs 4/3: of 5, three are bought, and 1 is left, which buys nothing.
    assert trainer.ledger.passes == 4
    assert trainer.ledger.updates == 3


@pytest.mark.parametrize("kind", ["DPO", "KTO", "reward"])
def test_a_rule_that_wants_an_accuracy_is_refused_where_there_is_none(tmp_path, kind):
    ours_cls, _, config_cls, rows, build_model = KINDS[kind]
    trainer = ours_cls(
        model=build_model(),
        args=config_cls(**{**OPTIONS, "output_dir": str(tmp_path), **SAME_ORDER}),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL),
        repeat_scheduler=Seeing(2),
    )
    before = weights(trainer.model).clone()
    with pytest.raises(ValueError, match="The --repeat_scheduler looks at the token accuracy, but"):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


def test_the_forward_of_a_reference_model_is_charged(tmp_path):
    ours_cls, _, config_cls, rows, build_model = KINDS["DPO"]
    spent = []
    for reference in ({}, {"precompute_ref_log_probs": True}):
        trainer = ours_cls(
            model=build_model(),
            args=config_cls(**{**OPTIONS, "output_dir": str(tmp_path), **SAME_ORDER, **reference}),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL),
            repeat_scheduler=Scripted(2),
        )
        trainer.train()
        spent.append((trainer.ledger.forwards, trainer.ledger.updates, float(trainer.ledger.passes)))
    assert spent == [(24, 6, 8.0), (12, 6, 6.0)]


@pytest.mark.parametrize("theirs", [(DPOTrainer, DPOConfig), (RewardTrainer, RewardConfig)], ids=["DPO", "reward"])
def test_rows_of_pairs_are_not_dropped(tmp_path, theirs):
    trainer_cls, config_cls = theirs
    mixed = type(f"ABR{trainer_cls.__name__}", (ABRMixin, trainer_cls), {})
    pairs = Dataset.from_list([{"prompt": "The fox", "chosen": " ran home.", "rejected": " ran."}] * 4)
    with pytest.raises(ValueError, match=f"ABR{trainer_cls.__name__} computes the loss itself"):
        mixed(
            model=demo_classifier() if trainer_cls is RewardTrainer else demo_model(),
            args=config_cls(**{**OPTIONS, "output_dir": str(tmp_path)}),
            train_dataset=pairs,
            processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL),
            row_rule=DropsRows(),
        )


class OwnWay(ABRMixin, GRPOTrainer):
    """A trainer that generates, and has no seam for it."""

    def __getattribute__(self, name):
        if name == "_generate_and_score_completions":
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_a_trainer_that_generates_its_inputs_in_a_way_of_its_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="OwnWay generates its inputs while it trains, in a way of its own"):
        OwnWay(
            model=tiny_llama(vocab_size=2048),
            args=GRPOConfig(output_dir=str(tmp_path), num_generations=2, use_cpu=True, bf16=False, report_to="none"),
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            train_dataset=Dataset.from_list([{"prompt": "The fox"}] * 8),
            processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL),
            repeat_scheduler=Scripted(1),
        )
