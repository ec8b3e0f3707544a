"""What a rule may want to know beside the loss, on logits and gradients that are written by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from abr_trainer.training.signals import accuracy_of, counting_hits, gradient_norm, summed


class Says(torch.nn.Module):
    """Predicts the tokens that it is given."""

    def forward(self, tokens):
        return SimpleNamespace(logits=torch.nn.functional.one_hot(tokens, 10).float())


def hits_on(predicted, inputs, shifts_labels):
    model, hits = Says(), []
    with counting_hits(model, inputs, shifts_labels, hits):
        model(torch.tensor([predicted]))
    model(torch.tensor([predicted]))  # no longer counted
    return [(int(right), int(targets)) for right, targets in hits]


@pytest.mark.parametrize(
    ("inputs", "shifts_labels", "expected"),
    [
        ({"labels": [1, 9, -100, 4]}, False, [(2, 3)]),
        ({"labels": [9, 1, 2, -100]}, True, [(2, 2)]),  # the output at a position is compared with the next label
        ({"shift_labels": [1, 2, 3, 7], "labels": [9, 9, 9, 9]}, True, [(3, 4)]),
        ({"labels": [1, 2, 3]}, False, []),  # no logit for each label
        ({}, True, []),
    ],
)
def test_target_tokens_predicted_right_are_counted(inputs, shifts_labels, expected):
    labels = {name: torch.tensor([values]) for name, values in inputs.items()}
    assert hits_on([1, 2, 3, 4], labels, shifts_labels) == expected


def test_hits_of_micro_batches_make_one_accuracy():
    hits = [(torch.tensor(1), torch.tensor(2)), (torch.tensor(2), torch.tensor(2))]
    assert accuracy_of(*(float(each) for each in summed(hits))) == 0.75
    assert summed([]) == []
    assert accuracy_of(0.0, 0.0) is None


def test_the_gradient_norm_is_over_all_weights_that_have_a_gradient():
    model = torch.nn.Linear(1, 1)
    frozen = torch.nn.Parameter(torch.ones(1))
    model.register_parameter("frozen", frozen)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    assert gradient_norm(model).item() == 5.0
