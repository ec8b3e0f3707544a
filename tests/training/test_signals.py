"""What a rule may want to know beside the loss, on logits and gradients that are written by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from abr_trainer.training.signals import NoAccuracy, accuracy_of, counting_hits, gradient_norm, hits_in, summed
from abr_trainer.training.targets import LabelUse

SHIFTED, AS_THEY_ARE = LabelUse(True, shifts=True, first=1), LabelUse(False, shifts=False, first=0)
BEHIND_VIRTUAL_TOKENS = LabelUse(True, shifts=True, first=0)


def logits_of(*tokens):
    return torch.nn.functional.one_hot(torch.tensor([tokens]), 10).float()


class Says(torch.nn.Module):
    """Predicts the tokens that it is given."""

    def forward(self, tokens):
        return SimpleNamespace(logits=torch.nn.functional.one_hot(tokens, 10).float())


@pytest.mark.parametrize(
    ("inputs", "use", "expected"),
    [
        ({"labels": [1, 9, -100, 4]}, AS_THEY_ARE, (2, 3)),
        ({"labels": [9, 1, 2, -100]}, SHIFTED, (2, 2)),  # the output at a position is compared with the next label
        ({"shift_labels": [1, 2, 3, 7], "labels": [9, 9, 9, 9]}, SHIFTED, (3, 4)),
        ({"labels": [2, 3, 9]}, BEHIND_VIRTUAL_TOKENS, (0, 3)),  # outputs at one virtual token and two of the text
        ({"labels": [1, 2, -100]}, BEHIND_VIRTUAL_TOKENS, (2, 2)),
        ({"labels": [2, 3]}, BEHIND_VIRTUAL_TOKENS, (2, 2)),  # the second of two virtual tokens predicts the first
    ],
)
def test_target_tokens_predicted_right_are_counted(inputs, use, expected):
    labels = {name: torch.tensor([values]) for name, values in inputs.items()}
    right, targets = hits_in({"logits": logits_of(1, 2, 3, 4)}, labels, use)
    assert (int(right), int(targets)) == expected


def test_a_fused_head_tells_its_hits_without_logits():
    head = {"is_top1": torch.tensor([[1, 0, 0]]), "label_mask": torch.tensor([[True, True, False]]), "logits": None}
    right, targets = hits_in(head, {"labels": torch.tensor([[5, 6, 7, -100]])}, SHIFTED)
    assert (int(right), int(targets)) == (1, 2)


class LigerOutput(SimpleNamespace):
    __module__ = "liger_kernel.transformers.model.output_classes"


FOUR = {"labels": torch.tensor([[1, 2, 3, 4]])}


@pytest.mark.parametrize(
    ("output", "inputs", "reason"),
    [
        (SimpleNamespace(logits=logits_of(1, 2, 3, 4)), {}, "the batches have no labels"),
        (SimpleNamespace(logits=logits_of(1, 2, 3, 4)), [1, 2], "the batches have no labels"),
        (SimpleNamespace(logits=logits_of(1)[0]), {"labels": torch.tensor([0.0])}, "numbers to be approached"),
        (SimpleNamespace(logits=logits_of(1, 2, 3)), FOUR, "(1, 3, 10) and labels of shape (1, 4)"),
        (LigerOutput(logits=None), FOUR, '"fused_linear_cross_entropy": false'),
        ((torch.tensor(1.0), logits_of(1, 2, 3, 4)), FOUR, "Switch off the fused loss"),
    ],
)
def test_an_accuracy_that_cannot_be_seen_is_refused_with_the_fix(output, inputs, reason):
    with pytest.raises(NoAccuracy) as refused:
        hits_in(output, inputs, SHIFTED)
    assert reason in str(refused.value)


def test_under_unsloth_the_fix_is_its_own(monkeypatch):
    monkeypatch.setenv("UNSLOTH_IS_PRESENT", "1")
    with pytest.raises(NoAccuracy, match="set UNSLOTH_RETURN_LOGITS=1"):
        hits_in(SimpleNamespace(logits=object()), FOUR, SHIFTED)


@pytest.mark.parametrize("compiled_in_place", [False, True])
def test_the_first_forward_that_can_tell_is_counted_and_no_other(compiled_in_place):
    model, hits = Says(), []
    if compiled_in_place:
        model.compile(backend="eager")
    with counting_hits(model, FOUR, AS_THEY_ARE, hits) as check:
        model(torch.tensor([[1, 2]]))  # of another shape
        with pytest.raises(NoAccuracy, match="looks at the token accuracy, but the model returns logits of shape"):
            check(None)
        model(torch.tensor([[1, 2, 3, 9]]))
        model(torch.tensor([[9, 9, 9, 9]]))
        assert check(None)
    model(torch.tensor([[1, 2, 3, 4]]))  # no longer counted
    assert [(int(right), int(targets)) for right, targets in hits] == [(3, 4)]


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
