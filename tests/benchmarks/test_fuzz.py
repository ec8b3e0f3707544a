"""The fuzzer: it tells faults from refusals, and a few of its cases find none."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT

QUICK = {"load": 60, "compared": 15, "flags": 25}
"""Kinds of cases that train nothing, or next to nothing."""


@pytest.fixture(scope="module")
def fuzz():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        for name in ("HF_ENDPOINT", "COLUMNS"):
            patch.setenv(name, os.environ.get(name, ""))  # it sets them
        yield SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "fuzz.py")))


@pytest.fixture(scope="module")
def inputs(fuzz, tmp_path_factory):
    out = tmp_path_factory.mktemp("fuzz")
    fuzz.make_inputs(out / "good", [])
    return out


def told(status, *lines):
    """Work that prints these lines to standard error and ends with a status."""

    def work():
        print(*lines, sep="\n", file=sys.stderr)
        return status

    return work


def crash():
    raise KeyError("loss")


CLEAR = "error: --train_file notes.txt is empty, and holds no row."


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (told(0), "ended well"),
        (told(2, CLEAR), "refused"),
        (told(2, "a warning", CLEAR), "refused"),
        (told(1, CLEAR), "refused, with status 1"),
        (told(2, CLEAR, CLEAR), "unclear: not one line"),
        (told(2, CLEAR, "and more"), "unclear: not one line"),
        (told(2), "unclear: not one line"),
        (told(2, "error: 'loss'"), "unclear: short"),
        (told(2, "error: 'NoneType' object has no attribute 'get'"), "unclear: object has no attribute"),
        (crash, "crash"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "crash"),
        (lambda: time.sleep(60), "hangs"),
    ],
)
def test_an_end_gets_a_verdict(fuzz, tmp_path, work, expected):
    folder = tmp_path / "case"
    folder.mkdir()
    ended = fuzz.in_fork(work, folder, 5.0 if expected != "hangs" else 0.2)
    assert fuzz.verdict(fuzz.Case("flags", ["report", "run"]), ended, folder) == expected


def test_what_a_refusal_leaves_behind_is_a_fault(fuzz, tmp_path):
    ended = fuzz.Ended(2, "", CLEAR, changed=["clean.jsonl"])
    assert fuzz.verdict(fuzz.Case("data", ["rows", "run"]), ended, tmp_path) == "half-written"


def test_rows_that_a_plain_reader_finds_and_ours_does_not_are_a_fault(fuzz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.jsonl").write_text('{"text": "the first row of two"}\n{"text": "the second row of two"}\n')
    assert fuzz.load("notes.jsonl") == 0
    monkeypatch.setitem(fuzz.load.__globals__, "plain_texts", lambda path: ["the first row of two"])
    assert fuzz.load("notes.jsonl") == fuzz.SILENT


def test_the_same_number_is_the_same_case(fuzz, inputs):
    known = {"verbs": {}, "trainer": []}
    cases = [fuzz.make_case(3, 1, inputs / "good", inputs / name, known, {"load": 1}) for name in ("a", "b")]
    assert cases[0] == cases[1]
    assert [path.read_bytes() for path in sorted((inputs / "a").iterdir())] == [
        path.read_bytes() for path in sorted((inputs / "b").iterdir())
    ]


def test_a_few_cases_find_no_fault(fuzz, inputs):
    faults, verdicts = [], Counter()
    for number in range(20):
        case, ended, found = fuzz.run_case(number, 7, inputs, kinds=QUICK)
        verdicts[found] += 1
        if found not in fuzz.FINE:
            faults.append((number, case, found, ended.stderr[-1000:]))
    assert not faults
    assert {"ended well", "refused"} <= verdicts.keys()
