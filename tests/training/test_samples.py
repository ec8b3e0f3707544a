"""Samples of what a model writes in the course of a run: what is kept and shown, and that nothing else changes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.cells import cell_len
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import run_clm_abr
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.data.prompts import Prompt, prompts_in
from abr_trainer.hub.repository import Target, stage
from abr_trainer.records.errors import BadRow
from abr_trainer.records.files import SAMPLES_NAME, read_lines
from abr_trainer.records.flags import complete_flags
from abr_trainer.report.figure import Report
from abr_trainer.report.markdown import render_markdown
from abr_trainer.report.of_run import report_on_run
from abr_trainer.report.page import render_page
from abr_trainer.report.samples import read_samples, sample_lines, sample_sections
from abr_trainer.report.text import escaped
from abr_trainer.training.generation import continue_prompts
from abr_trainer.training.samples import GenerationArguments, SampleCallback, are_sampled, as_markdown, follow_text
from tests.conftest import RUN, Stream, token_rows, weights
from tests.report.dropped import HOSTILE_TEXT

pytestmark = pytest.mark.slow

TOKENIZER = AutoTokenizer.from_pretrained(DEMO_MODEL)
EVALUATED = {"eval_strategy": "epoch", "num_train_epochs": 3, "eval_on_start": True}
ROWS = [{"input_ids": row["input_ids"] + 4, "labels": row["labels"] + 4} for row in token_rows(12)]
HELD_OUT = [{"input_ids": row["input_ids"] + 4, "labels": row["labels"] + 4} for row in token_rows(5, seed=9)]


def adapted():
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", lora_dropout=0.2))


def sampled(build, resume_from_checkpoint=None, count=2, held_out=HELD_OUT, change=None, **options):
    own = {"processing_class": TOKENIZER, "eval_dataset": held_out, "data_collator": default_data_collator}
    given = {**EVALUATED, "model": adapted(), "data": ROWS, "trainer_options": own, **options}
    trainer = build(**given)
    if change is not None:
        change(trainer)
    if count:
        trainer.add_callback(SampleCallback(trainer, count))
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


def lines_of(trainer):
    return list(read_lines(Path(trainer.args.output_dir, SAMPLES_NAME)))


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"eval_on_start": False}, {"bf16": True}])
def test_weights_and_log_are_those_of_a_run_without_samples_to_the_last_bit(build, options):
    options = {"train_sampling_strategy": "random", **options}
    own, without = sampled(build, **options), sampled(build, count=0, **options)
    assert torch.equal(weights(own.model), weights(without.model))
    timed = ("runtime", "per_second", "seconds")
    logs, others = (
        [{name: value for name, value in entry.items() if not name.endswith(timed)} for entry in each]
        for each in (own.state.log_history, without.state.log_history)
    )
    assert logs == others
    assert own.ledger.passes == without.ledger.passes
    assert len(lines_of(own)) == 8


@pytest.mark.parametrize("starts", [True, False])
def test_there_are_samples_before_training_at_each_evaluation_and_at_the_end_once_each(build, starts):
    trainer = sampled(build, eval_on_start=starts)
    lines = lines_of(trainer)
    assert [(line["step"], line["sample"]) for line in lines] == [(s, n) for s in (0, 6, 12, 18) for n in (1, 2)]
    prompts = [Prompt(HELD_OUT[i]["input_ids"][:6].tolist(), "", "", 6) for i in (0, 2)]  # spread over five rows
    now = continue_prompts(trainer.model, TOKENIZER, prompts, 8)
    before = continue_prompts(adapted(), TOKENIZER, prompts, 8)
    assert [line["continuation"] for line in lines[:2]] == list(before.values())
    assert [line["continuation"] for line in lines[-2:]] == list(now.values())
    assert now != before
    for line, row in zip(lines[:2], (HELD_OUT[0], HELD_OUT[2]), strict=True):
        assert line["prompt"] + line["reference"] == TOKENIZER.decode(row["input_ids"].tolist())


def test_without_evaluations_there_are_samples_before_and_after(build):
    trainer = sampled(build, eval_strategy="no", eval_on_start=False)
    assert [line["step"] for line in lines_of(trainer)] == [0, 0, 18, 18]


def test_a_resumed_run_goes_on_without_gaps_and_doubles(build):
    whole = sampled(build, save_strategy="epoch")
    expected = [{**line, "seconds": 0} for line in lines_of(whole)]
    path = Path(whole.args.output_dir, SAMPLES_NAME)
    with path.open("a") as file:
        file.write('{"step": 18, "sam')  # a kill cuts a line
    again = sampled(build, f"{whole.args.output_dir}/checkpoint-12", save_strategy="epoch")
    assert [{**line, "seconds": 0} for line in lines_of(again)] == expected
    sampled(build, f"{whole.args.output_dir}/checkpoint-18", save_strategy="epoch")  # nothing is left to train
    assert [{**line, "seconds": 0} for line in lines_of(again)] == expected


def test_the_last_lines_are_of_the_model_that_was_kept(build):
    options = {"save_strategy": "epoch", "load_best_model_at_end": True, "learning_rate": 0.3}
    trainer = sampled(build, metric_for_best_model="perplexity", greater_is_better=True, **options)
    trainer.evaluate()
    best = trainer.state.best_global_step
    assert 0 < best < 18
    lines = lines_of(trainer)
    assert [line["step"] for line in lines[::2]] == [0, 6, 12, 18, best]
    prompts = [Prompt(HELD_OUT[i]["input_ids"][:6].tolist(), "", "", 6) for i in (0, 2)]
    kept = continue_prompts(trainer.model, TOKENIZER, prompts, 8)
    assert [line["continuation"] for line in lines[-2:]] == list(kept.values())
    directory, said = Path(trainer.args.output_dir), f"The model that was kept, after batch {best}"
    assert "The model that was kept" not in page_of(directory), "the run is not finished"
    trainer.save_state()
    assert said in page_of(directory)
    again = sampled(build, f"{directory}/checkpoint-{best}", metric_for_best_model="perplexity", **options)
    assert again.state.global_step == 18
    lines = lines_of(again)
    assert [line["step"] for line in lines if line["step"] > best][::2] == list(range(best + 6, 19, 6))
    assert all(lines.count(line) <= 2 for line in lines), "none are added to those that stood there"


def page_of(directory):
    return render_markdown(Report("run", (), tuple(sample_sections(directory))))


def test_a_model_that_cannot_write_costs_the_samples_and_not_the_run(build, caplog, monkeypatch):
    def break_generation(trainer):
        monkeypatch.setattr(type(trainer.model.get_base_model()), "generate", None)

    trainer = sampled(build, change=break_generation)
    assert caplog.text.count("No samples any more: the model cannot continue the prompts") == 1
    assert trainer.state.global_step == 18
    assert lines_of(trainer) == []


def test_a_stream_gives_its_first_rows_and_a_plain_trainer_can_be_sampled(build):
    stream = Stream(HELD_OUT)
    trainer = sampled(build, held_out=stream, trainer_cls=Trainer, config_cls=TrainingArguments)
    assert [line["step"] for line in lines_of(trainer)[::2]] == [0, 6, 12, 18]
    firsts = [TOKENIZER.decode(row["input_ids"][:6].tolist()) for row in HELD_OUT[:2]]
    assert [line["prompt"] for line in lines_of(trainer)[:2]] == firsts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_dataset": None}, "no `eval_dataset`"),
        ({"processing_class": None}, "needs a tokenizer"),
        ({"eval_dataset": [{"input_ids": torch.tensor([5]), "labels": torch.tensor([5])}]}, "nothing to continue"),
    ],
)
def test_a_trainer_that_has_nothing_to_sample_is_refused(build, options, message):
    own = {"processing_class": TOKENIZER, "eval_dataset": HELD_OUT, **options}
    trainer = build(model=adapted(), data=ROWS, trainer_options=own)
    with pytest.raises(ValueError, match=message):
        SampleCallback(trainer)


# ---- From the command line ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run as people start it, and what it printed."""
    directory = tmp_path_factory.mktemp("samples") / "run"
    flags = ["--report_to", "tensorboard", "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "3"]
    flags += ["--sample_prompts", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        shown = io.StringIO()
        patch.setattr("sys.stdout", shown)
        run_clm_abr.main([*RUN, *flags, "--output_dir", str(directory)])
    return directory, shown.getvalue()


def test_the_end_of_a_run_shows_three_samples_in_thirteen_lines(finished):
    directory, shown = finished
    lines = shown.splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("samples "))
    told = lines[begin:]
    assert len(told) == 13
    assert max(map(len, told)) <= 80
    assert [line[:12].strip() for line in told[1:5]] == ["1 prompt", "before", "after", "in text"]
    samples = read_samples(directory)
    assert [line["step"] for line in samples[1]] == [0, 1, 2, 3]
    for line, text in zip(told[2:5], ("continuation", "continuation", "reference"), strict=True):
        kept = samples[1][0 if "before" in line else -1][text]
        assert " ".join(kept.split()).startswith(line[12:].removesuffix("...").strip())


def test_tensorboard_has_a_text_for_each_prompt_and_each_evaluation(finished):
    directory, _ = finished
    [logs] = (directory / "runs").iterdir()
    found = EventAccumulator(str(logs), size_guidance={"tensors": 0}).Reload()
    for number in (1, 2, 3):
        events = found.Tensors(f"samples/{number}/text_summary")
        assert [event.step for event in events] == [0, 1, 2, 3]
        text = events[-1].tensor_proto.string_val[0].decode()
        assert text == as_markdown(read_samples(directory)[number][-1])


def test_the_page_of_a_run_shows_samples(finished):
    directory, _ = finished
    page = render_page(report_on_run(directory))
    assert "Samples (3)" in page
    for said in ("Prompt 1", "Before training", "The model that was kept, after batch 3", "In the text"):
        assert f">{said}<" in page
    assert page.count("After batch 1") == 3


def test_no_push_takes_samples_along(finished):
    directory, _ = finished
    staged = stage(directory, Target("me/run"))
    texts = [line["reference"].strip() for lines in read_samples(directory).values() for line in lines]
    names = [path.name for path in staged.rglob("*")]
    assert "adapter_model.safetensors" in names
    assert not any(name.startswith(("_", "events.")) for name in names)
    assert not [text for path in staged.rglob("*.json*") for text in texts if text and text in path.read_text()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--do_train", "--sample_prompts", "3"], "--sample_prompts needs --do_train and --do_eval"),
        (["--do_eval", "--sample_prompts", "1"], "--sample_prompts needs --do_train and --do_eval"),
        (["--do_train", "--do_eval", "--sample_prompts", "-1"], "--sample_prompts must be at least 0, got -1."),
        (["--do_train", "--do_eval", "--generation_metrics", "blue"], "invalid choice: 'blue'"),
    ],
)
def test_samples_that_cannot_be_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(run_clm_abr, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match=re.escape(message)) as caught:
        run_clm_abr.main(["--use_cpu", *flags, "--output_dir", str(tmp_path / "run")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_may_have_none_and_runs_of_a_comparison_have_none(tmp_path):
    run_clm_abr.main([*RUN, "--max_steps", "1", "--sample_prompts", "0", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run" / SAMPLES_NAME).exists()
    flags = complete_flags(["--max_passes", "9"], "passes", 2)
    assert flags[flags.index("--sample_prompts") + 1] == "0"
    assert complete_flags(["--max_passes", "9", "--sample_prompts", "2"], "passes", 2).count("--sample_prompts") == 1


def test_a_run_without_evaluation_has_none_and_says_nothing(tmp_path, capsys):
    flags = [flag for flag in RUN[:-2] if flag != "--do_eval"]
    run_clm_abr.main([*flags, "--max_steps", "1", "--output_dir", str(tmp_path / "run")])
    assert "\nsamples " not in capsys.readouterr().out
    assert not (tmp_path / "run" / SAMPLES_NAME).exists()


def test_a_run_that_goes_back_without_samples_keeps_none_of_later_batches(tmp_path, capsys):
    flags = [*RUN, "--save_strategy", "steps", "--save_steps", "1", "--output_dir", str(tmp_path / "run")]
    run_clm_abr.main([*flags, "--max_steps", "3", "--sample_prompts", "1"])
    assert "\nsamples " in capsys.readouterr().out
    resumed = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-1")]
    run_clm_abr.main([*flags, "--max_steps", "2", *resumed])
    assert "\nsamples " not in capsys.readouterr().out
    assert [line["step"] for line in read_samples(tmp_path / "run")[1]] == [0]
    assert "The model that was kept" not in page_of(tmp_path / "run")


def test_a_trainer_whose_default_samples_cannot_be_is_warned_and_trains(build, caplog):
    own = {"processing_class": TOKENIZER, "eval_dataset": HELD_OUT}
    trainer = build(model=adapted(), data=ROWS, trainer_options=own, do_train=True, do_eval=True)
    nothing, refusal = "the evaluation set has nothing to continue.", "row 3 is not accepted by the chat template: no"

    def refuse(split, count):
        raise BadRow(refusal)

    for prompts, reason in ((lambda split, count: [], nothing), (refuse, refusal)):
        caplog.clear()
        unasked, asked = GenerationArguments(), GenerationArguments(sample_prompts=2)
        unasked.fit(trainer.args)
        follow_text(trainer, unasked, prompts)
        assert [record.getMessage() for record in caplog.records] == [f"No samples: {reason}"]
        assert not are_sampled(trainer)
        with pytest.raises(ValueError, match=reason):
            follow_text(trainer, asked, prompts)
    follow_text(trainer, unasked, lambda split, count: prompts_in(HELD_OUT, TOKENIZER, count))
    assert are_sampled(trainer)


def test_three_samples_of_a_quick_run_take_less_than_a_few_seconds(finished):
    directory, _ = finished
    assert sum(line["seconds"] for lines in read_samples(directory).values() for line in lines) < 10


# ---- Hostile texts ----

WIDE = "\u4e2d\u6587" * 60
HOSTILE = [
    HOSTILE_TEXT,
    WIDE,
    "",
    "\ud800 half",
    "    indented\n\n```\n<script>alert(1)</script>",
    "| a | b |\n---\n# x",
]


def write_samples(directory, texts):
    directory.mkdir(exist_ok=True)
    lines = [
        {"step": step, "epoch": 0.0, "sample": number, "prompt": text, "continuation": text, "reference": text}
        for step in (0, 5)
        for number, text in enumerate(texts, 1)
    ]
    content = "".join(json.dumps({**line, "seconds": 0.1}) + "\n" for line in lines)
    (directory / SAMPLES_NAME).write_text(content)
    return directory


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("width", [40, 100])
def test_no_text_harms_a_terminal(tmp_path, text, width):
    lines = sample_lines(write_samples(tmp_path / "run", [text] * 5), width)
    assert len(lines) == 13, "three of them are shown"
    assert all(escaped(line) == line and "\n" not in line for line in lines)
    assert all(cell_len(line) <= width for line in lines)
    assert all(line[12:].strip() for line in lines)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_narrow_terminal_gets_lines_too(tmp_path, text):
    directory = write_samples(tmp_path / "run", [text] * 2)
    for width in range(1, 21):
        lines = sample_lines(directory, width)
        assert len(lines) == 9
        assert all(cell_len(line) <= width for line in lines)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_markup_to_tensorboard(text):
    from tensorboard.plugin_util import markdown_to_safe_html

    shown = as_markdown({"prompt": text, "continuation": text, "reference": text})
    html = markdown_to_safe_html(shown)
    assert not set(re.findall(r"<(\w+)", html)) - {"p", "strong", "pre", "code"}
    assert html.count("<pre>") == 3
    assert escaped(shown) == shown


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_markup_to_the_page(tmp_path, text):
    shown = Report("run", (), tuple(sample_sections(write_samples(tmp_path / "run", [text]))))
    page, markdown = render_page(shown), render_markdown(shown)
    assert "<script>alert" not in page
    assert "<b>bold" not in page
    assert page.encode()
    assert markdown.encode()
    assert escaped(markdown) == markdown
    fences = [line for line in markdown.splitlines() if line.startswith("```")]
    assert len(fences) == 8, "a fence around each of four texts, and none within"
