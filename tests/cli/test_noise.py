"""Messages of libraries that are left out, and those that are not."""

from __future__ import annotations

import logging
import os
import pty
import re
import select
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from abr_trainer.cli.noise import LOGGED, WARNED, filter_noise
from tests.conftest import ON_CPU, ROOT, RUN


@pytest.fixture
def filtered():
    with warnings.catch_warnings():
        filter_noise()
        filter_noise()  # as where a command calls another
        yield
    for name in LOGGED:
        logging.getLogger(name).filters.clear()


@pytest.mark.parametrize("name", LOGGED)
def test_a_known_message_is_left_out_and_one_that_differs_is_not(filtered, caplog, name):
    logger, known = logging.getLogger(name), LOGGED[name]
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(logger, "propagate", True)
    logger.warning(known)
    logger.warning("%s", known)
    assert caplog.messages == []
    others = [known + "!", known.replace("kernels'", "kernelz'").replace("GPU", "TPU"), known.upper()]
    for other in others:
        logger.warning(other)
    logging.getLogger(name + ".more").warning(known)
    heard = list(dict.fromkeys(caplog.messages))  # DeepSpeed's logger, once it is set up, is heard twice
    assert heard == [*others, known], "by another logger it is another message"
    assert len(logger.filters) == 1
    monkeypatch.undo()


@pytest.mark.parametrize(("text", "known"), WARNED.items())
def test_a_known_warning_is_left_out_and_one_that_differs_is_not(filtered, text, known):
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn(text, known, stacklevel=1)
        assert caught == []
        for other, kind in ((text + " Soon.", known), ("Now: " + text, known), (text, RuntimeWarning)):
            warnings.warn(other, kind, stacklevel=1)
    assert len(caught) == 3


def test_libraries_still_say_what_is_filtered():
    """Else the entry can go."""
    import bitsandbytes.backends.cpu.ops as ops
    from torch.utils.data import dataloader
    from transformers import modeling_utils

    def source_of(module):
        return re.sub(r'"\s+"', "", Path(module.__file__).read_text())

    assert ops.logger.name in LOGGED
    assert LOGGED[ops.logger.name].replace("No module named 'kernels'", "%s") in source_of(ops)
    for text, module in zip(WARNED, (modeling_utils, dataloader), strict=True):
        assert text in source_of(module)


def on_a_terminal(argv, columns):
    """Run `abr` on a terminal of so many columns; return what it wrote, and after how long it wrote first."""
    leader, follower = pty.openpty()
    environment = os.environ | ON_CPU | {"COLUMNS": str(columns), "TERM": "xterm", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "abr_trainer", *argv], cwd=ROOT, env=environment, stdout=follower, stderr=follower
    )
    os.close(follower)
    begun, first, written = time.monotonic(), None, b""
    while process.poll() is None or select.select([leader], [], [], 0)[0]:
        if select.select([leader], [], [], 1)[0]:
            try:
                written += os.read(leader, 65536)
            except OSError:  # its end
                break
            first = first or time.monotonic() - begun
    os.close(leader)
    assert process.wait() == 0, written.decode()[-3000:]
    return written.decode(), first


@pytest.mark.launches
def test_a_terminal_of_100_columns_shows_a_run_without_noise_or_broken_lines(tmp_path):
    flags = [flag for flag in RUN if flag not in ("--disable_tqdm", "true")]
    output = ["--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    text, _ = on_a_terminal(["train", *flags, "--logging_steps", "1", *output], columns=100)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [line for each in shown.splitlines() for line in each.split("\r")]
    assert lines[0] == "Loading PyTorch and Transformers ..."
    assert not [line for line in lines if len(line) > 100 and str(tmp_path) not in line]
    for noise in ("gemm_4bit", "is_gradient_checkpointing", "Setting accelerator", "{'", "UserWarning"):
        assert noise not in shown
    labels = [line.split(" ")[0] for line in lines if re.match(r"[a-z]+ {2,}\S", line)]
    header = ["model", "trainable", "data", "defaults", "batch", "rule", "outliers", "rows", "budget", "output"]
    assert [label for label in labels if label in header][: len(header)] == header
    assert re.search(
        r"step +passes +loss +perplexity +updates/batch +skipped +learning rate +tokens/s +time left", shown
    )
    assert "━" in shown, "a bar"
