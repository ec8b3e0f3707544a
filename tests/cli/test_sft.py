"""Fine-tuning on chats, as a user runs it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

pytest.importorskip("trl")

from abr_trainer.cli import comparing, sft
from abr_trainer.cli.command_line import parse_arguments
from abr_trainer.cli.compare import main as compare
from abr_trainer.cli.main import main as abr
from abr_trainer.data.arguments import ChatArguments
from abr_trainer.data.chat_tokens import Encoder, load_chats, prompts_of_chats, tokenise_chats
from abr_trainer.data.demo import DEMO_MODEL, demo_chats
from abr_trainer.data.templates import ALPACA
from abr_trainer.perplexity.windows import TokenPerplexity, causal_nll
from abr_trainer.records.errors import BadRow, MissingPackage
from abr_trainer.records.files import read_lines
from abr_trainer.report.samples import read_samples
from abr_trainer.schedulers import RowRule
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

QUICK = ["--chat_template", "alpaca", "--learning_rate", "5e-3", "--per_device_train_batch_size", "4", "--use_cpu"]
QUICK += ["--disable_tqdm", "true", "--max_eval_samples", "12", "--max_train_samples", "40", "--report_to", "none"]
QUICK += ["--activation_checkpointing", "false"]
ABR = ["--repeat_scheduler", "abr", "--loss_threshold", "2.0", "--max_passes", "20", "--save_steps", "4"]


def run(output, *flags):
    return sft.main([*QUICK, "--output_dir", str(output), *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with everything switched on, and what it returned."""
    output = tmp_path_factory.mktemp("chats") / "run"
    return output, run(output, "--do_train", "--do_eval", "--do_predict", *ABR)


def answers(split, tokenizer, count=12):
    """Return the rows of a split, of which only what the assistant writes is a target."""
    arguments = ChatArguments(dataset_name="demo", max_eval_samples=count, max_train_samples=count)
    found = load_chats(arguments, [split])[split]
    return tokenise_chats(found, arguments, Encoder(tokenizer, assistant_only=True), 256).rows


def perplexity_of(model, rows):
    total = TokenPerplexity()
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]])).logits
            total.add(*causal_nll(logits, torch.tensor([row["labels"]])))
    return total


def test_the_perplexity_is_that_of_the_assistant_s_tokens_before_and_after(finished):
    output, results = finished
    base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == ALPACA, "who loads the adapter writes chats as it has learnt them"
    rows = {split: answers(split, tokenizer) for split in ("validation", "test")}
    before = perplexity_of(base, rows["validation"])
    history = json.loads((output / "perplexity_history.json").read_text())
    assert history["summary"]["baseline"] == pytest.approx(before.perplexity, rel=1e-5)
    assert results["eval_target_tokens"] == before.tokens
    after = PeftModel.from_pretrained(base, output).eval()
    assert perplexity_of(after, rows["validation"]).perplexity == pytest.approx(results["eval_perplexity"], rel=1e-5)
    assert perplexity_of(after, rows["test"]).perplexity == pytest.approx(results["test_perplexity"], rel=1e-5)
    assert results["eval_perplexity"] < 0.95 * before.perplexity
    written = json.loads((output / "all_results.json").read_text())
    assert written["perplexity"] == results["eval_perplexity"]


def test_a_run_keeps_its_trace_its_cost_and_where_it_came_from(finished):
    output, results = finished
    trace = list(read_lines(output / "abr_trace.jsonl"))
    assert sum(batch["repeats"] for batch in trace) == results["train_updates"]
    assert max(batch["repeats"] for batch in trace) > 1
    assert 19 < results["train_passes"] <= 20
    provenance = json.loads((output / "run.json").read_text())
    assert provenance["argv"][:2] == ["abr", "sft"]
    told = {name: provenance["arguments"][name] for name in ("assistant_only_loss", "max_length", "chat_template")}
    assert told == {"assistant_only_loss": True, "max_length": 256, "chat_template": "alpaca"}
    assert not any("# Model Card" in path.read_text() for path in output.glob("*.md") if "TRL" in path.read_text())


def test_it_resumes_itself_bit_for_bit(finished):
    output, results = finished
    with pytest.raises(SystemExit, match="is not empty"):
        run(output, "--do_train")
    again = run(output, "--do_train", "--do_eval", *ABR, "--resume_from_checkpoint", str(output / "checkpoint-4"))
    assert again["eval_perplexity"] == results["eval_perplexity"]
    assert [batch["step"] for batch in read_lines(output / "abr_trace.jsonl")] == list(
        range(1, again["train_batches"] + 1)
    )


def test_what_is_learnt_is_said_before_the_first_batch(tmp_path, capsys):
    run(tmp_path / "run", "--do_train", "--max_steps", "1", "--max_length", "40")
    told = " ".join(capsys.readouterr().out.split())
    assert "defaults here (in TRL's script): --use_lora true (false)" in told
    assert re.search(r"data demo: \d\d rows to train on targets", told)
    assert re.search(r"targets the assistant's tokens; [\d,]+ of the [\d,]+ train tokens \(\d+\.\d %\)", told)
    assert re.search(r"cut \d+ of the \d+ train rows are longer than --max_length 40", told)
    run(tmp_path / "whole", "--do_eval", "--assistant_only_loss", "false")
    told = " ".join(capsys.readouterr().out.split())
    assert "targets all tokens, including the user's messages (--assistant_only_loss:" in told


CHATS = [
    {"conversations": [{"from": "human", "value": chat["messages"][0]["content"]}, {"from": "gpt", "value": "Yes."}]}
    for chat in demo_chats("validation")[:12]
]


def test_it_reads_a_yaml_file_whose_flags_give_way_to_those_of_the_command_line(tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"train_file: {chats}\nmax_steps: 3\nlearning_rate: 1.0e-3\nuse_peft: true\nlora_r: 4\ndo_train: true\n"
        "dataset_num_proc: null\nchat_template_path: alpaca\nlora_target_modules: [q_proj, v_proj]\nbf16: false\n"
    )
    for argv in ([str(config), "--learning_rate", "1e-4"], ["--learning_rate", "1e-4", "--config", str(config)]):
        model, data, _, args = parse_arguments(sft.ARGUMENTS, [*argv, "--output_dir", "x", "--use_cpu"])
        assert (args.learning_rate, args.max_steps, data.chat_template, model.lora_r) == (1e-4, 3, "alpaca", 4)
    output = tmp_path / "run"
    sft.main([str(config), *QUICK[2:], "--output_dir", str(output), "--max_steps", "2"])
    assert len(list(read_lines(output / "abr_trace.jsonl"))) == 2
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("flags", [["--packing"], ["--padding_free"], ["--packing", "--padding_free"]])
def test_packed_and_flattened_rows_have_the_same_perplexity(tmp_path, finished, flags):
    output, results = finished
    where = ["--adapter_name_or_path", str(output)]
    packed = run(tmp_path / "run", *where, "--do_eval", *flags)
    assert packed["eval_perplexity"] == pytest.approx(results["eval_perplexity"], rel=1e-5)
    assert packed["eval_target_tokens"] == results["eval_target_tokens"]


def test_packed_rows_are_trained_on(tmp_path):
    results = run(
        tmp_path / "run",
        "--do_train",
        "--do_eval",
        "--packing",
        "--repeat_scheduler",
        "fixed",
        "--max_steps",
        "3",
        "--skip_outliers",
        "none",
    )
    history = json.loads((tmp_path / "run" / "perplexity_history.json").read_text())
    assert results["eval_perplexity"] < history["summary"]["baseline"]
    assert results["train_updates"] == 6


def test_all_weights_are_trained_and_the_best_is_kept(tmp_path):
    flags = ["--no_use_lora", "--early_stopping_patience", "1", "--save_strategy", "steps", "--save_steps", "2"]
    results = run(tmp_path / "run", "--do_train", "--do_eval", *flags, "--learning_rate", "0.5", "--max_steps", "8")
    history = json.loads((tmp_path / "run" / "perplexity_history.json").read_text())["evaluations"]
    assert results["train_batches"] < 8
    evaluated = [each["perplexity"] for each in history if each["step"]]
    assert results["eval_perplexity"] == pytest.approx(min(value or math.inf for value in evaluated), rel=1e-5)
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("row", "flags", "learnt"),
    [
        ({"prompt": "The fox", "completion": " ran away."}, [], "completions"),
        ({"instruction": "Say it.", "output": "The fox ran away."}, [], "completions"),
        ({"text": "The fox ran away."}, [], "all tokens"),
    ],
)
def test_other_shapes_are_trained_on(tmp_path, capsys, row, flags, learnt):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    run(tmp_path / "run", "--do_train", "--train_file", str(path), "--max_steps", "1", *flags)
    assert f"targets {learnt}; " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"messages": []}], [], "line 1 of --train_file FILE has no messages."),
        ([{"label": 1}], [], "--train_file FILE holds no data that abr sft can train on: its columns are label."),
        (
            [{"text": "a b"}],
            ["--assistant_only_loss"],
            "--assistant_only_loss is for chats, but --train_file FILE holds",
        ),
        (
            CHATS,
            ["--completion_only_loss"],
            "--completion_only_loss: --train_file FILE has no prompts with completions.",
        ),
        (CHATS, ["--max_length", "300"], "--max_length 300 exceeds the model's context of 256 tokens."),
        (CHATS, ["--eos_token", "<stop>"], "--eos_token <stop> is not in the vocabulary of"),
        (CHATS, ["--chat_template", "alpacca"], "Unknown --chat_template 'alpacca'. Did you mean 'alpaca'?"),
        (CHATS, ["--do_predict"], "There is no test split. Give --test_file, or --do_predict false."),
        (CHATS, ["--dataset_name", "c4"], "--dataset_name c4 is streamed, but abr sft cannot read streams."),
        (CHATS, ["--dataset_test_split", "x"], "--dataset_test_split needs --dataset_name."),
    ],
)
def test_bad_arguments_and_rows_give_one_line_before_a_model_is_loaded(tmp_path, monkeypatch, rows, flags, message):
    monkeypatch.setattr(sft, "load_model", lambda *_: pytest.fail("a model was loaded"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="error: ") as caught:
        run(tmp_path / "run", "--do_train", "--train_file", str(path), *flags)
    assert message in str(caught.value).replace(str(path), "FILE")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "nothing may be half-written"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "The fox ran."}, "texts"),
        ({"prompt": "The fox", "completion": " ran."}, "prompts and completions as text"),
        ({"question": "Who ran?", "answer": "The fox."}, "prompts and answers of chats"),
    ],
)
def test_one_split_does_not_change_what_is_learnt_of_another(tmp_path, row, kind):
    train, validation = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    validation.write_text(json.dumps(row) + "\n")
    files = ["--train_file", str(train), "--validation_file", str(validation)]
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "run", "--do_train", "--do_eval", *files)
    assert str(caught.value).startswith(
        f"error: --train_file {train} holds chats, but --validation_file {validation} holds {kind}, so "
    )
    assert "\n" not in str(caught.value)


def chosen(tmp_path, tokenizer, rows, **flags):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ChatArguments(train_file=str(path), **flags)
    return sft.choose_targets(load_chats(arguments, ["train"]), arguments, tokenizer)


def test_a_slow_tokenizer_is_refused_where_the_place_of_a_token_is_needed(tmp_path):
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = ALPACA
    with pytest.raises(ValueError, match=r"^--assistant_only_loss needs a fast tokenizer, .* --assistant_only_loss f"):
        chosen(tmp_path, tokenizer, CHATS)
    assert not chosen(tmp_path, tokenizer, CHATS, assistant_only_loss=False).assistant_only
    assert chosen(tmp_path, tokenizer, [{"question": "Who?", "answer": "The fox."}]).completion_only


def test_a_chat_template_that_texts_do_not_need_is_said(tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    chosen(tmp_path, tokenizer, [{"text": "The fox ran."}], chat_template="alpaca")
    assert re.search(r"--chat_template alpaca is not used: --train_file .* holds texts\.", caplog.text)


def test_a_tokenizer_without_a_template_gets_one_line_with_the_fix(tmp_path):
    with pytest.raises(SystemExit, match="has no chat template.*Give --chat_template: a file") as caught:
        sft.main([*QUICK[2:], "--do_train", "--output_dir", str(tmp_path / "run")])
    assert "\n" not in str(caught.value)


def test_without_trl_there_is_one_line_that_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    for name in ("abr_trainer.integrations.trl", "abr_trainer.cli.sft"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as ended:
        abr(["sft", "--dataset_name", "demo", "--do_eval", "--output_dir", "x"])
    assert ended.value.code == 2
    assert 'This needs TRL: pip install "abr-trainer[trl]"' in capsys.readouterr().err
    told = []
    monkeypatch.setattr(comparing, "importlib", importlib)
    connection = type("End", (), {"send": staticmethod(told.append)})
    comparing.check_arguments("abr_trainer.cli.sft", [[]], connection)
    assert isinstance(told[0], ValueError)
    assert not isinstance(told[0], MissingPackage)


def test_a_pushed_adapter_says_what_it_has_learnt(hub, tmp_path):
    flags = ["--push_to_hub", "--hub_model_id", "me/chat", "--hub_base_model", "demo-org/base", "--save_steps", "1"]
    run(tmp_path / "run", "--do_train", "--do_eval", "--max_steps", "2", *flags)
    files = hub.repository("me/chat").files("main")
    card = files["README.md"].decode()
    assert "- targets of training and evaluation: the assistant's tokens" in card
    assert "- chat template: alpaca, saved with the tokenizer" in card
    assert "abr sft --chat_template alpaca" in card
    assert "using TRL" not in card.partition("## How it was trained")[0], "ours is the card, not that of TRL"
    assert {"adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"} <= set(files)


class SecondOfFour(RowRule):
    """Drop the second row of each batch."""

    def decide(self, row):
        return row.position % 4 != 1


class TwoOfFour(RowRule):
    """Drop two documents that stand side by side."""

    def decide(self, row):
        return row.position % 4 in (0, 3)


@pytest.mark.parametrize("flags", [[], ["--padding_free"]], ids=["padded", "padding-free"])
def test_dropped_rows_are_named_by_file_and_line(tmp_path, flags):
    chats = list(demo_chats("train"))[:40]
    for name, part in {"one": chats[:15], "two": chats[15:]}.items():
        lines = [json.dumps(each) for each in part]
        lines.insert(3, "")  # an empty line is no row, and is counted
        (tmp_path / "data" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "train" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    rule = f"{__name__}:SecondOfFour"
    data = ["--dataset_name", str(tmp_path / "data"), "--do_train", "--num_train_epochs", "1"]
    run(tmp_path / "run", *data, "--skip_rows", rule, "--rank_rows", *flags)
    dropped = list(read_lines(tmp_path / "run" / "_dropped_rows.jsonl"))
    assert len(dropped) == 10
    for drop in dropped:
        line = (tmp_path / "data" / "train" / drop["source"]).read_text().split("\n")[drop["first_row"] - 1]
        answer = json.loads(line)["messages"][-1]["content"]
        assert answer.split()[-1] in drop["text"]
        assert drop["first_row"] == drop["last_row"]
    assert {drop["source"] for drop in dropped} == {"one.jsonl", "two.jsonl"}
    for path in (tmp_path / "data" / "train").iterdir():
        os.utime(path, (3e9, 3e9))
        abr(["rows", str(tmp_path / "run"), "--clean", str(path), str(tmp_path / path.name)])
        gone = {drop["first_row"] for drop in dropped if drop["source"] == path.name}
        lines = path.read_text().splitlines()
        assert (tmp_path / path.name).read_text().splitlines() == [
            line for number, line in enumerate(lines, 1) if number not in gone
        ]


def test_of_plain_text_no_row_is_removed_of_which_a_block_is_a_part(tmp_path, capsys):
    path = tmp_path / "notes.txt"
    path.write_text("".join(f"{i} {'word ' * 300}\n" for i in range(3)))
    data = ["--train_file", str(path), "--do_train", "--num_train_epochs", "1", "--max_length", "64"]
    run(tmp_path / "run", *data, "--skip_rows", f"{__name__}:SecondOfFour")
    dropped = list(read_lines(tmp_path / "run" / "_dropped_rows.jsonl"))
    assert any(drop["first_row"] == drop["last_row"] for drop in dropped)
    assert all(drop["is_block"] for drop in dropped)
    capsys.readouterr()
    abr(["rows", str(tmp_path / "run"), "--clean", str(path), str(tmp_path / "clean.txt")])
    assert "without 0 of its 3 rows" in capsys.readouterr().out
    assert (tmp_path / "clean.txt").read_bytes() == path.read_bytes()


def test_packed_documents_are_listed_each_and_cannot_be_removed_from_a_file(tmp_path, capsys):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in list(demo_chats("train"))[:24]))
    data = ["--train_file", str(path), "--do_train", "--max_steps", "2", "--packing", "--max_length", "256"]
    run(tmp_path / "run", *data, "--skip_rows", f"{__name__}:TwoOfFour", "--padding_free")
    dropped = list(read_lines(tmp_path / "run" / "_dropped_rows.jsonl"))
    assert len({drop["index"] for drop in dropped}) < len(dropped), "some are of one packed row"
    capsys.readouterr()
    abr(["rows", str(tmp_path / "run"), "--json"])
    assert len(json.loads(capsys.readouterr().out)) == len({drop["text"] for drop in dropped}) > 1
    with pytest.raises(SystemExit):
        abr(["rows", str(tmp_path / "run"), "--clean", str(path), str(tmp_path / "clean.jsonl")])
    assert "dropped rows is not known, e.g. because of --packing" in capsys.readouterr().err


def test_rules_are_compared_on_chats(tmp_path):
    out = tmp_path / "cmp"
    argv = ["--schedulers", "baseline", "fixed:2", "--seeds", "1", "--evaluations", "1", "--out", str(out)]
    rest = ["--", *QUICK[:-4], "--dataset_name", "demo", "--max_passes", "4"]
    data = compare(["--command", "sft", *argv, *rest])
    assert data["missing"] == data["failures"] == []
    assert data["metric"] == "test_perplexity"
    assert [run["cost"]["updates"] for run in data["runs"]] == [4, 4]
    provenance = json.loads(next(out.glob("runs/*/seed-0/run.json")).read_text())
    assert provenance["argv"][:2] == ["abr", "sft"]
    assert (out / "report.md").exists()
    with pytest.raises(SystemExit, match="The runs in .* are of abr_trainer.cli.sft, but these are of run_clm_abr"):
        compare([*argv, "--", "--dataset_name", "demo", "--max_passes", "4", "--use_cpu"])


@pytest.mark.launches
def test_the_command_line_itself(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("dataset_name: demo\nchat_template: alpaca\ndo_train: true\ndo_eval: true\nuse_cpu: true\n")
    argv = [
        str(config),
        "--max_steps",
        "2",
        "--max_train_samples",
        "16",
        "--max_eval_samples",
        "4",
        "--report_to",
        "none",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "abr_trainer", "sft", *argv, "--output_dir", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^evaluation  perplexity [\d.]+ before, [\d.]+ after", done.stdout, flags=re.MULTILINE)
    assert "gradient_checkpointing" not in done.stderr, "no library noise"


# ---- Samples ----


def test_a_run_samples_answers_to_what_a_user_asks(finished):
    output, _ = finished
    samples = read_samples(output)
    asked = demo_chats("validation")[:12]
    for number, lines in samples.items():
        *before, answer = asked[(number - 1) * 4]["messages"]
        assert lines[0]["reference"] == answer["content"]
        assert lines[0]["prompt"] == "\n".join(f"{each['role']}: {each['content']}" for each in before)
        assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
        assert lines[0]["step"] == 0
        assert lines[-1]["continuation"] != lines[0]["continuation"]
    assert len(samples) == 3


def prompts_for(rows, tmp_path, length=256, template=ALPACA, **flags):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = template
    arguments = ChatArguments(validation_file=str(path), max_length=length)
    found = load_chats(arguments, ["validation"])["validation"]
    encoder = Encoder(tokenizer, **flags)
    rows = tokenise_chats(found, arguments, encoder, length)
    return prompts_of_chats(found, rows, encoder, length), tokenizer


SAID = [
    {"role": "user", "content": "Where is the lamp?"},
    {"role": "assistant", "content": "By the river."},
    {"role": "user", "content": "And the boat? " + "It was here a moment ago, I saw it. " * 4},
    {"role": "assistant", "content": "It has left."},
]


@pytest.mark.parametrize("flags", [{"assistant_only": True}, {"assistant_only": False}])
def test_the_prompt_of_a_chat_is_all_before_the_last_answer_as_the_template_asks_for_one(tmp_path, flags):
    [prompt], tokenizer = prompts_for([{"messages": SAID}], tmp_path, **flags)
    asks = tokenizer.apply_chat_template(SAID[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(prompt.ids) == asks
    assert tokenizer.decode(asks).endswith("### Response:\n")
    assert (prompt.reference, prompt.most) == ("It has left.", min(128, 256 - len(asks)))


def test_a_chat_that_is_too_long_is_asked_an_earlier_question(tmp_path):
    [prompt], _ = prompts_for([{"messages": SAID}], tmp_path, length=40, assistant_only=True)
    assert prompt.reference == "By the river."
    assert len(prompt.ids) + prompt.most == 40
    assert prompt.text == "user: Where is the lamp?"


def test_prompts_of_questions_of_completions_and_of_texts(tmp_path):
    asked = {"instruction": "Name a lamp.", "input": "A red one.", "output": "The lamp."}
    [prompt], tokenizer = prompts_for([asked], tmp_path)
    message = {"role": "user", "content": "Name a lamp.\n\nA red one."}
    expected = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert (list(prompt.ids), prompt.reference) == (expected, "The lamp.")
    [prompt], _ = prompts_for([{"prompt": "The boat is", "completion": " by the river."}], tmp_path)
    assert (tokenizer.decode(prompt.ids), prompt.reference) == ("The boat is", " by the river.")
    text = "The girl has a lamp and a boat by the river. " * 9
    [prompt], _ = prompts_for([{"text": text}], tmp_path)
    assert len(prompt.ids) == 32
    assert text.startswith(prompt.text + prompt.reference)


def test_answers_that_a_template_refuses_to_ask_for_are_passed_over(tmp_path, caplog):
    def chat(*roles):
        return {"messages": [{"role": role, "content": f"{role} {place}"} for place, role in enumerate(roles)]}

    def answers(refused):
        refusal = "{% if add_generation_prompt and " + refused + " %}{{ raise_exception('no') }}{% endif %}"
        prompts, _ = prompts_for(rows, tmp_path, template=ALPACA + refusal)
        return [prompt.reference for prompt in prompts]

    rows = [chat("system", "user", "assistant"), chat("user", "assistant", "user", "assistant")]
    assert answers("messages[-1]['content'] == 'user 2'") == ["assistant 2", "assistant 1"]
    assert "are not continued" not in caplog.text
    assert answers("messages[-1]['content'] == 'user 1'") == ["assistant 3"]
    assert re.search(r"1 rows of .* are not continued: line 1 .*not accepted by the chat template: no", caplog.text)
    with pytest.raises(BadRow, match=r"line 1.*is not accepted by the chat template: no"):
        answers("true")
