"""The benchmark of repeats on a real model: its queue, its data, and that its page is made of its results."""

from __future__ import annotations

import json
import runpy
from types import SimpleNamespace

import pytest

from abr_trainer.comparison.arms import parse_arm
from abr_trainer.data.demo import DEMO_MODEL
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "real_model.py")))


def test_a_study_grows_by_seeds_and_then_by_rules(benchmark):
    for queue in benchmark.queue():
        first, second, third = queue.steps()
        assert list(first.arms) == list(second.arms) == [name for name in queue.study.arms if name in queue.first]
        assert first.seeds == (0,), "which `abr compare` takes as a number of seeds"
        assert second.seeds == third.seeds == queue.study.seeds
        assert third.arms == queue.study.arms
        assert len({step.folder for step in queue.steps()}) == 1, "each step goes on with the runs of the one before"


def test_every_arm_is_one_that_the_comparison_takes(benchmark):
    for queue in benchmark.queue():
        assert next(iter(queue.study.arms)) == "baseline"
        for arm in queue.study.arms.values():
            parse_arm(arm)


def test_no_block_that_judges_is_trained_on(benchmark, tmp_path):
    (tmp_path / "wikitext2").mkdir()
    for split in ("train", "valid", "test"):
        lines = [f"line {i} of the {split} split says nothing new about the weather of {i * i}" for i in range(2000)]
        (tmp_path / "wikitext2" / f"wiki.{split}.tokens").write_text("\n".join(lines))
    (tmp_path / benchmark.MODEL).symlink_to(DEMO_MODEL)
    study = next(benchmark.queue()).study
    folder = benchmark.write_data(study, SimpleNamespace(out=tmp_path, data=tmp_path, models=tmp_path))
    blocks = {
        path.stem: [tuple(json.loads(line)["input_ids"]) for line in path.read_text().splitlines()]
        for path in folder.iterdir()
    }
    judging = {*blocks["validation"], *blocks["test"]}
    for seed in study.seeds:
        assert not judging & set(blocks[f"plenty-{seed}"])
        assert blocks[f"few-{seed}"] == blocks[f"plenty-{seed}"][: benchmark.FEW_BATCHES]
    assert {len(block) for part in blocks.values() for block in part} == {benchmark.BLOCK}


def test_the_page_is_made_of_the_results(benchmark):
    if not benchmark.RESULTS.exists():
        pytest.skip("nothing is measured yet")
    assert benchmark.PAGE.read_text(encoding="utf-8") == benchmark.page(json.loads(benchmark.RESULTS.read_text()))
