"""Sums and means on one process; `test_distributed.py` has those over ranks."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainingArguments

from abr_trainer.training.budget import Budget
from abr_trainer.training.consensus import Consensus
from abr_trainer.training.held import Call
from abr_trainer.training.ledger import ComputeLedger
from abr_trainer.training.loss_scale import LossScale


@pytest.fixture
def consensus(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    return Consensus(args, Accelerator(cpu=True), Budget(args, ComputeLedger()))


def test_numbers_of_any_kind_are_summed_in_double_precision(consensus):
    read = consensus.begin_sum(0.1, torch.tensor(2.5), True, torch.tensor(2**40))
    assert read() == [0.1, 2.5, 1.0, 2.0**40]
    assert consensus.gather_lists([[1, 2], [3]]) == [[1, 2], [3]]


def micro_batch(targets, items):
    labels = torch.full((1, 8), -100)
    labels[0, 1 : 1 + targets] = 1  # the first label is never a target
    return Call({"input_ids": labels, "labels": labels}, (items,), {})


def test_losses_that_are_shares_of_the_batch_add_up(build, consensus):
    consensus.loss_scale = LossScale(adds_up=True)
    calls, losses = [micro_batch(3, items=4), micro_batch(1, items=4)], [torch.tensor(0.75), torch.tensor(0.5)]
    assert consensus.begin_mean(build(), calls, losses, 7, torch.tensor(2))() == (1.25, [7.0, 2.0], [], [])


def test_losses_that_are_means_of_micro_batches_are_weighted_by_their_targets(build, consensus):
    consensus.loss_scale = LossScale(adds_up=False)
    # Means of 1.0 and 2.0, which Trainer has divided by two micro-batches: (3 * 1.0 + 1 * 2.0) / 4.
    calls, losses = [micro_batch(3, None), micro_batch(1, None)], [torch.tensor(0.5), torch.tensor(1.0)]
    assert consensus.begin_mean(build(), calls, losses)().mean == 1.25


def test_the_mean_over_no_targets_is_not_a_number(build, consensus):
    consensus.loss_scale = LossScale(adds_up=False)
    mean = consensus.begin_mean(build(), [micro_batch(0, None)] * 2, [torch.tensor(0.0)] * 2)().mean
    assert math.isnan(mean)
