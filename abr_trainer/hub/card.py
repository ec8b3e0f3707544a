"""Write the model card of a run: what the model is, its data, training and results, and how to load it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..comparison.scores import OF_CLASSIFIERS
from ..data.corpora import find_corpus, parse_mix
from ..data.tasks import BY_NAME, DEMO, GLUE, TASKS, ask
from ..perplexity.definitions import DEFINITIONS, Definition
from ..records.commands import commands_in, pasted
from ..records.files import PROVENANCE, RESULTS, SUMMARY_NAME, read_json
from ..report.markdown import code, fenced, plain
from ..report.text import escaped
from .card_merging import MARKER
from .local_names import is_id, is_on_the_hub, local_path

PICTURES = {
    "perplexity": "Validation perplexity over the passes spent",
    "batches": "First-pass loss of each batch, and whether it was repeated or skipped",
}

AUTO_CLASSES = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", None),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
}
"""Auto class and task of a model, by the end of the name of its class."""


def write_card(
    run: Path, folder: Path, repository: str, revision: str | None, base: str | None, rows: int | None = None
) -> str:
    """Return the card of a run as Markdown, with metadata for the Hub.

    Args:
        run: The directory with `run.json`.
        folder: The files to push, with summary and results.
        repository: Id of the repository on the Hub, or the path of a directory.
        revision: The branch to push to; None for main.
        base: Id of the base model on the Hub; None if it is not there.
        rows: Number of embeddings that the base model needs for the adapter; None if it need not be resized.
    """
    summary = read_json(folder / SUMMARY_NAME) or {}
    results = read_json(folder / RESULTS) or {}
    provenance = read_json(run / PROVENANCE) or {}
    provenance["arguments"] = arguments = with_local_paths(provenance.get("arguments", {}), run)
    adapter = read_json(folder / "adapter_config.json")
    name = PurePath(repository).name or run.absolute().name
    auto_class, task = auto_class_of(summary.get("model", "LlamaForCausalLM"))
    measured = list(perplexities(summary, results))
    given = summary.get("card", {})
    kind = (adapter or {}).get("peft_type", "").lower()
    data = ModelCardData(
        language=given.get("language"),
        license=given.get("license"),
        base_model=base,
        library_name="transformers" if adapter is None else "peft",
        pipeline_tag=task,
        tags=[*([kind] if kind else []), "adaptive-batch-repetition", *given.get("tags", [])],
        datasets=[*dict.fromkeys([*given.get("datasets", []), *datasets_on_the_hub(arguments)])] or None,
        model_name=name,
        eval_results=[
            *evaluation_results(measured, summary, arguments),
            *classification_results(results, arguments),
        ]
        or None,
        ignore_metadata_errors=True,
    )
    what = f"An adapter ({kind}) for" if adapter else "Fine-tuned from"
    known_base = f"[{base}](https://huggingface.co/{base})" if base else "a base model that is not on the Hub"
    parts = [
        MARKER,
        f"# {plain(name)}\n\n{what} {known_base}, trained with adaptive batch repetition.",
        "## How to load it\n\n```python\n"
        + "\n".join(
            loading_lines(
                auto_class,
                repository,
                revision,
                base or (adapter or {}).get("base_model_name_or_path"),
                rows,
                adapter is not None,
                labels_of(arguments, run),
            )
        )
        + "\n```",
        *sections(measured, summary, results, provenance, adapter, folder),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def loading_lines(
    auto_class: str,
    repository: str,
    revision: str | None,
    base: str | None,
    rows: int | None,
    is_adapter: bool,
    labels: Sequence[str] | None = None,
) -> Iterator[str]:
    branch = f", revision={_quoted(revision)}" if revision else ""
    if not is_adapter:
        yield f"from transformers import {auto_class}, AutoTokenizer"
        yield f'model = {auto_class}.from_pretrained({_quoted(repository)}, dtype="auto"{branch})'
    else:
        yield "from peft import PeftModel"
        yield f"from transformers import {auto_class}, AutoTokenizer"
        counted = ""
        if labels:
            yield f"labels = {_quoted(labels)}"
            yield "ids = {label: index for index, label in enumerate(labels)}"
            counted = ", id2label=dict(enumerate(labels)), label2id=ids"
        elif labels is not None:
            counted = ", num_labels=1"
        yield f'base = {auto_class}.from_pretrained({_quoted(base or "PATH/OF/THE/BASE")}{counted}, dtype="auto")'
        if rows is not None:
            yield f"base.resize_token_embeddings({rows})"
        yield f"model = PeftModel.from_pretrained(base, {_quoted(repository)}{branch})"
    yield f"tokenizer = AutoTokenizer.from_pretrained({_quoted(repository)}{branch})"
    if labels is not None:
        yield "model.config.pad_token_id = tokenizer.pad_token_id"


def _quoted(value: Any) -> str:
    """Return a text, or a list of texts, as Python writes it, on one line."""
    return escaped(json.dumps(value, ensure_ascii=False))


def auto_class_of(model: str) -> tuple[str, str | None]:
    return next((found for end, found in AUTO_CLASSES.items() if model.endswith(end)), ("AutoModel", None))


def perplexities(summary: dict[str, Any], results: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield when, on which split and which perplexity was measured. NaN and infinite values are left out."""
    found = summary.get("perplexity", {})
    for when in ("before training", "best", "final"):
        value = found.get(when.split()[0])
        if value is not None and math.isfinite(value):
            yield when, "validation", value
    if math.isfinite(results.get("test_perplexity", math.nan)):
        yield "final", "test", results["test_perplexity"]


def evaluation_results(
    measured: list[tuple[str, str, float]], summary: dict[str, Any], arguments: dict[str, Any]
) -> Iterator[EvalResult]:
    for when, split, value in measured:
        kind, name, config = text_of(arguments, split)
        yield EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=name,
            dataset_config=config,
            dataset_split=split,
            metric_type="perplexity",
            metric_name=f"perplexity ({definition_of(summary, split).name}), {split}, {when}",
            metric_value=round(value, 6),
        )


def labels_of(arguments: dict[str, Any], run: Path | None = None) -> list[str] | None:
    """Return the labels of a classifier, an empty list for a regression, None for any other model.

    Args:
        run: The run whose `config.json` has the labels. Without it, they are taken from the arguments.
    """
    if "prompt_text" not in arguments:
        return None
    task = BY_NAME.get(arguments.get("task_name") or "")
    told = list(task.labels if task else arguments.get("classes") or ())
    config = (read_json(run / "config.json") if told and run else None) or {}
    return list(config.get("id2label", {}).values()) or told


def classification_scores(results: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield split, name and value of the final scores of a classifier."""
    for split, prefix in {"validation": "eval", "validation, mismatched": "eval_mm", "test": "test"}.items():
        for score in OF_CLASSIFIERS:
            value = results.get(f"{prefix}_{score.name}")
            if isinstance(value, float) and math.isfinite(value):
                yield split, score.name, value


def classification_results(results: dict[str, Any], arguments: dict[str, Any]) -> Iterator[EvalResult]:
    for split, score, value in classification_scores(results):
        kind, name, config = rows_of(arguments, split)
        yield EvalResult(
            task_type="text-classification",
            dataset_type=kind,
            dataset_name=name,
            dataset_config=config,
            dataset_split=split.partition(",")[0],
            metric_type=score,
            metric_name=f"{score}, {split}",
            metric_value=round(value, 6),
        )


def rows_of(arguments: dict[str, Any], split: str) -> tuple[str, str, str | None]:
    """Return the source of a classifier's split, like `text_of`."""
    file, named, task = arguments.get(f"{split}_file"), arguments.get("dataset_name"), arguments.get("task_name")
    if file:
        return "custom", PurePath(file).name, None
    if named:
        path = id_on_the_hub(named)
        return path or "custom", path or PurePath(named).name, arguments.get("dataset_config_name")
    return (GLUE, task, task) if task in TASKS else ("custom", task or "a file of their own", None)


def definition_of(summary: dict[str, Any], split: str) -> Definition:
    """Return the definition of perplexity for a split of a run; for the test split it is always `token`."""
    metric = summary.get("perplexity", {}).get("metric")
    found = (each for each in DEFINITIONS.values() if metric == f"eval_{each.metric}_perplexity" and split != "test")
    return next(found, DEFINITIONS["token"])


def text_of(arguments: dict[str, Any], split: str) -> tuple[str, str, str | None]:
    """Return the source of a split: id of the data set, or "custom" if it is not on the Hub; name; configuration."""
    file = arguments.get(f"{split}_file")
    chosen = arguments.get("eval_text") if split == "validation" else None
    named = names_of_data_sets(arguments)
    if chosen is None and file is not None:
        return "custom", PurePath(file).name, None
    if chosen is None and not named:
        return "custom", PurePath(arguments.get("train_file") or "a text of their own").name, None
    name = chosen or named[0]
    path = id_on_the_hub(name)
    if path is None:
        return "custom", PurePath(name).name, None
    config = find_corpus(name).config if chosen else arguments.get("dataset_config_name") or find_corpus(name).config
    return path, name, config


def names_given_to(run: Path) -> list[str | None]:
    """Return the names of models and texts that a run was given, which may be paths or ids on the Hub."""
    arguments = (read_json(run / PROVENANCE) or {}).get("arguments", {})
    return [arguments.get("model_name_or_path"), arguments.get("eval_text"), *names_of_data_sets(arguments)]


def names_of_data_sets(arguments: dict[str, Any]) -> list[str]:
    mix = arguments.get("dataset_mix")
    return list(parse_mix(mix)) if mix else [name for name in [arguments.get("dataset_name")] if name]


def id_on_the_hub(name: str) -> str | None:
    """Return the id of a data set on the Hub; None if it is only on this machine."""
    path = find_corpus(name).path
    return path if name != DEMO and is_on_the_hub(path) else None


def with_local_paths(arguments: dict[str, Any], run: Path) -> dict[str, Any]:
    """Return the arguments of a run; names of data sets that were paths for the run are written as paths.

    >>> named_as_path("mine/texts", None), named_as_path("mine/texts", Path("/data/mine/texts"))
    ('mine/texts', './mine/texts')
    """
    named = {name: named_as_path(name, local_path(name, run)) for name in names_of_data_sets(arguments)}
    text = arguments.get("eval_text")
    mix = parse_mix(arguments["dataset_mix"]) if arguments.get("dataset_mix") else {}
    return {
        **arguments,
        "dataset_name": named.get(arguments.get("dataset_name") or "", arguments.get("dataset_name")),
        "eval_text": text and named_as_path(text, local_path(text, run)),
        "dataset_mix": ",".join(f"{named[name]}={share:g}" for name, share in mix.items()) or None,
    }


def named_as_path(name: str, path: Path | None) -> str:
    return name if path is None or not is_id(name) else f"./{name}"


def datasets_on_the_hub(arguments: dict[str, Any]) -> list[str]:
    if arguments.get("task_name") in TASKS and not (arguments.get("train_file") or arguments.get("dataset_name")):
        return [GLUE]
    return [path for name in names_of_data_sets(arguments) if (path := id_on_the_hub(name))]


def sections(
    measured: list[tuple[str, str, float]],
    summary: dict[str, Any],
    results: dict[str, Any],
    provenance: dict[str, Any],
    adapter: dict[str, Any] | None,
    folder: Path,
) -> Iterator[str]:
    arguments = provenance.get("arguments", {})
    if measured:
        rows = [
            f"| {when} | {split} | {definition_of(summary, split).name} | {value:.4f} |"
            for when, split, value in measured
        ]
        texts = dict.fromkeys(text_of(arguments, split)[1] for _, split, _ in measured)
        tokens = summary.get("perplexity", {}).get("target_tokens")
        counted = f", {tokens:,} target tokens of the validation split" if tokens else ""
        block = f", in blocks of {arguments['block_size']} tokens" if arguments.get("block_size") else ""
        said = {each.name: each.says for _, split, _ in measured for each in [definition_of(summary, split)]}
        yield (
            "## Perplexity\n\n| when | split | definition | perplexity |\n|---|---|---|---|\n"
            + "\n".join(rows)
            + f"\n\nMeasured on {' and '.join(map(plain, texts))}{counted}{block}. "
            + " ".join(f"`{name}` is {says}." for name, says in said.items())
            + " Compare only with numbers of the same tokenizer, text and definition."
        )
    if scores := list(classification_scores(results)):
        yield "## Scores\n\n| split | score | value |\n|---|---|---|\n" + "\n".join(
            f"| {split} | {score} | {value:.4f} |" for split, score, value in scores
        )
    pictures = [name for name in PICTURES if (folder / "plots" / f"{name}.png").exists()]
    if pictures:
        yield "\n\n".join(f"![{PICTURES[name]}](plots/{name}.png)" for name in pictures)
    yield "## How it was trained\n\n" + "\n".join(f"- {line}" for line in training_lines(summary, arguments, adapter))
    ledger = summary.get("ledger", {})
    spent = [
        key
        for key in ("batches", "skips", "updates", "repeats", "passes", "tokens", "flops", "seconds")
        if key in ledger
    ]
    if spent:
        shown = [f"{ledger[key]:,.4g}" if isinstance(ledger[key], float) else f"{ledger[key]:,}" for key in spent]
        yield (
            "Cost (a pass is one forward and backward pass over a batch; repeats are updates per batch):\n\n| "
            + " | ".join(spent)
            + " |\n|"
            + "---|" * len(spent)
            + "\n| "
            + " | ".join(shown)
            + " |"
        )
    commands = commands_in(provenance)
    if commands:
        yield fenced([pasted(masked(argv)) for argv in commands], "bash")
    versions = provenance.get("versions") or summary.get("versions", {})
    yield "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
    what = (
        "The perplexity measures how well the model predicts that text, not the quality of the text that it writes"
        if labels_of(arguments) is None
        else "The scores are for rows like those that it was trained on, with the same prompt"
    )
    yield (
        f"## Limits\n\n{what}. The model was not tested for truth, bias or safety, and has the limits of its base "
        "model. One run cannot show whether repeating batches was worth its compute; that needs a comparison at equal "
        "cost."
    )


def data_lines(arguments: dict[str, Any]) -> Iterator[str]:
    if labels_of(arguments) is not None:
        task = arguments.get("task_name")
        kind, name, config = rows_of(arguments, "train")
        if labels := labels_of(arguments):
            yield f"labels: {', '.join(f'{index} {plain(name)}' for index, name in enumerate(labels))}"
        yield f"data: {plain(name if kind == 'custom' else kind)}{f' ({plain(config)})' if config else ''}"
        columns = BY_NAME[task].columns if task else arguments["sentence_columns"]
        yield f"input: {code(ask(arguments['prompt_text'], [f'{{{column}}}' for column in columns]))}"
        return
    source = arguments.get("dataset_mix") or arguments.get("train_file") or arguments.get("dataset_name")
    if source:
        config = f" ({plain(arguments['dataset_config_name'])})" if arguments.get("dataset_config_name") else ""
        if arguments.get("dataset_mix"):
            shares = parse_mix(source)
            named = ",".join(
                f"{name if id_on_the_hub(name) else PurePath(name).name}={shares[name]:g}" for name in shares
            )
        else:
            is_file = arguments.get("train_file") or id_on_the_hub(source) is None
            named = PurePath(source).name if is_file else source
        yield f"data: {plain(named)}{config}"
    if arguments.get("chat_template"):
        yield f"chat template: {plain(PurePath(arguments['chat_template']).name)}, saved with the tokenizer"
    targets = {"assistant_only_loss": "the assistant's tokens", "completion_only_loss": "the tokens after the prompts"}
    if told := [what for flag, what in targets.items() if arguments.get(flag)]:
        yield f"targets of training and evaluation: {' and '.join(told)}"


def training_lines(
    summary: dict[str, Any], arguments: dict[str, Any], adapter: dict[str, Any] | None
) -> Iterator[str]:
    yield from data_lines(arguments)
    if summary.get("repeat_scheduler"):
        yield f"repeat scheduler: {code(summary['repeat_scheduler'])}"
    if adapter and adapter.get("peft_type") == "LORA":
        targets = adapter.get("target_modules")
        shown = ", ".join(sorted(targets)) if isinstance(targets, list) else str(targets)
        scale = f"r {adapter.get('r')}, alpha {adapter.get('lora_alpha')}, dropout {adapter.get('lora_dropout')}"
        yield f"LoRA: {scale}, on {plain(shown)}"
    told = {name: value for name, value in summary.get("arguments", {}).items() if value not in (None, -1)}
    if told:
        yield ", ".join(f"{name} {plain(str(value))}" for name, value in told.items())


def masked(argv: list[str]) -> list[str]:
    """Return a command line without Hub tokens and without the directories of files.

    >>> masked(["--train_file", "/home/me/talk.jsonl", "--dataset_mix=../mine.txt=0.5,wikitext=0.5", "runs/a"])
    ['--train_file', 'talk.jsonl', '--dataset_mix=mine.txt=0.5,wikitext=0.5', 'runs/a']
    """
    words = [re.sub(r"hf_\w{8,}", "hf_***", word) for word in argv]
    return [re.sub(r"(^|(?<=[=,]))(~|\.\.)?/([^/,=]+/)*(?=[^/,=])", "", word) for word in words]
