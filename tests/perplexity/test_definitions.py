"""Each named perplexity against a few lines of its own, or the package that it comes from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from abr_trainer.data.demo import DEMO_MODEL, demo_texts
from abr_trainer.perplexity.definitions import DEFINITIONS, Text, detokenized, find_definition, pages_of
from abr_trainer.perplexity.measurement import cut_windows, numbers_of
from abr_trainer.perplexity.windows import window_nlls
from tests.conftest import QUIET, SHARED, model_for, tokenizer_that_adds

pytestmark = pytest.mark.slow

LENGTH = 48
WIKITEXT = [
    " = One river = \n",
    " \n",
    " The river ' Ems ' was ( in 1 @,@ 914 ) dry ; it 's 3 @.@ 5 km long . \n",
    " = = Use = = \n",
    " none \n",
    " = Two = \n",
    "\n",
    " Old @-@ fashioned . \n",
]


@pytest.fixture(scope="module", params=["plain", "bos", "eos", "both"])
def tokenizer(request):
    """That of the demo, whose only special token ends a text; and such as have two, and add them by themselves."""
    if request.param == "plain":
        return AutoTokenizer.from_pretrained(DEMO_MODEL)
    return tokenizer_that_adds(request.param)


@pytest.fixture(scope="module")
def model(tokenizer):
    return model_for(tokenizer)


@pytest.fixture(scope="module")
def documents(tokenizer):
    return Text(demo_texts("test")[:12], rows_are_lines=False, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def lines(tokenizer):
    return Text([*WIKITEXT, *(text + "\n" for text in demo_texts("test")[:8])], True, tokenizer)


def measured(name, text, model, length=LENGTH, stride=LENGTH, batch_size=5):
    definition = find_definition(name)
    windows = cut_windows(definition, text, length, stride, None, "the text")
    numbers, non_finite = numbers_of(definition, text, windows, window_nlls(model, windows, batch_size))
    assert not non_finite
    return numbers


@torch.no_grad()
def log_likelihoods(model, ids):
    """The log-likelihood of each token but the first, in float64."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return torch.log_softmax(logits, dim=-1)[range(len(ids) - 1), ids[1:]]


def begin_of_text(tokenizer):
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def joined(tokenizer, rows, between):
    return tokenizer(between.join(rows))["input_ids"]


@pytest.mark.parametrize("stride", [48, 31, 7])
def test_token_scores_each_token_once_with_all_the_context_of_its_window(documents, model, tokenizer, stride):
    ids = [
        x
        for row in documents.rows
        for x in (*tokenizer(row, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    ]
    nll, count, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + LENGTH]
        new = [i for i in range(1, len(window)) if begin + i >= done]
        scores = log_likelihoods(model, window) if len(window) > 1 else []
        nll -= sum(float(scores[i - 1]) for i in new)
        count += len(new)
        done = begin + len(window)
        if done == len(ids):
            break
    assert count == (len(ids) - 1 if stride < LENGTH else len(ids) - math.ceil(len(ids) / LENGTH))
    assert measured("token", documents, model, stride=stride)["perplexity"] == pytest.approx(
        math.exp(nll / count), rel=1e-6
    )


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_token_does_not_depend_on_the_batch_size(documents, model, batch_size):
    whole = measured("token", documents, model, batch_size=3)["perplexity"]
    assert measured("token", documents, model, batch_size=batch_size)["perplexity"] == pytest.approx(whole, rel=1e-7)


def test_trainer_is_exp_of_the_eval_loss_of_trainer(documents, model, tmp_path):
    ids = documents.trained
    blocks = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
    args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, **QUIET)
    rows = Dataset.from_dict({"input_ids": blocks, "labels": blocks})
    stock = Trainer(model, args, eval_dataset=rows, data_collator=default_data_collator).evaluate()
    assert measured("trainer", documents, model)["perplexity"] == pytest.approx(math.exp(stock["eval_loss"]), rel=1e-6)


@pytest.mark.parametrize("stride", [48, 20])
def test_hf_stride_is_the_loop_of_the_documentation(lines, model, tokenizer, stride):
    # Its loss is a mean over the labels that are left after the model has shifted them; its weights are not.
    ids = torch.tensor([joined(tokenizer, [row if row.strip() else "" for row in lines.rows], "\n\n")])
    size, before, total, count = ids.shape[1], 0, 0.0, 0
    for begin in range(0, size, stride):
        end = min(begin + LENGTH, size)
        labels = ids[:, begin:end].clone()
        labels[:, : before - end] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss
        weight = int((labels != -100).sum()) - 1
        if weight:
            total, count = total + float(loss) * weight, count + weight
        before = end
        if end == size:
            break
    assert measured("hf-stride", lines, model, stride=stride)["perplexity"] == pytest.approx(
        math.exp(total / count), rel=1e-6
    )


def test_wanda_is_the_mean_over_whole_windows(lines, documents, model, tokenizer):
    for text, between in ((lines, "\n\n"), (documents, " ")):
        ids = joined(tokenizer, [row if row.strip() else "" for row in text.rows], between)
        means = [-log_likelihoods(model, ids[i * LENGTH : (i + 1) * LENGTH]).mean() for i in range(len(ids) // LENGTH)]
        expected = math.exp(float(sum(means) * LENGTH) / (len(means) * LENGTH))
        assert measured("wanda", text, model)["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_wanda_lora_counts_the_tail_as_a_whole_window(lines, model, tokenizer):
    ids = joined(tokenizer, [row if row.strip() else "" for row in lines.rows], "\n\n")
    assert len(ids) % LENGTH > 1
    means = [-log_likelihoods(model, ids[i : i + LENGTH]).mean() for i in range(0, len(ids), LENGTH)]
    expected = math.exp(float(sum(means)) / len(means))
    assert measured("wanda-lora", lines, model)["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_of_c4_the_first_documents_are_measured(model, tokenizer):
    rows = [f"Item {index}." for index in range(1200)]
    text = Text(rows, False, tokenizer, is_c4=True)
    few, many = (list(DEFINITIONS["wanda"].windows(text, length, length)) for length in (64, 8))
    first = joined(tokenizer, rows[:1100], " ")
    assert [x for window in few for x in window.ids] == first[: len(first) // 64 * 64]
    assert len(many) == 256
    assert [x for window in many for x in window.ids] == first[: 256 * 8]
    others = DEFINITIONS["wanda"].windows(Text(rows, False, tokenizer), 64, 64)
    assert len(list(others)) == len(joined(tokenizer, rows, " ")) // 64, "all of what is not C4"


def test_a_text_of_ones_own_is_taken_as_it_is(tokenizer):
    whole = "The cat found\n\na spoon.\n \nIt was old.\n"
    text = Text(whole.splitlines(keepends=True), True, tokenizer)
    assert text.joined("\n\n").tolist() == tokenizer(whole)["input_ids"]
    assert text.documents == [(whole, whole)]


def test_pages_are_detokenized_also_where_each_is_a_row(tokenizer):
    page = "".join(WIKITEXT[:5])
    assert Text([page, "A , b"], False, tokenizer).documents == [
        (page, detokenized(page)),
        ("A , b", "A , b"),
    ]


def test_evaluate_is_the_mean_of_the_perplexities_of_texts(documents, model, tokenizer):
    each = []
    for row in documents.rows:
        ids = [begin_of_text(tokenizer), *tokenizer(row, add_special_tokens=False)["input_ids"]][:LENGTH]
        each.append(math.exp(-float(log_likelihoods(model, ids).mean())))
    found = measured("evaluate", documents, model)["perplexity"]
    assert found == pytest.approx(np.mean(each), rel=1e-6)
    assert found > measured("token", documents, model)["perplexity"]


def test_lm_eval_is_the_likelihood_of_each_document_for_each_word(lines, model, tokenizer):
    nll = words = size = 0.0
    pages = pages_of(lines.rows)
    assert len(pages) == 2
    for page in pages:
        ids = tokenizer(detokenized(page), add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), LENGTH):  # each window of as many inputs as possible
            end = min(start + LENGTH, len(ids))
            seen = ids[max(0, end - LENGTH - 1) : end] if start else [begin_of_text(tokenizer), *ids[:end]]
            nll -= float(log_likelihoods(model, seen)[start - end :].sum())
        words += len(page.split()) + (page[0] == " ") + (page[-1] == " ")  # as a split at white space counts them
        size += len(page.encode())
    found = measured("lm-eval", lines, model)
    assert found["perplexity"] == pytest.approx(math.exp(nll / words), rel=1e-6)
    assert found["byte_perplexity"] == pytest.approx(math.exp(nll / size), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nll / size / math.log(2), rel=1e-6)


def test_lm_eval_agrees_with_lm_evaluation_harness(lines, model, tokenizer):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="the extra `reference` is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.tasks.wikitext import preprocess_wikitext as task

    pages = [{"page": page} for page in pages_of(lines.rows)]
    texts = [task.wikitext_detokenizer(page) for page in pages]
    harness = huggingface.HFLM(
        model, tokenizer=tokenizer, max_length=LENGTH, batch_size=3, device="cpu", add_bos_token=False
    )
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    scores = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    results = [task.process_results(page, (score,)) for page, score in zip(pages, scores, strict=True)]
    totals = [sum(column) for column in zip(*(each["word_perplexity"] for each in results), strict=True)]
    sizes = [sum(column) for column in zip(*(each["byte_perplexity"] for each in results), strict=True)]
    found = measured("lm-eval", lines, model)
    assert found["perplexity"] == pytest.approx(math.exp(-totals[0] / totals[1]), rel=1e-6)
    assert found["byte_perplexity"] == pytest.approx(math.exp(-sizes[0] / sizes[1]), rel=1e-6)


def test_pages_and_their_spaces_are_those_of_lm_evaluation_harness():
    task = pytest.importorskip(
        "lm_eval.tasks.wikitext.preprocess_wikitext", reason="the extra `reference` is not installed"
    )
    corpus = SHARED / "data" / "wikitext2" / "wiki.test.raw"
    if not corpus.exists():
        pytest.skip("WikiText-2 is not beside the project")
    pages = pages_of(corpus.read_text(encoding="utf-8").splitlines(keepends=True))
    assert len(pages) == 62
    assert [detokenized(page) for page in pages] == [task.wikitext_detokenizer({"page": page}) for page in pages]


def test_a_window_that_is_not_finite_is_named_and_never_dropped(documents, model):
    for name in ("token", "lm-eval"):
        definition = DEFINITIONS[name]
        windows = cut_windows(definition, documents, LENGTH, LENGTH, None, "the text")
        nlls = window_nlls(model, windows, 8)
        numbers, non_finite = numbers_of(definition, documents, windows, [nlls[0], math.inf, *nlls[2:]])
        assert non_finite == [1]
        assert math.isnan(numbers["perplexity"])
        lost = windows[1].document
        others = [i for i in range(len(windows)) if i != 1 and (lost is None or windows[i].document != lost)]
        kept = definition.numbers(documents, [windows[i] for i in others], [nlls[i] for i in others])
        assert numbers["perplexity_without_them"] == kept["perplexity"]


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown --definition 'hf_stride'. Did you mean 'hf-stride'\?"):
        find_definition("hf_stride")
