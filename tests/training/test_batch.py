"""What is seen of a batch without training on it; `test_trainer.py` has its whole life."""

from __future__ import annotations

import torch

from abr_trainer.training.batch import Batch
from abr_trainer.training.dropped_rows import EXCERPT_TOKENS, excerpts
from abr_trainer.training.held import Call


def test_a_batch_that_has_just_begun_has_no_outcome_and_keeps_no_update_back():
    batch = Batch()
    assert batch.outcome is None
    assert not batch.update_is_withheld


def test_excerpts_are_the_first_tokens_of_each_row_without_padding():
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    long = torch.arange(2 * EXCERPT_TOKENS)[None]
    calls = [Call({"input_ids": ids, "attention_mask": mask}, (), {}), Call({"input_ids": long}, (), {})]
    assert excerpts(calls) == [[5, 6], [7, 8, 9], list(range(EXCERPT_TOKENS))]


def test_inputs_that_are_no_tokens_have_no_excerpt():
    assert excerpts([Call(torch.zeros(2, 3), (), {}), Call({"pixel_values": torch.zeros(2, 3)}, (), {})]) == []
