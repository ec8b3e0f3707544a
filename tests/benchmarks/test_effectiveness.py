"""The benchmark of what rules are worth: its data, its counting, and that its tables are made of its results."""

from __future__ import annotations

import json
import runpy
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from abr_trainer import Observation
from abr_trainer.comparison.arms import parse_arm
from abr_trainer.data.demo import DEMO_MODEL, demo_texts
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "effectiveness.py")))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def test_the_tables_are_made_of_the_results(benchmark):
    studies = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    written = benchmark.TABLES.read_text(encoding="utf-8")
    assert "\n".join(benchmark.tables(studies)) in written


def test_every_arm_is_one_that_the_comparison_takes(benchmark):
    studies = list(benchmark.studies())
    for study in [*studies, *map(benchmark.quick, studies)]:
        assert len(study.seeds) >= 2
        for arm in study.arms.values():
            parse_arm(arm)
        assert len(set(study.arms.values())) == len(study.arms), "no arm under two names"


@pytest.mark.parametrize("kind", ["random", "shuffled", "bytes", "cipher", "repeated"])
def test_dirt_fills_its_batches_and_touches_no_other(benchmark, tokenizer, tmp_path, kind):
    clean = benchmark.blocks_of(demo_texts("train"), tokenizer)[:80]
    benchmark._write_dirty(tmp_path, kind, 25, 3, clean, tokenizer)
    blocks = [
        json.loads(line)["input_ids"] for line in (tmp_path / f"dirty-{kind}-25-3.jsonl").read_text().splitlines()
    ]
    broken = json.loads((tmp_path / f"dirty-{kind}-25-3.json").read_text())
    assert len(broken) == 5  # of 20 batches of four blocks
    assert {len(block) for block in blocks} == {128}
    assert all(
        (block != good) == (i // 4 in broken) for i, (block, good) in enumerate(zip(blocks, clean, strict=True))
    )
    if kind == "shuffled":
        assert all(sorted(block) == sorted(good) for block, good in zip(blocks, clean, strict=True))
    rule = runpy.run_path(str(ROOT / "benchmarks" / "oracle.py"))["Oracle"](str(tmp_path / f"dirty-{kind}-25-3.json"))
    decided = [rule.decide(Observation(batch=batch, loss=1.0, progress=0.0)) for batch in range(20)]
    assert [batch for batch, repeats in enumerate(decided) if repeats == 0] == broken


def test_what_was_skipped_is_counted_by_what_was_broken(benchmark, tmp_path):
    (tmp_path / "data.json").write_text("[1, 3]")
    run = tmp_path / "run"
    run.mkdir()
    repeats = [1, 0, 0, 1, 1]  # of batches 1 and 3, which are broken, one is skipped; of the others, batch 2
    (run / "abr_trace.jsonl").write_text(
        "".join(json.dumps({"step": i + 1, "repeats": count}) + "\n" for i, count in enumerate(repeats))
    )
    runs = [{"arm": "robust", "directory": "run", "argv": ["--train_file", str(tmp_path / "data.jsonl")]}]
    counts = benchmark.skipped("robust", ("random", 10), [*runs, {"arm": "other"}], tmp_path)
    assert (counts["broken"], counts["broken_skipped"]) == (2, 1)
    assert (counts["good"], counts["good_skipped"]) == (3, 1)


def test_arms_are_compared_in_nats_seed_by_seed(benchmark):
    reference = {"nll": {"0": 3.0, "1": 4.0, "2": 5.0}}
    found = benchmark.compared({"nll": {"0": 2.9, "1": 3.8, "2": 4.7}}, reference)
    assert found["mean"] == pytest.approx(-0.2)
    assert found["verdict"] == "no evidence"  # -0.2 +- 4.303 * 0.1 / sqrt(3)
    assert found["t_low"] == pytest.approx(-0.4484, abs=1e-4)
    missing = benchmark.compared({"nll": {"0": 2.9, "1": None, "2": 4.7}}, reference)
    assert missing["verdict"] == "no verdict: 2 of 3 pairs"
