"""What a run says of dropped rows and skipped batches while it trains."""

from __future__ import annotations

import json
import math
from pathlib import Path

from abr_trainer.training.notices import Notices

RUN = Path("runs/my notes")
DROP = {"step": 12, "position": 3, "index": 1817, "source": "notes.jsonl", "first_row": 12, "last_row": 12}
DROP |= {"loss": 9.3123, "limit": 6.02, "targets": 127, "reason": "outlier", "input_ids": [5, 6]}
TEXT = "qx zzv\x1b[31m w\nkk " + "abc " * 40


def test_each_of_the_first_five_rows_gets_a_line_then_every_hundred():
    notices = Notices()
    said = {i: notices.note_rows(RUN, i, [DROP | {"text": TEXT}]) for i in range(1, 301)}
    assert said[1] == [
        "Dropped in batch 1: notes.jsonl, row 12; loss 9.312, limit 6.02, 127 targets; "
        r'"qx zzv\ ... abc abc".',
        "Why: abr why 'runs/my notes' 1",
    ]
    assert [i for i, lines in said.items() if lines] == [1, 2, 3, 4, 5, 6, 100, 200, 300]
    assert said[6] == ["From here on, one line for each 100 rows dropped."]
    assert said[200] == ["200 rows dropped so far, the last from batch 200. abr rows 'runs/my notes'"]


def test_many_rows_of_one_batch_are_counted_one_by_one():
    lines = Notices(rows=97).note_rows(RUN, 7, [DROP] * 205)
    assert [line.split()[0] for line in lines] == ["100", "200", "300"]
    assert len(Notices().note_rows(RUN, 7, [DROP] * 16)) == 5 + 2, "how to see why, and that fewer follow"


def test_a_skipped_batch_is_told_with_its_loss_its_limit_and_its_text():
    notices = Notices()
    notices.note_rows(RUN, 3, [DROP] * 50)
    assert notices.note_batch(RUN, 28, "outlier", 4.749, 4.6951, "= Tower =") == [
        'Batch 28 is skipped: loss 4.749, limit 4.695 (outlier); "= Tower =".',
        "Why: abr why 'runs/my notes' 28",
    ]
    assert notices.note_batch(RUN, 29, "non-finite", math.nan) == ["Batch 29 is skipped: its loss is nan."]
    assert "it has no targets (labels other than -100)." in notices.note_batch(RUN, 30, "no targets", math.nan)[0]
    assert "more than half of its rows are dropped" in notices.note_batch(RUN, 31, "rows", 2.0)[0]


def test_what_is_unknown_of_a_row_is_left_out():
    assert Notices().note_rows(Path("run"), 2, [{"step": 2, "position": 0, "loss": None, "targets": 1}]) == [
        "Dropped in batch 2: a row of unknown place; loss not finite, 1 target.",
        "Why: abr why run 2",
    ]


def test_a_text_without_spaces_is_cut_as_well():
    han = "\u6f22"
    line, _ = Notices().note_rows(RUN, 2, [DROP | {"text": han * 500}])
    assert f'"{han * 7} ... {han * 7}"' in line


def test_a_line_fits_into_a_hundred_columns():
    notices = Notices()
    for batch in range(1, 6):
        for line in notices.note_batch(None, 10_000 + batch, "outlier", 5.5083, 2.8372, "a long text " * 20):
            assert 90 < len(line) <= 100
    for line in notices.note_rows(None, 12, [DROP | {"text": TEXT}] * 5):
        assert 90 < len(line) <= 100


def test_a_resumed_run_goes_on_counting():
    notices = Notices()
    notices.note_rows(RUN, 1, [DROP] * 99)
    notices.note_batch(RUN, 1, "rows", 2.0)
    resumed = Notices()
    resumed.load_state_dict(json.loads(json.dumps(notices.state_dict())))
    assert resumed == notices
    assert resumed.note_rows(RUN, 2, [DROP])[0].startswith("100 rows dropped")
