"""The last loss of every row is kept by its index, and goes through checkpoints."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.data.identity import name_sources, with_rows
from abr_trainer.records.files import ROW_LOSSES_NAME, flaw_of
from abr_trainer.report.rows import ranked_rows, read_described, read_row_losses
from abr_trainer.training.ranking import RowRanking
from tests.conftest import Stream, token_rows


def noted(*batches: tuple[list[int], list[float]], rows: int = 6) -> RowRanking:
    ranking = RowRanking(rows)
    for step, (indices, losses) in enumerate(batches, start=1):
        ranking.note(step, np.array(indices), np.array(losses))
    return ranking


def same(one: RowRanking, other: RowRanking) -> bool:
    return all(getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in ("loss", "visits", "step"))


def test_the_last_loss_of_each_row_is_kept_with_its_visits():
    ranking = noted(([3, 0], [2.0, 1.0]), ([3, 5], [1.5, np.nan]), ([], []))
    assert np.array_equal(ranking.loss, np.array([1, np.nan, np.nan, 1.5, np.nan, np.nan], np.float32), equal_nan=True)
    assert ranking.visits.tolist() == [1, 0, 0, 2, 0, 1]
    assert ranking.step.tolist() == [1, 0, 0, 2, 0, 2]


def test_a_row_takes_twelve_bytes():
    ranking = RowRanking(1000)
    assert ranking.loss.nbytes + ranking.visits.nbytes + ranking.step.nbytes == 12_000


def test_what_is_no_row_of_the_training_set_is_left_out():
    ranking = noted(([-1, 2, -1], [9.0, 2.0, 9.0]))
    assert ranking.visits.tolist() == [0, 0, 1, 0, 0, 0]


def test_a_row_that_fills_up_the_last_batch_of_an_epoch_is_one_visit():
    ranking = noted(([4, 0, 4], [2.0, 1.0, 2.0]))
    assert (ranking.loss[4], ranking.visits[4]) == (2.0, 1)


def test_documents_of_one_pack_count_by_their_targets():
    ranking = RowRanking(2)
    ranking.note(1, np.array([1, 1, 1, 0]), np.array([2.0, 6.0, np.nan, 1.0]), np.array([3, 1, 0, 5]))
    assert ranking.loss.tolist() == [1.0, 3.0]  # (3 x 2 + 1 x 6) / 4
    assert ranking.visits.tolist() == [1, 1]


def test_a_resumed_ranking_is_that_of_an_unbroken_run(tmp_path):
    first, second = ([3, 0], [2.0, 1.1]), ([3, 5], [1.7, np.inf])
    noted(first).save(tmp_path)
    resumed = RowRanking(6)
    resumed.load(tmp_path)
    resumed.note(2, np.array(second[0]), np.array(second[1]))
    assert same(resumed, noted(first, second))
    assert [path.name for path in tmp_path.iterdir()] == [ROW_LOSSES_NAME]


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    noted(([3], [2.0])).save(tmp_path)
    with pytest.raises(ValueError, match=r"is of a training set of 6 rows, and this one has 1,200: resume with"):
        RowRanking(1200).load(tmp_path)


def test_a_checkpoint_without_a_ranking_is_told_and_a_damaged_one_refused(tmp_path, caplog):
    ranking = noted(([3], [2.0]))
    ranking.load(tmp_path)
    assert f"has no {ROW_LOSSES_NAME}" in caplog.text
    assert ranking.visits[3] == 1
    ranking.save(tmp_path)
    path = tmp_path / ROW_LOSSES_NAME
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"_row_losses\.npz is damaged\."):
        ranking.load(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    assert flaw_of(tmp_path) == f"{ROW_LOSSES_NAME} is damaged", "so that the checkpoint before it is taken"


def test_a_ranking_that_has_seen_nothing_says_so(caplog):
    noted(([1], [2.0])).warn_if_empty()
    assert not caplog.text
    noted(([-1], [2.0])).warn_if_empty()
    assert "--rank_rows has seen no row" in caplog.text


def test_a_stream_cannot_be_ranked(build):
    with pytest.raises(ValueError, match="--rank_rows needs a training set with a length"):
        build(data=Stream(token_rows(8)), max_steps=4, rank_rows=True)
    build(data=token_rows(8), rank_rows=True)


def test_the_rows_at_both_ends_are_described(train, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, pad_token="<|endoftext|>")
    rows = [
        {**row, "input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()} for row in token_rows(12)
    ]
    trainer = train(
        data=name_sources(with_rows(Dataset.from_list(rows)), ["notes.jsonl"]),
        rank_rows=True,
        trainer_options={"processing_class": tokenizer},
        per_device_train_batch_size=4,
    )
    assert trainer.ledger.rows_dropped == 0
    assert trainer.row_rule is None
    described = read_described(Path(trainer.args.output_dir))
    losses = read_row_losses(Path(trainer.args.output_dir))
    ranked = ranked_rows(losses, described)
    assert sorted(row.index for row in ranked) == list(range(12))
    assert [row.loss for row in ranked] == sorted((row.loss for row in ranked), reverse=True)
    for row in ranked:
        assert row.text == tokenizer.decode(rows[row.index]["input_ids"])
        assert (row.source, row.first_row) == ("notes.jsonl", row.index + 1)
    assert ranked_rows(losses, described, lowest_first=True) == ranked[::-1]


def test_the_ends_of_many_rows_are_those_of_all_rows_sorted_and_need_little_memory(tmp_path):
    ranking = RowRanking(1_500_000)
    rows = np.random.default_rng(0).integers(0, len(ranking.loss), 900_000)
    ranking.note(1, rows, np.round(np.sin(rows) * 50) + 50)  # of many equal losses, the first row is first
    ranking.note(2, np.array([7, 1_499_999]), np.array([np.nan, 0.0]))
    seen = np.flatnonzero(ranking.visits)
    order = seen[np.argsort(-np.nan_to_num(ranking.loss[seen], nan=np.inf), kind="stable")].tolist()
    tracemalloc.start()
    assert ranking.extremes(200) == order[:200] + order[-200:]
    ranking.save(tmp_path)
    ranking.load(tmp_path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 12 * len(ranking.loss), "less than the ranking itself"


def test_of_many_rows_the_ends_are_found():
    ranking = RowRanking(10)
    ranking.note(1, np.arange(9), np.array([3.0, 1.0, np.nan, 2.0, 5.0, 4.0, 0.5, 6.0, 0.1]))
    assert ranking.extremes(2) == [2, 7, 6, 8]
    assert ranking.extremes(5) == [2, 7, 4, 5, 0, 3, 1, 6, 8]
