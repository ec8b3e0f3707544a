"""What the README says exists, exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import HfArgumentParser

from abr_trainer import ABRConfig, ABRTrainer, Observation
from abr_trainer.data import DataArguments, TextArguments
from abr_trainer.demo import DEMO_MODEL
from abr_trainer.measurement import EvaluationArguments, MeasureArguments
from abr_trainer.merging import MergeArguments
from abr_trainer.modeling import ModelArguments
from abr_trainer.pruning import PruneArguments
from tests.conftest import tiny_llama, token_rows

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE, OWN_RULE, TRL_EXAMPLE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda _: tiny_llama())
    names = {"train_dataset": token_rows(16), "eval_dataset": token_rows(4)}
    exec(EXAMPLE.replace("max_passes=2000", "max_passes=12"), names)
    assert isinstance(names["trainer"], ABRTrainer)
    assert names["trainer"].ledger.passes == 12


def test_the_example_for_trl_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"train_dataset": Dataset.from_list([{"text": "The fox saw nine birds. One of them flew away."}] * 12)}
    quick = f'model="{DEMO_MODEL}"', "max_passes=4, use_cpu=True, bf16=False"
    exec(TRL_EXAMPLE.replace('model="path/or/hub-id"', quick[0]).replace("max_passes=2000", quick[1]), names)
    assert names["trainer"].ledger.passes == 4


def test_the_own_rule_decides():
    names = {}
    exec(OWN_RULE, names)
    rule = names["OnlyTheFirstHalf"]()
    assert [rule.decide(Observation(0, loss, progress)) for loss, progress in ((4, 0.1), (4, 0.9), (2, 0.1))] == [
        2,
        1,
        1,
    ]


def test_every_flag_is_one_of_the_script():
    scripts = (
        [ModelArguments, DataArguments, EvaluationArguments, ABRConfig],
        [TextArguments, MeasureArguments],
        [PruneArguments],
    )
    parsers = [*map(HfArgumentParser, scripts), HfArgumentParser(MergeArguments)]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    of_others = {
        "--data",
        "--model",
        "--models",
        "--logdir",
        "--help",
        "--only",
        "--batches",
        "--cpu",
        "--no-build-isolation",
        "--config_file",
    }
    of_others |= {"--schedulers", "--controls", "--seeds", "--out", "--match", "--tune", "--jobs", "--launcher"}
    of_others |= {"--keep-going", "--why", "--num_processes", "--train", "--test"}
    of_others |= {"--nodes", "--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_id", "--rdzv_endpoint"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9-]*", README)) <= known | of_others


def test_every_test_it_names_exists():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README[README.index("## What works") :])
    assert named
    assert all(f"def {name}(" in tests for name in named)


@pytest.mark.parametrize("line", re.search(r"## What is where\n\n(.*?)\n\n", README, flags=re.DOTALL)[1].splitlines())
def test_every_file_of_the_tree_exists(line):
    name = line.split()[0]
    inside = "abr_trainer/" if line.startswith("      ") else ""
    assert (ROOT / inside / name).exists()
