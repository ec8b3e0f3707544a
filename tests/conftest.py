"""A tiny LLaMA, a few token rows, and one way to train with them."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import re
import runpy
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import AutocastKwargs, imports
from huggingface_hub import HfApi, close_session, constants
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from abr_trainer import ABRConfig, ABRTrainer, RepeatScheduler
from abr_trainer.data.demo import DEMO_MODEL
from tests.hub_server import Hub

VOCABULARY = 64
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}

RUN = [
    "--dataset_name",
    "demo",
    "--block_size",
    "64",
    "--use_cpu",
    "--disable_tqdm",
    "true",
    "--max_train_samples",
    "24",
]
RUN += ["--do_train", "--do_eval", "--max_eval_samples", "6", "--learning_rate", "5e-3", "--report_to", "none"]
RUN += ["--sample_prompts", "0"]
"""Flags of a run of `abr train` that takes a second or two."""
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
ON_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""For processes of their own: a thread each, and no GPU."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and let files whose tests start processes go first.

    A worker that took one of them last would be at it alone. All of these tests are slow.
    """
    launches = {item.path for item in items if item.get_closest_marker("launches")}
    items.sort(key=lambda item: item.path not in launches)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("launches") or item.get_closest_marker("long"):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Let nobody look for garbage among what was imported: each training does, and that takes longer than most."""
    gc.collect()
    gc.freeze()


class Scripted(RepeatScheduler):
    """Repeat batch i `repeats[i]` times; the last entry holds for all later ones. Remembers what it was told."""

    def __init__(self, *repeats: int) -> None:
        self.repeats = repeats
        self.outcomes: list[Any] = []

    def decide(self, observation):
        return self.repeats[min(observation.batch, len(self.repeats) - 1)]

    def observe(self, outcome):
        self.outcomes.append(outcome)


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length, the same in every round."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@dataclasses.dataclass
class Capped(RepeatScheduler):
    """A rule of one's own with a default of its own."""

    max_repeats: int = 1

    def decide(self, observation):
        return self.max_repeats


class Counting(RepeatScheduler):
    """Repeat every third batch that was trained on: a rule that remembers, and is no dataclass."""

    def __init__(self) -> None:
        self.seen = 0

    def decide(self, observation):
        return 2 if self.seen % 3 == 2 else 1

    def observe(self, outcome):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state.get("seen", 0)


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    set_seed(seed)
    options = dict(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes}))


def tokenizer_that_adds(kind: str) -> Any:
    """The demo tokenizer with `<s>` and `</s>`, of which it puts "bos", "eos" or "both" around a text, or "none"."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    begin, end = "<s> " * (kind in ("bos", "both")), " </s>" * (kind in ("eos", "both"))
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    single = TemplateProcessing(single=f"{begin}$A{end}", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = single
    return tokenizer


def model_for(tokenizer: Any) -> Any:
    """The demo model, with embeddings of all tokens of a tokenizer."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": 4},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 1,
        **dict.fromkeys(("n_group", "topk_group"), 1),
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 32, "head_dim": 8},
    "phimoe": {"num_local_experts": 4},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 1},
}
"""What the configurations of mixtures of experts have of their own."""


def tiny_mixture(kind: str, **changes: Any) -> Any:
    """A mixture of four experts, of which a token sees two, or one in `llama4_text`."""
    set_seed(0)
    options = dict(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts_per_tok=1 if kind == "llama4_text" else 2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**options, **MIXTURES[kind], **changes}))


def token_rows(count: int, length: int = 12, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def broken_row(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A row without a single target: its mean loss is 0 / 0."""
    return {"input_ids": row["input_ids"], "labels": torch.full_like(row["labels"], -100)}


class ScaledMixin:
    """Loss scaling on the CPU, before a Trainer: fp16 itself needs a GPU, its GradScaler does not."""

    init_scale = 2.0**8

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.init_scale)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.autocast_handler = AutocastKwargs(enabled=False)


def trained_by_hand(plan: list[list[int]], accumulation: int, rows: Any, max_grad_norm: float = 1.0) -> Any:
    """Train as Trainer would: a loop of forward, backward, clip and step, at its linear rates, without weight decay.

    Args:
        plan: For each batch, which batches to pass over, in order, with an update after each.

    Returns:
        The model, and the losses of all passes, a list a batch.
    """
    model = tiny_llama().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    micro_batches = [torch.stack([row["input_ids"] for row in rows[i : i + 2]]) for i in range(0, len(rows), 2)]
    batches = [micro_batches[i : i + accumulation] for i in range(0, len(micro_batches), accumulation)]
    losses: list[list[float]] = []
    for index, passes in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (len(batches) - index) / len(batches)  # linear, ticking once a batch
        losses.append([])
        for batch in passes:
            targets = sum(ids[:, 1:].numel() for ids in batches[batch])
            losses[-1].append(0.0)
            for ids in batches[batch]:
                loss = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(targets)).loss
                loss.backward()
                losses[-1][-1] += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return model, losses


def weights(model: torch.nn.Module) -> torch.Tensor:
    """All weights, as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def without_seconds(numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers, without what a clock put among them."""
    return {name: value for name, value in numbers.items() if not name.endswith("seconds")}


def log_without_times(trainer: Any) -> list[dict[str, float]]:
    """The log, without what a clock put into it."""
    timed = ("runtime", "per_second", "seconds", "preparation_time")
    return [{k: v for k, v in logs.items() if not k.endswith(timed)} for logs in trainer.state.log_history]


@pytest.fixture(scope="session", autouse=True)
def packages_are_looked_for_once():
    """What is installed stays so, and accelerate reads the metadata of DeepSpeed at each look into a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imports, "_is_package_available", functools.cache(imports._is_package_available))
        yield


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Run a job of `tests/jobs.py` on some ranks over gloo, forked from a process that has imported everything."""
    command = [sys.executable, "-m", "tests.jobs", "ranks"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | ON_CPU, **pipes) as process:

        def launch(ranks: int, names: list[str], job: str = "engines", directory: Path | None = None) -> Path:
            directory = directory or tmp_path_factory.mktemp("ranks")
            print(json.dumps([job, ranks, str(directory), *names]), file=process.stdin, flush=True)
            error = json.loads(process.stdout.readline() or '"The process that ranks are forked from has ended."')
            assert not error, error
            return directory

        yield launch
        process.terminate()


@pytest.fixture
def build(tmp_path):
    """Build a trainer over 12 rows in batches of 2, without shuffling, unless told otherwise."""

    def build(
        trainer_cls: type = ABRTrainer,
        config_cls: type = ABRConfig,
        repeat_scheduler: RepeatScheduler | None = None,
        model: torch.nn.Module | None = None,
        data: Any = None,
        trainer_options: dict[str, Any] | None = None,
        **config: Any,
    ) -> Any:
        options = dict(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            num_train_epochs=1,
            learning_rate=1e-2,
            weight_decay=0.1,
            logging_steps=2,
            save_strategy="no",
            train_sampling_strategy="sequential",
            **QUIET,
        )
        scheduler = {} if repeat_scheduler is None else {"repeat_scheduler": repeat_scheduler}
        return trainer_cls(
            model=tiny_llama() if model is None else model,
            args=config_cls(**{**options, **config}),
            train_dataset=token_rows(12) if data is None else data,
            **scheduler,
            **(trainer_options or {}),
        )

    return build


@pytest.fixture
def train(build):
    """Build a trainer, train, and return the trainer."""

    def train(resume_from_checkpoint: Any = None, **options: Any) -> Any:
        trainer = build(**options)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        return trainer

    return train


def point_client_at(hub: Hub, monkeypatch: Any) -> None:
    """Give the libraries of this process the settings that a new process would find in that environment.

    huggingface_hub reads its environment once, into constants; others copy these, and clients remember the endpoint.
    So its module of constants is run anew, and what came out differently replaces what was there, wherever it is.
    """
    for name, value in hub.environment.items():
        monkeypatch.setenv(name, value)
    fresh = runpy.run_path(constants.__file__)
    known = vars(constants)
    changed = {
        name: (known[name], value)
        for name, value in fresh.items()
        if re.fullmatch("[A-Za-z][A-Za-z_]*", name)
        and isinstance(value, str | bool | frozenset)
        and known[name] != value
    }
    libraries = ("huggingface_hub", "transformers", "peft", "datasets", "accelerate")
    for module in [each for name, each in list(sys.modules.items()) if name.split(".")[0] in libraries]:
        own = vars(module)
        for name, (old, new) in changed.items():
            if name in own and own[name] == old:
                monkeypatch.setattr(module, name, new)
        for value in list(own.values()):
            if isinstance(value, HfApi):
                monkeypatch.setattr(value, "endpoint", hub.url)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made anew at its first use
    close_session()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of this test alone; this process talks to it, and others do that are given `hub.environment`."""
    with Hub(tmp_path / "of_hub_clients") as hub:
        point_client_at(hub, monkeypatch)
        yield hub
        close_session()
    assert not hub.errors, hub.errors[0]
