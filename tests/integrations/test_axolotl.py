"""The plugin for axolotl: two lines of YAML, and its own trainer repeats.

Where axolotl is not installed, these tests run against the interface of axolotl 0.19.0 as it is written down below,
and not against the real package.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import TrainingArguments

from tests.conftest import QUIET, tiny_llama, token_rows, weights

PLUGIN = "abr_trainer.integrations.axolotl.ABRPlugin"

INTERFACE = {
    "__init__.py": "",
    "integrations/__init__.py": "",
    "integrations/base.py": """
        import importlib


        class BasePlugin:
            def register(self, cfg): ...
            def get_input_args(self): ...
            def get_training_args_mixin(self): ...
            def get_trainer_cls(self, cfg): ...
            def get_training_args(self, cfg): ...
            def post_trainer_create(self, cfg, trainer): ...


        class PluginManager:
            _instance = None

            def __init__(self):
                self.plugins = {}

            @classmethod
            def get_instance(cls):
                cls._instance = cls._instance or cls()
                return cls._instance

            def register(self, plugin_name):
                module, _, name = plugin_name.rpartition(".")
                try:
                    self.plugins[plugin_name] = getattr(importlib.import_module(module), name)()
                except ImportError as error:
                    print(f"Error: {error}")

            def get_input_args(self):
                return [each for plugin in self.plugins.values() if (each := plugin.get_input_args()) is not None]

            def get_training_args_mixin(self):
                found = [plugin.get_training_args_mixin() for plugin in self.plugins.values()]
                return [each for each in found if each is not None]

            def get_trainer_cls(self, cfg):
                return next((each for plugin in self.plugins.values() if (each := plugin.get_trainer_cls(cfg))), None)

            def get_training_args(self, cfg):
                found = [plugin.get_training_args(cfg) for plugin in self.plugins.values()]
                return {key: value for each in found for key, value in each.items()}

            def post_trainer_create(self, cfg, trainer):
                for plugin in self.plugins.values():
                    plugin.post_trainer_create(cfg, trainer)
    """,
    "core/__init__.py": "",
    "core/trainers/__init__.py": """
        import torch
        from transformers import Trainer


        class AxolotlTrainer(Trainer):
            def __init__(self, *args, bench_data_collator=None, eval_data_collator=None, dataset_tags=None, **kwargs):
                self.eval_data_collator = eval_data_collator
                super().__init__(*args, **kwargs)

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                if self.args.include_tkps and model.training:
                    before = getattr(self.state, "tokens", {"total": torch.zeros(1)})["total"]
                    self.state.tokens = {"total": before + inputs["labels"].numel()}
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

            def orpo_compute_loss(self, model, inputs): ...


        class AxolotlRewardTrainer(Trainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
    """,
    "core/builders/__init__.py": "",
    "core/builders/causal.py": """
        from axolotl.core.trainers import AxolotlRewardTrainer, AxolotlTrainer
        from axolotl.integrations.base import PluginManager


        class HFCausalTrainerBuilder:
            def __init__(self, cfg):
                self.cfg = cfg

            def _get_trainer_cls(self):
                if self.cfg.plugins and (found := PluginManager.get_instance().get_trainer_cls(self.cfg)):
                    return found
                return AxolotlRewardTrainer if self.cfg.reward_model else AxolotlTrainer
    """,
    "core/training_args_base.py": """
        from dataclasses import dataclass


        @dataclass
        class AxolotlTrainingMixins:
            include_tkps: bool = True
            orpo_alpha: float | None = None
    """,
}


class Settings(dict):
    """A configuration as axolotl passes it on: keys are attributes, and missing ones None."""

    def __getattr__(self, name):
        return self.get(name)


def is_real():
    if importlib.util.find_spec("axolotl") is None:
        return False
    try:
        importlib.import_module("axolotl.core.builders.causal")
    except ImportError:  # of a package that it needs and that is not here
        return False
    return True


@pytest.fixture
def axolotl(tmp_path, monkeypatch):
    """Start axolotl with a YAML file: read its plugins, and build a trainer as it does."""
    sys.modules.pop("abr_trainer.integrations.axolotl", None)  # as it was read without axolotl
    before = set(sys.modules)
    if not is_real():
        for name, source in INTERFACE.items():
            path = tmp_path / "site" / "axolotl" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path / "site")
    from axolotl.integrations.base import PluginManager

    manager = PluginManager.get_instance()
    manager.plugins.clear()

    def start(text):
        cfg = Settings(yaml.safe_load(text))
        for name in cfg.plugins:
            manager.register(name)
        for plugin in manager.plugins.values():
            plugin.register(cfg)
        return cfg

    def build(cfg, rows, accumulation=1, stock=None, **arguments):
        builder = importlib.import_module("axolotl.core.builders.causal").HFCausalTrainerBuilder
        base = importlib.import_module("axolotl.core.training_args_base").AxolotlTrainingMixins
        mixins = [resolved(name) for name in manager.get_training_args_mixin()]
        theirs = type("AxolotlTrainingArguments", (base, *mixins, TrainingArguments), {})
        options = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "train_sampling_strategy": "sequential",
            "remove_unused_columns": False,
            **QUIET,
            **arguments,
            **({} if stock else manager.get_training_args(cfg)),
        }
        trainer = (stock or builder._get_trainer_cls(SimpleNamespace(cfg=cfg)))(
            model=tiny_llama(),
            args=dataclasses.dataclass(theirs)(**options),
            train_dataset=rows,
            eval_dataset=rows,
            dataset_tags=["made/up"],
        )
        if not stock:
            manager.post_trainer_create(cfg, trainer)
        return trainer

    yield SimpleNamespace(manager=manager, start=start, build=build)
    manager.plugins.clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "axolotl" or name.startswith("abr_trainer.integrations.axolotl"):
            del sys.modules[name]


def resolved(dotted):
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_lines_of_yaml_make_their_trainer_repeat(axolotl, capsys, accumulation):
    cfg = axolotl.start(f"plugins: [{PLUGIN}]\nrepeat_scheduler: fixed\nskip_outliers: none\n")
    rows, size = token_rows(12), 2 * accumulation
    ours = axolotl.build(cfg, rows, accumulation)
    assert "ABR Trainer: active in ABRAxolotlTrainer with repeat_scheduler fixed" in capsys.readouterr().out
    ours.train()
    as_trained_on = [row for start in range(0, 12, size) for row in rows[start : start + size] * 2]
    from axolotl.core.trainers import AxolotlTrainer

    theirs = axolotl.build(cfg, as_trained_on, accumulation, stock=AxolotlTrainer)
    theirs.train()
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert ours.ledger.updates == 2 * ours.ledger.batches == 24 // size
    assert float(ours.state.tokens["total"]) == 12 * 12, "repeats are not counted as tokens"
    assert "perplexity" in ours.state.log_history[0]


def test_keys_of_the_yaml_file_are_those_of_the_config_and_reach_it(axolotl):
    cfg = axolotl.start(f"plugins: [{PLUGIN}]\nrepeat_scheduler: abr\nloss_threshold: q0.8\nmax_passes: 5\n")
    (model,) = [resolved(name) for name in axolotl.manager.get_input_args()]
    keys = set(model.model_fields)
    assert {"repeat_scheduler", "loss_threshold", "max_passes", "skip_outliers", "eval_passes"} <= keys
    assert keys.isdisjoint({"learning_rate", "report_to", "logging_steps", "early_stopping_patience"})
    assert model(loss_threshold="q0.8").loss_threshold == "q0.8"
    trainer = axolotl.build(cfg, token_rows(12))
    assert (trainer.args.loss_threshold, trainer.args.max_passes) == ("q0.8", 5)
    trainer.train()
    assert trainer.ledger.passes == 5


def test_the_trainer_of_another_plugin_is_combined_or_the_order_is_refused(axolotl, monkeypatch, tmp_path):
    (tmp_path / "other_plugin.py").write_text(
        textwrap.dedent("""
            from axolotl.core.trainers import AxolotlTrainer
            from axolotl.integrations.base import BasePlugin

            class OtherTrainer(AxolotlTrainer):
                pass

            class Other(BasePlugin):
                def get_trainer_cls(self, cfg):
                    return OtherTrainer

                def get_training_args(self, cfg):
                    return {}
        """),
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = axolotl.start(f"plugins: [{PLUGIN}, other_plugin.Other]\nrepeat_scheduler: fixed\n")
    assert type(axolotl.build(cfg, token_rows(2))).__name__ == "ABROtherTrainer"
    axolotl.manager.plugins.clear()
    cfg = axolotl.start(f"plugins: [other_plugin.Other, {PLUGIN}]\nrepeat_scheduler: fixed\n")
    with pytest.raises(
        ValueError, match="ABRPlugin must be the first in the list. Another plugin has set the trainer"
    ):
        axolotl.build(cfg, token_rows(2))


def test_their_reward_trainer_does_not_get_the_tags_that_it_does_not_take(axolotl):
    cfg = axolotl.start(f"plugins: [{PLUGIN}]\nreward_model: true\n")
    builder = importlib.import_module("axolotl.core.builders.causal").HFCausalTrainerBuilder
    assert builder._get_trainer_cls(SimpleNamespace(cfg=cfg)).__name__ == "ABRAxolotlRewardTrainer"
    axolotl.build(cfg, token_rows(2))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("repeat_scheduler: abrr", "Unknown repeat scheduler 'abrr'. Did you mean 'abr'?"),
        ("skip_outliers: sometimes", "sometimes"),
        ("rl: dpo", "rl: dpo cannot be used with ABRPlugin, because axolotl then gives a plugin's trainer no model"),
    ],
)
def test_a_wrong_value_ends_the_run_before_the_model_is_loaded(axolotl, lines, message):
    with pytest.raises(ValueError, match=message):
        axolotl.start(f"plugins: [{PLUGIN}]\n{lines}\n")


@pytest.mark.parametrize("missing", ["abr_trainer.training.config", "abr_trainer.schedulers.registry"])
def test_an_import_that_fails_ends_the_run(axolotl, monkeypatch, missing):
    """Their plugin manager would swallow it and train without us."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=missing):
        axolotl.start(f"plugins: [{PLUGIN}]\nrepeat_scheduler: fixed\n")
