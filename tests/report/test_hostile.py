"""Texts of data sets stay texts in all that we write: pages, Markdown, terminals, cards, YAML and CSV."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re

import pytest
import yaml
from markdown_it import MarkdownIt
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from abr_trainer.cli import rows
from abr_trainer.hub.card import write_card
from abr_trainer.records.files import PROVENANCE, RESULTS, SAMPLES_NAME, SKIPPED_NAME, SUMMARY_NAME
from abr_trainer.records.provenance import versions_and_machine
from abr_trainer.report.markdown import render_markdown
from abr_trainer.report.of_run import report_on_run
from abr_trainer.report.page import render_page
from abr_trainer.report.samples import sample_lines
from abr_trainer.report.text import escaped
from abr_trainer.report.why import explain_batch
from abr_trainer.training.notices import Notices
from tests.hostile import HOSTILE
from tests.report.dropped import drop, write_run
from tests.report.sample import hostile_report
from tests.report.test_rendering import Page

HARMLESS = {"text", "softbreak", "code_inline", "strong_open", "strong_close", "image"}
"""What may stand within a line of Markdown. The image is the picture of a figure, with a text in its place."""

MADE_BY = versions_and_machine("cpu", 1, 1)
MARKDOWN_READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def tags(html: str) -> list[str]:
    """Return the elements of a page, but for those around long words, flags and code."""
    return [tag for tag, _, _ in Page(html).elements if tag not in ("wbr", "span", "code")]


def blocks(markdown: str) -> list[tuple[str, str]]:
    """Return the blocks of a Markdown document; what is within its lines must be harmless."""
    tokens = MARKDOWN_READER.parse(markdown)
    within = {child.type for token in tokens for child in token.children or ()}
    assert within <= HARMLESS, within - HARMLESS
    images = [child.attrs["src"] for token in tokens for child in token.children or () if child.type == "image"]
    assert all(re.fullmatch(r"plots/\w+\.png", each) for each in images), images
    return [(token.type, token.tag) for token in tokens]


def in_a_run(directory, text):
    """Return a run that has met a text wherever one can be: in dropped rows, skipped batches and samples."""
    drops = [drop(2, 0, 5, 5.0, text, source=text), *(drop(3, i, i, 5.0 + i, text) for i in range(3))]
    run = write_run(directory, drops)
    (run / PROVENANCE).write_text(json.dumps({**MADE_BY, "argv": ["abr", "train", "--prompt", text], "arguments": {}}))
    (run / SKIPPED_NAME).write_text(json.dumps({"step": 3, "input_ids": [[0, 0], [0]]}) + "\n")
    with contextlib.suppress(TypeError):  # a tokenizer knows no half characters
        Tokenizer(WordLevel({text: 0, "": 1}, unk_token="")).save(str(run / "tokenizer.json"))
    sample = {"epoch": 0.0, "sample": 1, "prompt": text, "continuation": text, "reference": text, "seconds": 0.1}
    (run / SAMPLES_NAME).write_text("".join(json.dumps({"step": step, **sample}) + "\n" for step in (0, 6)))
    return run


def test_no_text_is_markup_in_a_report():
    expected = tags(render_page(hostile_report("word")))
    outline = blocks(render_markdown(hostile_report("word")))
    for text in filter(str.strip, HOSTILE):  # without a text there is less to show
        page, markdown = render_page(hostile_report(text)), render_markdown(hostile_report(text))
        assert tags(page) == expected, repr(text)
        if len(text.splitlines()) == 1:
            assert blocks(markdown) == outline, repr(text)
        assert escaped(markdown) == markdown, repr(text)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_no_text_is_markup_in_what_a_run_leaves(tmp_path, text):
    run, plain_run = in_a_run(tmp_path / "run", text), in_a_run(tmp_path / "plain", "word")
    report, plain = report_on_run(run), report_on_run(plain_run)
    markdown = render_markdown(report)
    assert escaped(markdown) == markdown
    if text.strip():  # else there is less to show
        assert tags(render_page(report)) == tags(render_page(plain))
        assert blocks(markdown) == blocks(render_markdown(plain))


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_no_text_acts_on_a_terminal_or_a_spreadsheet(tmp_path, capsys, text):
    run = in_a_run(tmp_path / "run", text)
    (told,) = [list(Notices().note_rows(run, 2, [drop(2, 0, 5, 5.0, text, source=text)]))[:1]]
    said = [*told, *Notices().note_batch(run, 3, "outlier", 5.0, 4.0, text)[:1]]
    said += [*sample_lines(run, 100), *explain_batch(run, 3)]
    rows.main([str(run)])
    said += capsys.readouterr().out.split("\n")
    for line in said:
        assert escaped(line) == line
        assert "\n" not in line
    rows.main([str(run), "--csv"])
    written = capsys.readouterr().out
    assert escaped(written) == written
    cells = [cell for row in csv.DictReader(io.StringIO(written)) for cell in (row["source"], row["text"], row["run"])]
    assert not any(cell.lstrip().startswith(("=", "+", "-", "@")) for cell in cells)
    rows.main([str(run), "--json"])
    assert json.loads(capsys.readouterr().out)[-1]["text"] == text


@pytest.mark.parametrize("text", [text for text in HOSTILE if text.strip()], ids=ascii)
def test_no_text_is_markup_in_a_card_or_in_its_header(tmp_path, text):
    def card(text: str) -> tuple[str, str]:
        folder = tmp_path / f"of {len(text)} {text == 'word'}"
        folder.mkdir()
        labels = [text, "other"]
        arguments = {"prompt_text": "Is {sentence} so?", "sentence_columns": [text], "classes": labels}
        arguments |= {"train_file": f"data/{text.replace('/', '|')}", "dataset_config_name": text}
        summary = {"model": "LlamaForSequenceClassification", "repeat_scheduler": text, "arguments": {"optim": text}}
        for name, value in (
            (SUMMARY_NAME, summary),
            (RESULTS, {"eval_accuracy": 0.5}),
            (PROVENANCE, {"arguments": arguments, "argv": ["abr", "classify", "--prompt", text]}),
            ("config.json", {"id2label": dict(enumerate(labels))}),
            (
                "adapter_config.json",
                {"peft_type": "LORA", "r": 2, "target_modules": [text], "base_model_name_or_path": text},
            ),
        ):
            (folder / name).write_text(json.dumps(value))
        whole = write_card(folder, folder, "me/mine", None, None)
        _, header, body = whole.split("---\n", 2)
        return header, body

    (header, body), (plain_header, plain_body) = card(text), card("word")
    found, expected = yaml.safe_load(header), yaml.safe_load(plain_header)
    assert found.keys() == expected.keys()
    assert {**found, "model-index": 0} == {**expected, "model-index": 0}
    assert [token for token in blocks_of_card(body) if token[0] != "softbreak"] == blocks_of_card(plain_body)
    assert escaped(body) == body


def blocks_of_card(body):
    tokens = MARKDOWN_READER.parse(body)
    within = {child.type for token in tokens for child in token.children or ()}
    assert within <= HARMLESS | {"link_open", "link_close"}, within
    return [(token.type, token.tag) for token in tokens]
