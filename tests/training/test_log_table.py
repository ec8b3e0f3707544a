"""The aligned lines of a run."""

from __future__ import annotations

import pytest

from abr_trainer.training.log_table import TITLES_EVERY, LogTable, Score, log_columns

NUMBERS = {
    "step": "12,345",
    "spent": "23,456.7",
    "loss": "2.115",
    "score": "99,999.99",
    "updates": "2.00",
    "skipped": "10",
    "rows_dropped": "1,234",
    "learning_rate": "1.70e-03",
    "speed": "123,456",
    "waiting": "100 %",
    "left": "12:34:56",
}


def table(width, judges_rows=True, waits=False):
    return LogTable(log_columns(Score(), 12_345, 23_456, judges_rows, waits=waits), width)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("judges_rows", [False, True])
@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_titles_and_numbers_fit_and_end_in_the_same_columns(width, judges_rows, waits):
    log = table(width, judges_rows, waits)
    titles, line = log.titles(), log.line(NUMBERS)
    assert len(line) <= len(titles) <= width or len(titles) <= len(line) <= width
    for title, number in (("step", "12,345"), ("passes", "23,456.7"), ("perplexity", "99,999.99")):
        assert titles.index(title) + len(title) == line.index(number) + len(number)
    assert ("dropped" in titles) == judges_rows
    assert ("waiting" in titles) == waits
    assert (" 100 %" in line) == waits
    assert "upd" in titles
    assert "skipped" in titles
    assert "left" in titles, "what people read first is never left out"


def test_where_there_is_room_titles_are_whole_and_where_there_is_little_some_go():
    assert table(100, judges_rows=False).titles().split("  ")[-3:] == ["learning rate", "tokens/s", "time left"]
    narrow = table(80).titles()
    assert "learning rate" not in narrow
    assert "tokens/s" not in narrow


def test_titles_come_again_every_so_often():
    log = table(100)
    due = [number for number in range(1, 2 * TITLES_EVERY + 2) if log.titles() is not None]
    assert due == [1, TITLES_EVERY + 1, 2 * TITLES_EVERY + 1]


def test_a_remark_follows_the_last_number():
    log = table(100)
    line = log.remark({"step": "36", "score": "6.17"}, "Step 36")
    assert line.endswith("6.17  Step 36")
    assert line.index("6.17") + 4 == log.line(NUMBERS).index("99,999.99") + 9
