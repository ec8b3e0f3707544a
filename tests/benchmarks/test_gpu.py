"""On a GPU; and, on any machine, the program that measures there."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.conftest import ON_CPU, ROOT, Scripted, tiny_llama, token_rows, weights

pytestmark = pytest.mark.slow

ON_GPU = {"use_cpu": False, "lr_scheduler_type": "constant"}


# ---- benchmarks/gpu.py ----


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu
    import gpu_page

    level = logging.getLogger("transformers").level
    yield SimpleNamespace(program=gpu, page=gpu_page.page, misses=gpu_page.misses)
    logging.getLogger("transformers").setLevel(level)


def measured(path):
    """Return what each row shows, of rows that show something."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = {name: found for machine in kept.values() for name, found in machine["rows"].items()}
    return {name: found for name, found in rows.items() if not {"left_out", "failed"} & found.keys()}


@pytest.mark.long
@pytest.mark.launches
def test_a_killed_measurement_goes_on_where_it_was_and_the_page_shows_every_row(benchmark, tmp_path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--json", str(path)]
    process = subprocess.Popen(command, env=os.environ | ON_CPU, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not measured(path) and process.poll() is None:
        time.sleep(0.1)
    process.kill()
    process.wait()
    before = measured(path)
    results = benchmark.program.main(["--tiny", "--json", str(path)])
    (kept,) = results.values()
    assert 1 <= len(before) < len(kept["rows"])
    assert {name: kept["rows"][name] for name in before} == before
    rows = benchmark.program.rows_of(tiny=True)
    assert list(kept["rows"]) == [row.name for row in rows]
    for row in rows:
        found = kept["rows"][row.name]
        assert found.get("left_out") == row.left_out
        assert "failed" not in found
        if row.name.startswith("exact") and row.left_out is None:
            assert benchmark.misses(row.name, found) == []
    page = benchmark.page(results)
    assert all(row.name.partition(": ")[2] in page for row in rows)


def test_a_row_that_fails_is_told_and_the_next_one_follows(benchmark, tmp_path, monkeypatch, capsys):
    def fail(setup, directory):
        raise ValueError("no such\nkernel")

    rows = [
        benchmark.program.Row("exact: broken", fail, benchmark.program.Setup(benchmark.program.TINY)),
        benchmark.program.Row("tests", lambda *_: {"tests": "= 3 passed ="}, None),
        benchmark.program.Row("exact: elsewhere", fail, None, ("no_such_package",)),
    ]
    monkeypatch.setattr(benchmark.program, "rows_of", lambda tiny: rows)
    path = tmp_path / "gpu.json"
    results = benchmark.program.main(["--tiny", "--json", str(path)])
    (kept,) = results.values()
    assert kept["rows"]["exact: broken"] == {"failed": "ValueError: no such kernel"}
    assert kept["rows"]["exact: elsewhere"] == {"left_out": "no_such_package not installed"}
    assert json.loads(path.read_text()) == results
    for line in ("Tests that need a GPU: 3 passed.", "failed, ValueError: no such kernel", "left out, no_such_pack"):
        assert line in benchmark.page(results)


def test_a_measurement_stops_by_itself(benchmark, tmp_path, monkeypatch, capsys):
    stopped = threading.Event()
    monkeypatch.setattr(benchmark.program.os, "_exit", lambda status: stopped.set())
    row = benchmark.program.Row("tests", lambda *_: {"tests": str(stopped.wait(60))}, None)
    monkeypatch.setattr(benchmark.program, "rows_of", lambda tiny: [row])
    results = benchmark.program.main(["--tiny", "--minutes", "0.001", "--json", str(tmp_path / "gpu.json")])
    assert [kept["rows"]["tests"]["tests"] for kept in results.values()] == ["True"]
    assert "0.001 minutes are over" in capsys.readouterr().out


def test_bars_are_missed_by_what_lies_above_them(benchmark):
    exact = {"moved": 1e-3, "stock again": 1e-9, "once": 0.0, "repeats and skips": 2e-9, "resumed": 1e-9}
    assert benchmark.misses("exact: bf16", exact) == ["repeats and skips"]
    assert benchmark.misses("exact: Liger fused loss", {**exact, "accuracy": None}) == ["repeats and skips"]
    assert benchmark.misses("exact: bf16", {**exact, "accuracy": 2e-9}) == ["repeats and skips", "accuracy"]
    cost = {
        "ratios": {"once": [1.0, 1.02, 1.02], "pass": [1.0, 1.0, 1.2], "skip": [0.36, 0.36]},
        "forward_share": 1 / 3,
        "memory": {"stock": 100, "once": 101, "pass": 102},
        "waits": {"stock": 2.0, "once": 3.0, "pass": 5.0},
    }
    assert benchmark.misses("cost: full", cost) == ["once", "skip", "memory"]
    assert benchmark.misses("loops: full", {"ratios": {"IterBatch": [1.35, 1.35]}}) == []
    assert benchmark.misses("loops: LoRA", {"ratios": {"IterBatch": [1.35, 1.35]}}) == ["IterBatch"]


def test_the_page_in_the_docs_is_made_of_the_results(benchmark):
    path = benchmark.program.RESULTS
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    assert benchmark.program.PAGE.read_text(encoding="utf-8") == benchmark.page(results)


def test_the_trainer_needs_neither_datasets_nor_bitsandbytes(tmp_path):
    """Nor what else a bare GPU machine lacks: in an interpreter that does not see these packages."""
    absent = ("datasets", "bitsandbytes", "evaluate", "trl", "peft", "deepspeed", "matplotlib", "__editable__")
    for directory in {str(ROOT), *sys.path}:
        for entry in os.scandir(directory) if "site-packages" in directory and os.path.isdir(directory) else ():
            if not entry.name.startswith(absent) and not entry.name.endswith(".pth"):
                (tmp_path / entry.name).symlink_to(entry.path)
    code = "import abr_trainer, sys; abr_trainer.ABRTrainer, abr_trainer.ABRConfig; print('datasets' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=os.environ | ON_CPU | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "False", done.stderr[-2000:]


# ---- Training on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_repeats_and_skips_are_stock_training_on_these_batches(train, precision):
    rows = token_rows(12)
    as_trained = rows[0:2] * 2 + rows[4:6] * 3 + rows[6:12]
    ours = train(repeat_scheduler=Scripted(2, 0, 3, 1), data=rows, **ON_GPU, **precision)
    theirs = train(Trainer, TrainingArguments, data=as_trained, **ON_GPU, **precision)
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_skip_leaves_weights_moments_and_the_loss_scale_as_they_were(train):
    rows = token_rows(4)
    once = train(repeat_scheduler=Scripted(1, 0), data=rows, fp16=True, **ON_GPU)
    alone = train(Trainer, TrainingArguments, data=rows[:2], fp16=True, **ON_GPU)
    assert torch.equal(weights(once.model), weights(alone.model))
    assert once.accelerator.scaler.state_dict() == alone.accelerator.scaler.state_dict()


@pytest.mark.gpu
def test_the_decision_makes_the_host_wait_once_a_batch(train):
    def waits(**options):
        with torch.profiler.profile() as profiler:
            train(data=token_rows(40), **ON_GPU, logging_steps=100, **options)
        counts = {each.key: each.count for each in profiler.key_averages()}
        return counts.get("cudaStreamSynchronize", 0) + counts.get("cudaEventSynchronize", 0)

    stock = waits(trainer_cls=Trainer, config_cls=TrainingArguments)
    assert waits(repeat_scheduler=Scripted(1)) <= stock + 20 + 5  # 20 batches; and a few at the start and the end


@pytest.mark.gpu
def test_a_loss_that_is_not_finite_costs_its_batch_and_no_weight(train):
    rows = token_rows(6)
    rows[2] = {"input_ids": rows[2]["input_ids"], "labels": torch.full_like(rows[2]["labels"], -100)}
    rows[3] = {"input_ids": rows[3]["input_ids"], "labels": torch.full_like(rows[3]["labels"], -100)}
    trainer = train(data=rows, bf16=True, model=tiny_llama(), **ON_GPU)
    assert trainer.ledger.skips == 1
    assert torch.isfinite(weights(trainer.model)).all()
