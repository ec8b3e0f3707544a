"""What a run begins with."""

from __future__ import annotations

import pytest
import torch

from abr_trainer.schedulers import ConstantScheduler
from abr_trainer.training.primer import Primer
from tests.conftest import token_rows


@pytest.mark.parametrize(
    ("rows", "batches", "message"),
    [
        (8, 0, "A primer needs --primer_batches: how many batches of it to train on."),
        (5, 3, "The primer has 5 blocks; --primer_batches 3 needs 6. Give a longer --primer_file or ask for fewer"),
    ],
)
def test_a_primer_that_cannot_be_trained_on_is_refused(rows, batches, message):
    with pytest.raises(ValueError, match=message):
        Primer(token_rows(rows), batches, rows_in_batch=2).check()


def test_a_primer_may_be_as_long_as_its_batches():
    Primer(token_rows(6), batches=3, rows_in_batch=2).check()


def test_without_a_primer_no_batches_come_first(build):
    primer = Primer.of(build(repeat_scheduler=ConstantScheduler(), primer_batches=3))
    assert (primer.batches, primer.rows) == (0, 0)
    primer.check()


def test_the_epoch_of_a_primer_runs_over_its_first_rows_in_order(build):
    rows = token_rows(10, seed=9)
    trainer = build(
        repeat_scheduler=ConstantScheduler(),
        primer_batches=2,
        gradient_accumulation_steps=2,
        trainer_options={"primer_dataset": rows},
    )
    epoch = Primer.of(trainer).epoch(trainer)
    assert (epoch["num_update_steps_per_epoch"], epoch["steps_in_epoch"]) == (2, 4)
    given = [row for batch in epoch["train_dataloader"] for row in batch["input_ids"]]
    assert torch.equal(torch.stack(given), torch.stack([row["input_ids"] for row in rows[:8]]))
