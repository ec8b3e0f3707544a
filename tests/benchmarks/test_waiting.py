"""The benchmark of slow input: its server, its sources, and that its page is made of its results."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import runpy
import time
import urllib.request
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from abr_trainer.data.demo import DEMO_MODEL
from tests.conftest import ROOT

LINES = [f"Line {i} says nothing new about the weather, but it is a line of text." for i in range(80)]


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "waiting.py")))


@pytest.fixture(scope="module")
def served(benchmark, tmp_path_factory):
    """The address of a server of a file, plain and compressed, and the plain content."""
    directory = tmp_path_factory.mktemp("served")
    text = "".join(json.dumps({"text": line}) + "\n" for line in LINES)
    (directory / "lines.jsonl").write_text(text)
    (directory / "lines.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=benchmark.serve, args=(str(directory), sender), daemon=True
    )
    process.start()
    yield f"http://127.0.0.1:{receiver.recv()}", text
    process.kill()  # a handler of this process for SIGTERM would be inherited
    process.join()


def seconds_for(url, **headers):
    start = time.perf_counter()
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        content = answer.read().decode()
    return content, time.perf_counter() - start


def test_a_file_comes_at_its_rate_and_part_of_it_after_its_delay(served):
    address, text = served
    content, seconds = seconds_for(f"{address}/rate/{2 * len(text)}/a/lines.jsonl")
    assert content == text
    assert seconds > 0.45
    content, seconds = seconds_for(f"{address}/delay/0.3/b/lines.jsonl", Range="bytes=10-29")
    assert content == text[10:30]
    assert seconds > 0.29
    content, seconds = seconds_for(f"{address}/release/0/a/lines.jsonl")
    assert content == text
    content, _ = seconds_for(f"{address}/rate/1/a/lines.jsonl")  # would take hours
    assert content == text


def test_both_sources_give_the_blocks_of_the_text(benchmark, served):
    address, text = served
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, model_max_length=10**9)
    streamed = benchmark.Streamed(tokenizer, f"{address}/rate/inf/c/lines.jsonl.gz")
    requested = benchmark.Requested(tokenizer, f"{address}/delay/0/c/lines.jsonl", 300, len(text))
    blocks = benchmark.blocks_of(LINES, tokenizer, benchmark.BLOCK)
    assert len(blocks) > 10
    for source in (streamed, requested):
        assert [row["input_ids"].tolist() for row in source] == blocks


def test_every_run_is_planned_once_and_the_arms_are_those_of_the_wait(benchmark):
    planned = [benchmark.key_of(vars(case)) for case in benchmark.cases(80, benchmark.SEEDS)]
    assert len(set(planned)) == len(planned) == 115
    assert benchmark.arms_at(0) == ["baseline", "fixed 2", "wait"]
    assert benchmark.arms_at(4) == ["baseline", "fixed 2", "fixed 5", "wait"]


def test_the_page_is_made_of_the_results(benchmark):
    if not benchmark.RESULTS.exists():
        pytest.skip("nothing was measured yet")
    results = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    assert benchmark.PAGE.read_text(encoding="utf-8") == benchmark.page(results)
