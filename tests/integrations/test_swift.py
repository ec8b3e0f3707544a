"""The plugin file for ms-swift, against its interface as it is written down here: ms-swift itself is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from tests.conftest import QUIET, ROOT, tiny_llama, token_rows, weights


class SwiftTrainer(Seq2SeqTrainer):
    pass


@dataclass
class SwiftArguments(Seq2SeqTrainingArguments):
    tuner_backend: str = "peft"

    def __post_init__(self):
        Seq2SeqTrainingArguments.__post_init__(self)  # by name, as there


class TrainerFactory:
    TRAINER_MAPPING: ClassVar = {"causal_lm": f"{__name__}.SwiftTrainer"}
    TRAINING_ARGS_MAPPING: ClassVar = {"causal_lm": f"{__name__}.SwiftArguments"}

    @staticmethod
    def get(mapping):
        module, _, name = mapping["causal_lm"].rpartition(".")
        return getattr(importlib.import_module(module), name)


@pytest.fixture
def factory(monkeypatch):
    trainers = ModuleType("swift.trainers")
    trainers.Seq2SeqTrainer, trainers.Seq2SeqTrainingArguments = SwiftTrainer, SwiftArguments
    trainers.TrainerFactory = TrainerFactory
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.trainers", trainers)
    for name in ("TRAINER_MAPPING", "TRAINING_ARGS_MAPPING"):
        monkeypatch.setattr(TrainerFactory, name, dict(getattr(TrainerFactory, name)))
    # ms-swift imports the file under a name that it makes up.
    spec = importlib.util.spec_from_file_location("_swift_external", ROOT / "examples" / "swift_plugin.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return TrainerFactory


def test_the_documented_file_makes_swift_repeat(factory, tmp_path, capsys):
    def run(trainer_cls, config_cls, rows, **arguments):
        options = {"output_dir": str(tmp_path), "per_device_train_batch_size": 2, "num_train_epochs": 1}
        options |= {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "save_strategy": "no"}
        trainer = trainer_cls(model=tiny_llama(), args=config_cls(**options, **QUIET, **arguments), train_dataset=rows)
        trainer.train()
        return trainer

    trainer_cls, config_cls = factory.get(factory.TRAINER_MAPPING), factory.get(factory.TRAINING_ARGS_MAPPING)
    rows = token_rows(8)
    abr = config_cls(output_dir=str(tmp_path), **QUIET)
    assert (abr.repeat_scheduler, abr.loss_threshold, abr.tuner_backend) == ("abr", "q0.8", "peft")
    fixed = {"repeat_scheduler": "fixed", "max_repeats": 3, "skip_outliers": "none", "loss_threshold": None}
    ours = run(trainer_cls, config_cls, rows, **fixed)
    theirs = run(SwiftTrainer, SwiftArguments, [row for i in range(0, 8, 2) for row in rows[i : i + 2] * 3])
    assert torch.equal(weights(ours.model), weights(theirs.model))
    with pytest.raises(ValueError, match="Unknown repeat scheduler"):
        config_cls(output_dir=str(tmp_path), repeat_scheduler="abrr", **QUIET)
