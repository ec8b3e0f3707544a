"""Classifiers of sentences, as a user trains, evaluates and finds them again."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from datasets import ClassLabel, Dataset, Features, Value
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.trainer_utils import PredictionOutput

from abr_trainer.classification.records import OF_TASK, recalled_flags, write_predictions
from abr_trainer.classification.sentences import SentenceArguments
from abr_trainer.classification.trainer import ClassifierArguments, Judge, check_order, mean_loss
from abr_trainer.cli import classify, evaluate, export
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.data.tasks import TASKS, own_task
from abr_trainer.models.loading import heads_in, load_config, load_model, load_tokenizer, lora_config
from abr_trainer.records.files import read_lines
from abr_trainer.schedulers import SCHEDULERS
from tests.sentence_rows import QUICK, lay_out_as_on_the_hub, tales_and_reports, write_rows

pytestmark = pytest.mark.slow

MODELS = {"quantised": ["--load_in_4bit", "--bf16", "--gradient_checkpointing"], "plain": []}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Flags that name 64 training rows, 22 to evaluate on and 37 for the test: no multiple of a batch."""
    folder = tmp_path_factory.mktemp("rows")
    sizes = {"train": 64, "validation": 22, "test": 37}
    flags = []
    for seed, (split, size) in enumerate(sizes.items()):
        flags += [f"--{split}_file", write_rows(folder / f"{split}.jsonl", tales_and_reports(size, seed))]
    return flags


@pytest.fixture(scope="module", params=MODELS)
def finished(request, files, tmp_path_factory):
    """The kind of model, the output directory, and what the run returned."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    flags = ["--do_train", "--do_eval", "--do_predict", "--num_train_epochs", "2", "--load_best_model_at_end"]
    results = run(output, *files, *flags, *MODELS[request.param], "--prompt", "Is it a tale?")
    return request.param, output, results


def run(output, *flags):
    return classify.main([*QUICK, "--output_dir", str(output), *flags])


def log_of(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def test_a_classifier_is_evaluated_before_and_after_each_epoch_and_ends_with_the_best(finished):
    _, output, results = finished
    evaluations = [logs for logs in log_of(output) if "eval_accuracy" in logs]
    assert [logs["step"] for logs in evaluations] == [0, 16, 32, 32]
    assert all({"eval_f1", "eval_loss"} <= logs.keys() for logs in evaluations)
    assert results["eval_accuracy"] > evaluations[0]["eval_accuracy"]
    assert results["eval_accuracy"] == max(logs["eval_accuracy"] for logs in evaluations[1:]) > 0.9
    assert results["test_accuracy"] > 0.9


def test_scores_are_those_of_the_predictions_row_by_row(finished, files):
    _, output, results = finished
    lines = list(read_lines(output / "test_predictions.jsonl"))
    rows = list(read_lines(files[files.index("--test_file") + 1]))
    assert [line["label"] for line in lines] == [row["label"] for row in rows], "every row once, in order"
    said, right = zip(*((line["prediction"], line["label"]) for line in lines), strict=True)
    assert results["test_accuracy"] == pytest.approx(accuracy_score(right, said))
    assert results["test_f1"] == pytest.approx(f1_score(right, said, pos_label="tale"))


def test_an_exported_classifier_says_what_base_and_adapter_said(finished, files, tmp_path):
    kind, output, _ = finished
    whole, found = tmp_path / "whole", {}
    export.main(["--adapter", str(output), "--output_dir", str(whole)])
    flags = [*files[-2:], "--use_cpu", "--bf16", "false", "--output_file"]
    # The base that the adapter is merged into is not quantised.
    beside = ["--adapter", str(output), *(["--load_in_4bit", "false"] if kind == "quantised" else [])]
    for name, model in (("beside", beside), ("whole", ["--model_name_or_path", str(whole)])):
        evaluate.main([*model, *flags, str(tmp_path / f"{name}.jsonl")])
        found[name] = list(read_lines(tmp_path / f"{name}.jsonl"))
    for one, two in zip(found["beside"], found["whole"], strict=True):
        assert (one["prediction"], one["label"], one["input"]) == (two["prediction"], two["label"], two["input"])
        assert two["logits"] == pytest.approx(one["logits"], abs=1e-4)
    plain = AutoModelForSequenceClassification.from_pretrained(whole)
    assert plain.config.id2label == {0: "report", 1: "tale"}
    assert plain.config.pad_token_id == AutoTokenizer.from_pretrained(whole).pad_token_id
    task = json.loads((whole / "task.json").read_text())["flags"]
    assert task["prompt"] == "Is it a tale?"
    assert task["use_lora"] is False
    assert not {"load_in_4bit", "torch_dtype"} & task.keys()


def test_only_the_adapter_and_the_head_are_trained_and_saved(finished):
    kind, output, _ = finished
    saved = load_file(output / "adapter_model.safetensors")
    assert {name for name in saved if "lora_" not in name} == {"base_model.model.score.weight"}
    assert all(re.search(r"\.(q_proj|v_proj)\.lora_[AB]\.weight$", name) for name in saved if "lora_" in name)
    assert saved["base_model.model.score.weight"].dtype == torch.float32
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert (adapter["task_type"], adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (
        "SEQ_CLS",
        8,
        16,
        0.1,
    )
    config = json.loads((output / "config.json").read_text())
    assert config["id2label"] == {"0": "report", "1": "tale"}
    assert config["pad_token_id"] == AutoTokenizer.from_pretrained(output).pad_token_id is not None
    assert (output / "quant_config.json").exists() == (kind == "quantised")
    if kind == "quantised":
        quantisation = json.loads((output / "quant_config.json").read_text())
        assert quantisation["bnb_4bit_quant_type"] == "nf4"
        assert quantisation["bnb_4bit_use_double_quant"] is True
        assert quantisation["llm_int8_skip_modules"] == ["score"]


@pytest.mark.launches
def test_a_fresh_process_predicts_the_same(finished, files, tmp_path, launch):
    kind, output, _ = finished
    if kind == "plain":
        pytest.skip("loading is the same, and a process takes long to start")
    again = tmp_path / "again.jsonl"
    flags = ["--adapter_name_or_path", str(output), *files[-2:], "--use_cpu", "--output_file", str(again)]
    (tmp_path / "plans.json").write_text(json.dumps([[{}, "evaluate", flags]]))
    launch(1, [], "trainings", tmp_path)
    assert again.read_bytes() == (output / "test_predictions.jsonl").read_bytes(), "to the last bit"


@pytest.mark.launches
def test_two_ranks_train_and_are_judged_as_one_process(files, tmp_path, launch):
    """Of 22 and 37 rows the last batches are filled up with rows that must count once, in no score and no loss."""
    flags = [*QUICK, *files, "--do_train", "--do_eval", "--do_predict", "--max_steps", "6", "--learning_rate", "1e-3"]
    flags += ["--lora_dropout", "0", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--output_dir"]
    (tmp_path / "plans.json").write_text(json.dumps([[{}, "classify", [*flags, str(tmp_path / "two")]]]))
    launch(2, [], "trainings", tmp_path)
    classify.main([*flags, str(tmp_path / "one"), "--gradient_accumulation_steps", "2"])
    one, two = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two"))
    for name in ("eval_accuracy", "eval_f1", "eval_loss", "test_accuracy", "test_f1", "test_loss", "train_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    lines = [list(read_lines(tmp_path / name / "test_predictions.jsonl")) for name in ("one", "two")]
    assert [line["input"] for line in lines[0]] == [line["input"] for line in lines[1]]
    norms = [[logs["grad_norm"] for logs in log_of(tmp_path / name) if "loss" in logs] for name in ("one", "two")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_an_evaluation_knows_task_prompt_and_precision(finished, files, capsys):
    kind, output, results = finished
    found = evaluate.main(["--adapter", str(output), *files, "--split", "validation", "--use_cpu"])
    assert "predictions as in" not in capsys.readouterr().out, "there are none of this split"
    assert found["validation_accuracy"] == results["eval_accuracy"]
    told = json.loads((output / "task.json").read_text())["flags"]
    expected = {"prompt": "Is it a tale?", "classes": ["report", "tale"], "sentence_columns": ["sentence"]}
    assert told.items() >= {**expected, "max_seq_length": 24, "load_in_4bit": kind == "quantised"}.items()
    checkpoint = min(output.glob("checkpoint-*"))
    assert evaluate.main(["--adapter", str(checkpoint), *files, "--use_cpu"])["test_loss"] > 0
    assert "predictions as in" not in capsys.readouterr().out, "those were of other weights"
    flags = ["--adapter", str(output), *files, "--use_cpu"]
    assert evaluate.main(flags)["test_loss"] == results["test_loss"]
    assert "again       37 of 37 predictions as in" in capsys.readouterr().out
    assert evaluate.main([*flags, "--prompt", "none"])["test_loss"] != results["test_loss"], "a flag wins"
    assert "predictions as in" not in capsys.readouterr().out, "those were of another question"


def test_an_adapter_is_trained_further_as_it_was_trained(finished, files, tmp_path):
    kind, output, results = finished
    if kind == "quantised":
        pytest.skip("loading is the same")
    flags = [*files, "--adapter_name_or_path", str(output)]
    assert run(tmp_path / "evaluated", *flags, "--do_eval")["eval_loss"] == pytest.approx(results["eval_loss"])
    run(tmp_path / "further", *flags, "--do_train", "--max_steps", "1")
    told = [json.loads((folder / "task.json").read_text())["flags"] for folder in (output, tmp_path / "further")]
    assert told[0] == told[1]


def test_classes_keep_the_order_that_a_classifier_was_trained_with(finished, tmp_path):
    """Of rows that come in another order, in a column of another name, one of the labels never."""
    kind, output, _ = finished
    if kind == "quantised":
        pytest.skip("loading is the same")
    rows = [{"txt": row["sentence"], "label": row["label"]} for row in tales_and_reports(22, seed=1)]
    told = ["--adapter", str(output), "--use_cpu", "--sentence_columns", "txt"]
    only_tales = write_rows(tmp_path / "tales.jsonl", rows[::2])
    assert evaluate.main([*told, "--test_file", only_tales])["test_accuracy"] > 0.8
    with pytest.raises(
        SystemExit, match="--classes tale report: .* was trained with these classes in the order report tale."
    ):
        evaluate.main([*told, "--test_file", only_tales, "--classes", "tale", "report"])


def test_classes_are_found_by_name_whatever_their_numbers_in_a_file(finished, tmp_path, caplog):
    kind, output, _ = finished
    if kind == "quantised":
        pytest.skip("reading is the same")
    rows = tales_and_reports(22, seed=1)
    data = {name: [row[name] for row in rows] for name in ("sentence", "label")}
    names = ["tale", "report"]  # trained in the other order
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=names)})
    Dataset.from_dict(data, features=features).to_parquet(tmp_path / "test.parquet")
    flags = ["--use_cpu", "--test_file", str(tmp_path / "test.parquet"), "--adapter"]
    found = evaluate.main([*flags, str(output)])["test_accuracy"]
    assert found > 0.8
    untold = shutil.copytree(output, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "task.json"))
    prompt = ["--sentence_columns", "sentence", "--prompt", "Is it a tale?", "--max_seq_length", "24"]
    assert evaluate.main([*flags, str(untold), *prompt])["test_accuracy"] == found
    assert "has no task.json. The classes are taken from its config.json: report, tale." in caplog.text


@pytest.mark.parametrize(
    ("told", "flags", "expected"),
    [
        ({"classes": ["b", "a"]}, ["--regression", "false"], {"classes": ["b", "a"]}),
        ({"classes": ["b", "a"]}, ["--regression"], {}),
        ({"task_name": "sst2"}, ["--sentence_columns", "text"], {"classes": ["negative", "positive"]}),
        ({"task_name": "stsb"}, ["--sentence_columns", "a", "b"], {"regression": True}),
        ({"task_name": "sst2"}, [], {"task_name": "sst2"}),
    ],
)
def test_an_evaluation_keeps_the_classes_of_the_training(tmp_path, told, flags, expected):
    (tmp_path / "task.json").write_text(json.dumps({"format": 1, "flags": told}))
    found = recalled_flags(classify.ARGUMENTS, ["--adapter", str(tmp_path), *flags])
    assert {name: value for name, value in found.items() if name in OF_TASK} == expected


@pytest.mark.parametrize(
    ("told", "flags"),
    [
        ({"task_name": "sst2"}, ["--classes", "positive", "negative"]),
        ({"classes": ["Positive", "Negative"]}, ["--task_name", "sst2"]),
    ],
)
def test_another_order_than_that_of_the_training_is_refused(tmp_path, told, flags):
    (tmp_path / "task.json").write_text(json.dumps({"format": 1, "flags": told}))
    with pytest.raises(ValueError, match=f"{' '.join(flags)}: .* was trained with these classes in the order "):
        recalled_flags(classify.ARGUMENTS, ["--adapter", str(tmp_path), *flags])


def test_a_classifier_with_its_classes_in_another_order_is_not_evaluated_as_it_is(tmp_path, caplog):
    names = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]
    config = LlamaConfig(id2label=dict(enumerate(names)), architectures=["LlamaForSequenceClassification"])
    config.save_pretrained(tmp_path)
    arguments = ClassifierArguments(model_name_or_path=str(tmp_path))
    message = (
        "has the classes CONTRADICTION, NEUTRAL, ENTAILMENT, in this order, but the task has entailment, neutral, con"
    )
    with pytest.raises(ValueError, match=message):
        check_order(arguments, TASKS["mnli"], trains=False)
    check_order(arguments, TASKS["mnli"], trains=True)
    assert "Its head is now trained for the order entailment, neutral, contradiction." in caplog.text
    check_order(arguments, own_task(["text"], names), trains=False)
    check_order(arguments, TASKS["mrpc"], trains=False)


def test_a_run_that_goes_on_keeps_its_classes(files, tmp_path):
    flags = [*files[:2], "--do_train", "--save_strategy", "steps", "--save_steps", "1", "--max_steps"]
    run(tmp_path / "run", *flags, "1", "--classes", "tale", "report")
    resumed = [*flags, "2", "--resume_from_checkpoint", "true"]
    with pytest.raises(SystemExit, match="was trained with the classes tale, report, not report, tale."):
        run(tmp_path / "run", *resumed, "--classes", "report", "tale")
    run(tmp_path / "run", *resumed)
    assert json.loads((tmp_path / "run" / "task.json").read_text())["flags"]["classes"] == ["tale", "report"]


def test_plain_peft_finds_the_same(finished):
    kind, output, _ = finished
    if kind == "quantised":
        pytest.skip("the unquantised base has other logits")
    base = AutoModelForSequenceClassification.from_pretrained(DEMO_MODEL, num_labels=2)
    model = PeftModel.from_pretrained(base, output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    model.config.pad_token_id = tokenizer.pad_token_id
    text = "Is it a tale? Sentence: " + tales_and_reports(37, seed=2)[0]["sentence"]
    with torch.no_grad():
        logits = model(**tokenizer([text], truncation=True, max_length=24, return_tensors="pt")).logits[0]
    line = next(read_lines(output / "test_predictions.jsonl"))
    assert logits.tolist() == pytest.approx(line["logits"], abs=1e-4)


def test_padding_changes_no_prediction(finished, files):
    kind, output, results = finished
    flags = ["--adapter", str(output), *files, "--use_cpu", "--per_device_eval_batch_size"]
    tolerance = 1e-5 if kind == "plain" else 5e-2  # bf16
    for rows in ("1", "16"):
        assert evaluate.main([*flags, rows])["test_loss"] == pytest.approx(results["test_loss"], rel=tolerance)


def test_the_parameters_that_llama_3_8b_trains():
    """q_proj 8 x (4096 + 4096), v_proj 8 x (4096 + 1024), in 32 layers, and a head of 2 x 4096."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_labels=2,
    )
    arguments = ClassifierArguments()
    with torch.device("meta"):
        base = AutoModelForSequenceClassification.from_config(config)
        model = get_peft_model(base, lora_config(arguments, base, heads_in(base, arguments.task)))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 32 * 8 * (4096 + 4096 + 4096 + 1024) + 2 * 4096 == 3_416_064
    assert 7.5e9 < total < 7.6e9


@pytest.mark.parametrize(("flag", "layer"), [("load_in_4bit", Linear4bit), ("load_in_8bit", Linear8bitLt)])
def test_the_head_is_never_quantised(flag, layer):
    arguments = ClassifierArguments(**{flag: True})
    model = load_model(arguments, load_config(arguments, num_labels=3), load_tokenizer(arguments), "cpu")
    inside = model.base_model.model
    assert isinstance(inside.model.layers[0].mlp.up_proj, layer)
    head = inside.score.modules_to_save["default"]
    assert type(head) is torch.nn.Linear
    assert head.weight.dtype == torch.float32
    assert head.weight.shape[0] == 3


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_in_bf16_has_its_head_in_fp32(autocast):
    arguments = ClassifierArguments(torch_dtype="bfloat16")
    model = load_model(arguments, load_config(arguments, num_labels=2), load_tokenizer(arguments), "cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
        assert torch.is_autocast_enabled("cpu") == autocast
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.to(torch.bfloat16).to(torch.float32)), "not rounded on the way"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("score" in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)


def test_an_evaluation_in_halves_casts_the_head_too(files, tmp_path):
    flags = ["--do_train", "--do_predict", "--max_steps", "2", "--bf16_full_eval"]
    assert run(tmp_path / "run", *files, *flags)["test_loss"] > 0


def test_a_flag_wins_over_what_it_excludes(finished, files):
    kind, output, _ = finished
    if kind == "plain":
        pytest.skip("nothing was excluded")
    flags = ["--adapter", str(output), *files, "--use_cpu", "--max_eval_samples", "2", "--bf16", "false"]
    assert evaluate.main([*flags, "--load_in_8bit"])["test_loss"] > 0


def test_label_smoothing_is_part_of_the_loss_as_in_training():
    """Of logits 0 and ln 3, label 1: probabilities 1/4 and 3/4; with 0.2: 0.9 ln 4/3 + 0.1 ln 4."""
    found = mean_loss(np.array([[0.0, math.log(3)]]), np.array([1]), 0.2)
    assert found == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))


def test_a_model_of_another_kind_is_trained_as_well(files, tmp_path):
    """BERT: other names of layers, a head that is called classifier."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id or 0, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    flags = ["--model_name_or_path", str(tmp_path / "bert"), "--do_train", "--max_steps", "2"]
    run(tmp_path / "run", *files, *flags)
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in saved
    assert any("query.lora_A" in name for name in saved)


def test_a_llama_of_random_weights_goes_all_the_way_in_4_bit(files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "random")
    tokenizer.save_pretrained(tmp_path / "random")
    flags = ["--model_name_or_path", str(tmp_path / "random"), "--load_in_4bit", "--do_train", "--do_eval"]
    results = run(tmp_path / "run", *files, *flags, "--do_predict", "--max_steps", "4")
    assert results["train_updates"] == 4
    found = evaluate.main(["--adapter_name_or_path", str(tmp_path / "run"), *files, "--use_cpu"])
    assert found["test_loss"] == results["test_loss"]


def test_all_weights_can_be_trained_and_found_again(files, tmp_path):
    whole = tmp_path / "whole"
    flags = ["--do_train", "--do_predict", "--use_lora", "false", "--max_steps", "3", "--learning_rate", "1e-3"]
    results = run(whole, *files, *flags)
    assert (whole / "model.safetensors").exists()
    found = evaluate.main(["--model_name_or_path", str(whole), *files, "--use_cpu"])
    assert found["test_loss"] == pytest.approx(results["test_loss"], rel=1e-6)


def test_a_head_for_other_labels_is_made_anew_only_where_that_is_asked_for(files, tmp_path):
    base = tmp_path / "three"
    LlamaForSequenceClassification(LlamaConfig.from_pretrained(DEMO_MODEL, num_labels=3)).save_pretrained(base)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(base)
    flags = ["--model_name_or_path", str(base), "--do_train", "--do_predict", "--max_steps", "2"]
    with pytest.raises(SystemExit, match="another number of labels than the 2 .* Give --ignore_mismatched_sizes to"):
        run(tmp_path / "refused", *files, *flags)
    results = run(tmp_path / "run", *files, *flags, "--ignore_mismatched_sizes")
    again = ["--adapter_name_or_path", str(tmp_path / "run"), *files, "--use_cpu"]
    assert evaluate.main(again)["test_loss"] == pytest.approx(results["test_loss"], rel=1e-6), "the adapter's head"
    with pytest.raises(SystemExit, match="--ignore_mismatched_sizes creates a new head, which must be trained"):
        evaluate.main([*again, "--ignore_mismatched_sizes"])


# ---- Adaptive batch repetition ----


def first_losses(output):
    return [batch["loss"] for batch in read_lines(output / "abr_trace.jsonl")]


def test_neither_what_a_rule_sees_nor_what_is_trained_depends_on_accumulation(files, tmp_path):
    flags = [*files, "--do_train", "--max_steps", "6", "--lora_dropout", "0", "--repeat_scheduler", "fixed"]
    flags += ["--learning_rate", "1e-3", "--logging_steps", "1"]
    for name, rows, parts in (("whole", "8", "1"), ("parts", "2", "4")):
        accumulation = ["--per_device_train_batch_size", rows, "--gradient_accumulation_steps", parts]
        run(tmp_path / name, *flags, *accumulation)
    assert first_losses(tmp_path / "parts") == pytest.approx(first_losses(tmp_path / "whole"), rel=1e-3)
    parts, whole = (
        [(logs["loss"], logs["grad_norm"]) for logs in log_of(tmp_path / name) if "loss" in logs]
        for name in ("parts", "whole")
    )
    assert np.array(parts) == pytest.approx(np.array(whole), rel=1e-3)


@pytest.mark.parametrize("rule", sorted(SCHEDULERS.keys() - {"kl"}))  # which is for trainers that generate
def test_every_rule_decides_about_classifications(rule, files, tmp_path):
    flags = [*files, "--do_train", "--max_passes", "12", "--repeat_scheduler"]
    if rule == "follow":
        run(tmp_path / "followed", *flags, "abr")
    trace = ["--trace", str(tmp_path / "followed")] if rule == "follow" else []
    results = run(tmp_path / rule, *flags, rule, *trace)
    assert 11 < results["train_passes"] <= 12
    trace = list(read_lines(tmp_path / rule / "abr_trace.jsonl"))
    assert trace[0]["loss"] == pytest.approx(math.log(2), abs=0.4), "a mean over rows, not their sum"


def test_mislabelled_batches_are_skipped(tmp_path):
    """Batches 40 and 50 of 60 have the labels of the other kind, when the model knows better."""
    rows = tales_and_reports(240)
    for batch in (40, 50):
        for row in rows[4 * batch : 4 * batch + 4]:
            row["label"] = {"tale": "report", "report": "tale"}[row["label"]]
    train = write_rows(tmp_path / "train.jsonl", rows)
    flags = ["--train_file", train, "--do_train", "--num_train_epochs", "1", "--learning_rate", "5e-3"]
    run(tmp_path / "run", *flags, "--skip_outliers", "robust", "--train_sampling_strategy", "sequential")
    trace = list(read_lines(tmp_path / "run" / "abr_trace.jsonl"))
    assert [batch["step"] - 1 for batch in trace if batch["repeats"] == 0] == [40, 50]


# ---- Other tasks ----


def test_numbers_are_said_as_well(tmp_path):
    rows = [{"text": row["sentence"], "label": 4.5 * (row["label"] == "tale") + 0.25} for row in tales_and_reports(48)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["--train_file", path, "--validation_file", path, "--do_train", "--do_eval", "--num_train_epochs", "2"]
    results = run(tmp_path / "run", *flags)
    assert results["eval_pearson"] > 0.8
    assert results["eval_loss"] < 4, "squared error, below that of always saying the mean"


def test_both_validation_splits_of_mnli_are_evaluated_and_hidden_labels_predicted(tmp_path, monkeypatch):
    texts = [row["sentence"][:40] for row in tales_and_reports(9)]
    splits = {}
    for split in ("train", *(f"{kind}_{half}matched" for kind in ("validation", "test") for half in ("", "mis"))):
        shift = "mis" in split
        rows = [{"premise": text, "hypothesis": text, "label": (i + shift) % 3} for i, text in enumerate(texts)]
        splits[split] = [{**row, "label": -1} for row in rows] if "test" in split else rows
    lay_out_as_on_the_hub(tmp_path, "mnli", splits, monkeypatch)
    results = run(tmp_path / "run", "--task_name", "mnli", "--do_eval", "--do_predict")
    assert results["eval_loss"] != results["eval_mm_loss"]
    assert {"eval_accuracy", "eval_mm_accuracy"} <= results.keys()
    assert "test_accuracy" not in results
    for name in ("test", "test_mm"):
        lines = list(read_lines(tmp_path / "run" / f"{name}_predictions.jsonl"))
        assert [line["row"] for line in lines] == list(range(1, 10))
        assert all(line["prediction"] in TASKS["mnli"].labels and len(line["logits"]) == 3 for line in lines)


def test_the_best_may_be_that_of_the_lowest_loss(files, tmp_path):
    flags = ["--do_train", "--do_eval", "--load_best_model_at_end", "--metric_for_best_model", "loss", "--max_steps"]
    results = run(tmp_path / "run", *files, *flags, "4", "--save_strategy", "steps", "--save_steps", "2")
    losses = [logs["eval_loss"] for logs in log_of(tmp_path / "run") if "eval_loss" in logs][1:]
    assert results["eval_loss"] == pytest.approx(min(losses))


def test_validation_rows_are_trained_on_where_that_is_asked_for(files, tmp_path, capsys):
    flags = ["--do_train", "--do_predict", "--max_steps", "1", "--merge_validation"]
    assert "test_accuracy" in run(tmp_path / "run", *files, *flags)
    told = " ".join(capsys.readouterr().out.split())
    assert ": 86 rows to train on, 37 rows to test on labels 2 classes, in this order: report, tale" in told


def test_what_is_not_finite_predicts_nothing(tmp_path):
    path = tmp_path / "predictions.jsonl"
    logits = np.array([[0.5, 0.1], [math.nan, 0.3]])
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    write_predictions(path, TASKS["mrpc"], PredictionOutput(logits, np.array([0, 1]), {}), rows)
    lines = list(read_lines(path))
    assert lines[0].pop("input") != lines[1].pop("input")
    assert lines == [
        {"row": 1, "prediction": "not_equivalent", "label": "not_equivalent", "logits": [0.5, 0.1]},
        {"row": 2, "prediction": None, "label": "equivalent", "logits": [None, 0.3]},
    ]


def test_what_is_not_finite_is_not_judged(caplog):
    logits = np.array([[0.5, 0.1], [math.nan, 0.3], [0.2, 0.9]])
    judged = Judge(TASKS["mrpc"], SentenceArguments())(EvalPrediction(logits, np.array([0, 1, 1])))
    assert math.isnan(judged["accuracy"])
    assert math.isnan(judged["f1"])
    assert judged["non_finite_rows"] == 1
    assert "1 of 3 rows have NaN or infinite logits" in caplog.text


# ---- What is refused ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Nothing to do. Give --do_train, --do_eval or --do_predict."),
        (
            ["--do_train", "--task_name", "mrcp"],
            "Unknown --task_name 'mrcp'. Did you mean 'mrpc'? Choose from: cola, ",
        ),
        (["--do_train", "--label_column", "gold"], "has no column gold; it has sentence, label. See --label_column."),
        (["--do_train", "--classes", "no", "yes"], "is 'tale'; it must be 0 to 1 or no, yes."),
        (["--do_train", "--merge_validation", "--do_eval"], "--merge_validation trains on the validation rows"),
        (["--do_predict", "--merge_validation"], "--merge_validation trains on the validation rows"),
        (["--do_train", "--prediction_loss_only"], "--prediction_loss_only cannot be used: scores need predictions."),
        (
            ["--do_train", "--do_eval", "--load_best_model_at_end", "--metric_for_best_model", "acuracy"],
            "Unknown --metric_for_best_model 'acuracy'. Did you mean 'accuracy'?",
        ),
        (["--do_train", "--prompt", "perfekt"], "--prompt perfekt: did you mean perfect?"),
        (["--do_train", "--max_seq_length", "9999"], "--max_seq_length 9999 exceeds the model's context of 256"),
        (["--do_train", "--load_in_4bit", "--use_lora", "false"], "Quantised weights cannot be trained"),
        (["--do_train", "--model_name_or_path", "no/where"], "--model_name_or_path no/where cannot be loaded"),
    ],
)
def test_bad_input_gives_one_line_before_a_model_is_loaded(files, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(classify, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match=re.escape(message)) as caught:
        run(tmp_path / "run", *files, *flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "nothing may be half-written"


def test_an_adapter_for_texts_is_no_classifier(finished, files, tmp_path):
    _, output, _ = finished
    changed = tmp_path / "adapter_config.json"
    config = json.loads((output / "adapter_config.json").read_text())
    changed.write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    with pytest.raises(SystemExit, match="is an adapter for CAUSAL_LM, not for a sequence classifier."):
        evaluate.main(["--adapter_name_or_path", str(tmp_path), *files, "--use_cpu"])
    with pytest.raises(SystemExit, match="is an adapter, not a model. Give it as --adapter_name_or_path"):
        evaluate.main(["--model_name_or_path", str(output), *files, "--use_cpu"])
    with pytest.raises(
        SystemExit, match="Give the classifier to evaluate, as --adapter_name_or_path or --model_name_or_path."
    ):
        evaluate.main(["--use_cpu"])
    with pytest.raises(SystemExit, match=r"There are no test rows. Give --test_file."):
        evaluate.main(["--adapter_name_or_path", str(output), "--use_cpu"])


def test_help_explains_the_defaults(capsys):
    with pytest.raises(SystemExit):
        classify.main(["--help"])
    shown = capsys.readouterr().out
    for flag in ("--task_name", "--prompt", "--merge_validation", "--max_passes", "--load_in_4bit"):
        assert flag in shown
    args = classify.parse_arguments(classify.ARGUMENTS, ["--use_cpu"])[-1]
    assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs, args.seed) == (
        3e-4,
        8,
        10,
        42,
    )
    assert (args.optim, args.lr_scheduler_type, args.warmup_steps) == ("adamw_bnb_8bit", "linear", 0.06)


def test_a_run_goes_on_from_a_checkpoint_to_the_same_scores(finished, files, tmp_path):
    kind, output, results = finished
    again = shutil.copytree(output, tmp_path / "run")
    flags = ["--do_train", "--do_eval", "--do_predict", "--num_train_epochs", "2", "--load_best_model_at_end"]
    flags += [*MODELS[kind], "--prompt", "Is it a tale?"]
    resumed = run(again, *files, *flags, "--resume_from_checkpoint", str(again / "checkpoint-16"))
    assert resumed["test_loss"] == results["test_loss"]
    trained = load_file(again / "checkpoint-32" / "adapter_model.safetensors")
    assert all(
        torch.equal(tensor, trained[name])
        for name, tensor in load_file(output / "checkpoint-32" / "adapter_model.safetensors").items()
    )
