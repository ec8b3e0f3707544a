"""What a pass does around Trainer's own step; `test_trainer.py` has whole passes and updates."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from abr_trainer.training.passes import before_backward, counted_once


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.tensor(3.0))


@pytest.mark.parametrize("wanted", [True, False])
def test_a_backward_is_made_only_if_its_loss_is_wanted(weight, wanted):
    accelerator, asked = Accelerator(cpu=True), []

    def wants(loss):
        asked.append(loss.item())
        return wanted

    with before_backward(accelerator, wants):
        accelerator.backward(weight * 2)
    assert asked == [6.0]
    assert weight.grad == (torch.tensor(2.0) if wanted else None)


def test_after_the_gate_backwards_are_made_unasked(weight):
    accelerator = Accelerator(cpu=True)
    with before_backward(accelerator, lambda loss: False):
        pass
    with pytest.raises(RuntimeError, match="out of memory"), before_backward(accelerator, lambda loss: False):
        raise RuntimeError("out of memory")
    accelerator.backward(weight * 2)
    assert weight.grad == 2.0
    assert "backward" not in vars(accelerator), "a bound method there would make a reference cycle"


def test_somebody_elses_backward_is_put_back(weight):
    accelerator, theirs = Accelerator(cpu=True), []
    accelerator.backward = own = lambda loss: theirs.append(loss.item())
    with before_backward(accelerator, lambda loss: loss > 1):
        accelerator.backward(weight)
        accelerator.backward(weight / 6)
    assert theirs == [3.0]
    assert accelerator.backward is own


def test_counters_of_trl_and_axolotl_are_as_they_were_before_the_pass():
    state = SimpleNamespace(tokens={"total": torch.tensor(5)}, global_step=1)
    trainer = SimpleNamespace(_metrics={"train": {"entropy": [0.5]}}, _total_train_tokens=7, forwards=1, state=state)
    with counted_once(trainer):
        trainer._metrics["train"]["entropy"].append(0.6)
        trainer._total_train_tokens += 7
        trainer.forwards += 1
        state.tokens["total"] += 5
        state.global_step += 1
    assert (trainer._metrics, trainer._total_train_tokens) == ({"train": {"entropy": [0.5]}}, 7)
    assert state.tokens == {"total": torch.tensor(5)}
    assert (trainer.forwards, state.global_step) == (2, 2)
