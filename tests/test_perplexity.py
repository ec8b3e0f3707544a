"""Token-exact perplexity against a few lines of arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from abr_trainer.perplexity import TokenPerplexity, causal_nll
from tests.conftest import broken_row, tiny_llama, token_rows


def ragged_rows():
    """Rows of 12 tokens, of which 11, 8, 5, 2 are targets: what padding does to a data set."""
    rows = token_rows(4)
    for row, padded in zip(rows, (0, 3, 6, 9), strict=True):
        row["labels"] = row["labels"].clone()
        row["labels"][12 - padded :] = -100
    return rows


def expected_perplexity(model, rows):
    """exp(sum of nll / number of targets), token by token in Python floats."""
    nll, targets = 0.0, 0
    for row in rows:
        logits = model(row["input_ids"][None]).logits[0].double()
        for position, label in enumerate(row["labels"][1:].tolist()):
            if label != -100:
                nll -= math.log(
                    math.exp(logits[position, label]) / sum(math.exp(x) for x in logits[position].tolist())
                )
                targets += 1
    return math.exp(nll / targets), targets


@torch.no_grad()
def test_nll_of_each_row_is_summed_over_its_targets():
    model, rows = tiny_llama().eval(), ragged_rows()
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    total = TokenPerplexity()
    total.add(*causal_nll(model(batch["input_ids"]).logits, batch["labels"]))
    expected, targets = expected_perplexity(model, rows)
    assert targets == 11 + 8 + 5 + 2
    assert total.tokens == targets
    assert total.perplexity == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_evaluate_reports_it_whatever_the_batch_size(build, batch_size):
    rows = ragged_rows()
    trainer = build(per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate(rows)
    with torch.no_grad():
        expected, targets = expected_perplexity(trainer.model.eval(), rows)
    assert metrics["eval_perplexity"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval_target_tokens"] == targets
    assert trainer.state.log_history[-1]["eval_perplexity"] == metrics["eval_perplexity"]


def test_a_row_without_targets_changes_nothing(build):
    rows = token_rows(3)
    trainer = build(per_device_eval_batch_size=1)
    plain = trainer.evaluate(rows)["eval_perplexity"]
    assert trainer.evaluate([*rows, broken_row(rows[0])])["eval_perplexity"] == plain


def test_a_likelihood_that_is_not_finite_is_counted_and_not_dropped(build, caplog):
    rows = token_rows(5)
    used = {token for row in rows[1:] for token in row["input_ids"].tolist()}
    rows[0]["input_ids"] = rows[0]["labels"] = torch.tensor([next(t for t in range(64) if t not in used)] * 12)
    trainer = build(model=tiny_llama(tie_word_embeddings=False), per_device_eval_batch_size=2)
    assert "eval_non_finite_rows" not in trainer.evaluate(rows)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[rows[0]["input_ids"][0]] = math.inf
    metrics = trainer.evaluate(rows)
    assert math.isnan(metrics["eval_perplexity"])
    assert metrics["eval_non_finite_rows"] == 1
    assert "1 of 5 rows of the eval set have a likelihood that is not finite" in caplog.text


@torch.no_grad()
def test_positions_before_the_labels_do_not_count():
    # Prompt tuning puts virtual tokens before the text: their logits have no labels.
    model, row = tiny_llama().eval(), token_rows(1)[0]
    logits = model(row["input_ids"][None]).logits
    plain = causal_nll(logits, row["labels"][None])
    prompted = causal_nll(torch.cat([torch.randn(1, 3, 64), logits], dim=1), row["labels"][None])
    assert torch.equal(plain[0], prompted[0])


def test_predict_reports_it_too_and_returns_the_logits_as_before(build):
    rows = token_rows(3)
    output = build().predict(rows)
    assert output.predictions.shape == (3, 12, 64)
    assert output.metrics["test_perplexity"] > 1
