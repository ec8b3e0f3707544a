"""`abr sft` makes the tokens and labels that TRL makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl")

import trl

from abr_trainer.cli.sft import choose_targets
from abr_trainer.data.arguments import ChatArguments
from abr_trainer.data.chat_tokens import load_chats, tokenise_chats
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.data.templates import ALPACA
from abr_trainer.integrations.trl import learns_to_stop, marked_template

LENGTH = 240
QWEN = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


CHATS = [
    {"messages": [{"role": "system", "content": "Be kind."}, user(f"Hi {i}"), assistant("Hello."), user("Bye"), last]}
    for i, last in enumerate([assistant("See you."), assistant("Bye. " * 100), assistant("Farewell.")])
]
SHAPES = {
    "chats": (CHATS, {"assistant_only_loss": True}),
    "chats, all of them": (CHATS, {"assistant_only_loss": False}),
    "ShareGPT": (
        [
            {"conversations": [{"from": "user", "value": f"Hi {i}"}, {"from": "assistant", "value": "a"}]}
            for i in range(3)
        ],
        {"assistant_only_loss": False},
    ),
    "prompts": ([{"prompt": f"The fox {i}", "completion": " ran away."} for i in range(3)], {}),
    "prompts, learnt too": (
        [{"prompt": f"The fox {i}", "completion": " ran away."} for i in range(3)],
        {"completion_only_loss": False},
    ),
    "prompts of messages": (
        [{"prompt": [user(f"Hi {i}")], "completion": [assistant("Hello.")]} for i in range(3)],
        {},
    ),
    "texts": ([{"text": f"The fox {i} ran away. " * (1 + i)} for i in range(3)], {}),
}


def by_trl(tmp_path, rows, tokenizer, **options):
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": LENGTH}
    return trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(DEMO_MODEL),
        args=trl.SFTConfig(output_dir=str(tmp_path / "theirs"), **common, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    ).train_dataset


def by_us(tmp_path, rows, tokenizer, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ChatArguments(train_file=str(path), **options)
    found = load_chats(arguments, ["train"])
    return tokenise_chats(found["train"], arguments, choose_targets(found, arguments, tokenizer), LENGTH).rows


@pytest.mark.parametrize("template", ["alpaca", "Qwen"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_and_labels_are_those_of_trl(tmp_path, shape, template):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = ALPACA if template == "alpaca" else QWEN
    rows, options = SHAPES[shape]
    ours, theirs = by_us(tmp_path, rows, tokenizer, **options), by_trl(tmp_path, rows, tokenizer, **options)
    assert len(ours) == 3
    for column in ("input_ids", "labels"):
        assert ours[column][:] == theirs[column][:]
    assert any(-100 in labels for labels in ours["labels"]) == (
        options.get("assistant_only_loss", "prompt" in rows[0]) and options.get("completion_only_loss", True)
    )


def test_a_template_of_which_trl_knows_a_marked_variant_is_learnt_by_that_and_saved_as_it_is(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = QWEN
    assert "generation" in (marked_template(tokenizer) or "")
    rows = by_us(tmp_path, CHATS, tokenizer)
    assert any(-100 in labels for labels in rows["labels"]), "the assistant's tokens alone by default"
    assert tokenizer.chat_template == QWEN
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert marked_template(tokenizer) is None
    assert not any(-100 in labels for labels in by_us(tmp_path, CHATS, tokenizer)["labels"])


def test_a_template_that_does_not_teach_to_stop_is_warned_of(tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = ALPACA.replace(
        "+ eos_token }}{%- endgeneration %}", "}}{%- endgeneration %}{{- eos_token }}"
    )
    assert not learns_to_stop(tokenizer, None)
    by_us(tmp_path, CHATS, tokenizer)
    assert "does not mark the end of the assistant's turn as the assistant's" in caplog.text
    tokenizer.chat_template = ALPACA
    assert learns_to_stop(tokenizer, None)
