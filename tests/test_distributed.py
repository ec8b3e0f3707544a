"""Two ranks: one decision, and the same training as one process with twice the micro-batches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.jobs import ranks

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_agree_and_equal_one_process_with_twice_the_accumulation(tmp_path, accumulation):
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    one.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.jobs", "ranks", str(two), str(accumulation)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks(str(one), accumulation=str(2 * accumulation))

    first, second, alone = (
        json.loads(path.read_text()) for path in (two / "rank-0.json", two / "rank-1.json", one / "rank-0.json")
    )
    assert first == second
    assert torch.equal(torch.load(two / "weights-0.pt"), torch.load(two / "weights-1.pt"))

    torch.testing.assert_close(
        torch.load(two / "weights-0.pt"), torch.load(one / "weights-0.pt"), rtol=1e-3, atol=1e-5
    )
    assert first["scheduler"]["history"] == pytest.approx(alone["scheduler"]["history"], rel=1e-4)
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    for key in ("batches", "skips", "updates", "tokens"):
        assert first["ledger"][key] == alone["ledger"][key]
    # The evaluation set does not divide by two: the row that is given out twice counts once.
    assert first["target_tokens"] == alone["target_tokens"] == 5 * 11
    assert first["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)
    # One micro-batch is broken, on one rank, once an epoch: one skip each time, on all ranks.
    assert first["ledger"]["skips"] >= 2
    assert first["ledger"]["updates"] > first["ledger"]["batches"]
