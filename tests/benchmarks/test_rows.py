"""The benchmark of dropping rows: its data, its counting, and that its page is made of its results."""

from __future__ import annotations

import json
import runpy
from types import SimpleNamespace

import pytest

from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.schedulers import Observation, Outcome, Row
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "rows.py")))


@pytest.fixture
def corpora(benchmark, tmp_path):
    """A few documents of each corpus, and a tokenizer that has no opinion on lengths."""
    for name in ("wikitext2", "dailydialog", "mrpc"):
        (tmp_path / name).mkdir()
    for split in ("train", "test"):
        lines = [f"line {i} of the {split} split says nothing new about the weather" for i in range(400)]
        (tmp_path / "wikitext2" / f"wiki.{split}.tokens").write_text("\n".join(lines))
        dialogues = [
            {"dialog": [f"{split} {i} asks?", f"{i} answers.", "And then?", f"{i} again."]} for i in range(40)
        ]
        pairs = [{"sentence1": f"{i}", "sentence2": "it is", "label": i % 2} for i in range(40)]
        for name, rows in (("dailydialog", dialogues), ("mrpc", pairs)):
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = benchmark.Corpora(tmp_path, DEMO_MODEL.parent, foreign="")
    found.model = DEMO_MODEL
    return found


@pytest.fixture(autouse=True)
def demo_model_is_the_model(benchmark, monkeypatch):
    monkeypatch.setitem(benchmark.Corpora.__init__.__globals__, "MODEL", DEMO_MODEL.name)


def test_the_page_is_made_of_the_results(benchmark):
    if not benchmark.RESULTS.exists():
        pytest.skip("nothing was measured yet")
    results = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    assert benchmark.PAGE.read_text(encoding="utf-8") == benchmark.page(results)


def test_every_run_is_planned_once_and_goes_by_a_key_of_its_own(benchmark):
    planned = [
        benchmark.key_of({**vars(case.setting), **vars(case)}) for case in (*benchmark.cases(), *benchmark.quick())
    ]
    assert len(set(planned)) == len(planned)
    assert {key[-1] for key in planned} == {0, 1, 2, 3, 4}
    assert {key[3] for key in planned} == {"", *benchmark.NAMES}


@pytest.mark.parametrize(
    ("corpus", "kind"),
    [
        *(("wikitext2", kind) for kind in ("random", "shuffled", "bytes", "repeated", "foreign")),
        *(("dailydialog", kind) for kind in ("random", "swapped", "foreign")),
        ("mrpc", "label"),
    ],
)
def test_dirt_fills_its_rows_and_touches_no_other(benchmark, corpora, corpus, kind):
    setting = benchmark.Setting(corpus, 4, 5)
    clean, nothing = corpora.train_rows(benchmark.Case(setting, "", 0, "none", 3))
    rows, broken = corpora.train_rows(benchmark.Case(setting, kind, 25, "rows", 3))
    again, _ = corpora.train_rows(benchmark.Case(setting, kind, 25, "oracle", 3))
    assert rows == again
    assert nothing == []
    assert len(broken) == 5  # of 20 rows
    changed = [i for i, (row, before) in enumerate(zip(rows, clean, strict=True)) if row != before]
    assert changed == broken
    if kind not in ("swapped", "label"):
        assert [len(row["input_ids"]) for row in rows] == [len(row["input_ids"]) for row in clean]


def test_the_oracle_drops_the_broken_rows_and_no_others(benchmark):
    oracle = benchmark.Oracle([1, 6, 7], rows=4)
    dropped = [(b, p) for b in range(3) for p in range(4) if not oracle.decide(Row(1.0, 1, b, p))]
    assert dropped == [(0, 1), (1, 2), (1, 3)]


def test_a_row_is_lost_that_is_dropped_or_stands_in_a_skipped_batch(benchmark):
    tally = benchmark.Tally([1, 6, 7], rows=4)
    for batch, (repeats, keep) in enumerate(
        [(1, [True, False, True, True]), (0, [True] * 4), (1, [False] + [True] * 3)]
    ):
        outcome = Outcome(Observation(batch=batch, loss=1.0, progress=0.0), repeats, (1.0,))
        tally.on_outcome(None, None, None, outcome=outcome, rows=SimpleNamespace(keep=keep))
    assert tally.counts == {"broken": 3, "broken_lost": 3, "good": 9, "good_lost": 3, "skipped": 1}


def test_the_numbers_on_the_page_are_worked_out_by_hand(benchmark):
    """Two seeds: 9 of 10 broken rows are caught, 3 of 190 good ones lost, and the nll is 0.01 above the oracle's."""

    def run(arm, seed, nll, **counts):
        what = {
            "corpus": "wikitext2",
            "rows": 4,
            "batches": 25,
            "kind": "random",
            "share": 5,
            "arm": arm,
            "seed": seed,
        }
        return {
            **what,
            "nll": nll,
            "seconds": 1.0,
            "broken": 5,
            "broken_lost": 5,
            "good": 95,
            "good_lost": 0,
            **counts,
        }

    runs = [
        run("rows", 0, 3.012, broken_lost=4, good_lost=3),
        run("rows", 1, 3.108),
        run("oracle", 0, 3.0),
        run("oracle", 1, 3.1),
    ]
    page = benchmark.page({"runs": runs, "foreign": "none"})
    assert "| 5 % random tokens | rows | 0.900 (9/10) | 1.58% (3/190) |" in page
    assert "+0.0100 (-0.0154 to +0.0354), +1.0 %" in page  # t of one degree of freedom, 12.706 * 0.002
    assert "recall, up to 10 % | 0.95 | lowest of 1: 0.900, 5 % random tokens | not reached |" in page
    assert "good rows lost | at most 0.5 % | highest: 1.58%, 5 % random tokens | not reached |" in page
