"""The card of an adapter on the Hub: what it is, what it was trained on and how, what it reached, how to load it."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .data import find_corpus
from .records import PROVENANCE, RESULTS, SUMMARY_NAME, read_json

MARKER = "<!-- Each push writes anew what follows. Write above this line: that stays. -->"

GENERATED = re.compile(r"generated automatically according to|\[More Information Needed\]|This is a PEFT adapter")
"""What the cards of transformers and PEFT say: nobody wrote those."""

LOADS = {
    True: """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "{repository}")
tokenizer = AutoTokenizer.from_pretrained("{repository}")""",
    False: """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{repository}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{repository}")""",
}


def write_card(run: Path, folder: Path, repository: str, base: str | None) -> str:
    """Return the card of a run as Markdown, with the metadata that the Hub reads.

    Args:
        run: Where `run.json` and `all_results.json` are.
        folder: What is to be pushed, with the summary of the run.
        repository: On the Hub.
        base: Id of the base model on the Hub, None where it has none.
    """
    summary = read_json(folder / SUMMARY_NAME) or {}
    results = read_json(run / RESULTS) or {}
    provenance = read_json(run / PROVENANCE) or {}
    arguments = provenance.get("arguments", {})
    adapter = read_json(folder / "adapter_config.json")
    name = repository.rpartition("/")[2]
    measured = list(perplexities(summary, results))
    given = summary.get("card", {})
    data = ModelCardData(
        language=given.get("language"),
        license=given.get("license"),
        base_model=base,
        library_name="transformers" if adapter is None else "peft",
        pipeline_tag="text-generation",
        tags=[*(["lora"] if adapter else []), "adaptive-batch-repetition", *given.get("tags", [])],
        datasets=[*dict.fromkeys([*given.get("datasets", []), *datasets_on_the_hub(arguments)])] or None,
        model_name=name,
        eval_results=[result for _, result in evaluation_results(measured, summary, arguments)] or None,
        ignore_metadata_errors=True,
    )
    lines = LOADS[adapter is not None].format(base=base or "PATH/OF/THE/BASE", repository=repository)
    what = "A LoRA adapter for" if adapter else "Fine-tuned from"
    known_base = f"[{base}](https://huggingface.co/{base})" if base else "a base model that is not on the Hub"
    parts = [
        f"# {name}\n\n{what} {known_base}, trained with adaptive batch repetition.",
        MARKER,
        f"## How to load it\n\n```python\n{lines}\n```",
        *sections(measured, summary, results, provenance, adapter, folder),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def with_what_was_written(card: str, *before: str | None) -> str:
    """Return a card with what people wrote above the marker of an earlier one, and metadata that only that one has.

    Args:
        before: Earlier cards, the one that counts most first. One without the marker is kept whole, unless it was
            generated.
    """
    new = ModelCard(card, ignore_metadata_errors=True)
    _, _, generated = card.partition(MARKER)
    for text in before:
        if text is None:
            continue
        try:
            old = ModelCard(text, ignore_metadata_errors=True)
        except Exception:  # a card with metadata that cannot be read: its text is kept
            old = ModelCard(re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL), ignore_metadata_errors=True)
        above, marker, _ = old.text.partition(MARKER)
        if not above.strip() or (not marker and GENERATED.search(above)):
            continue
        ours, theirs = metadata_of(new), metadata_of(old)
        tags = [*dict.fromkeys([*ours.get("tags", []), *theirs.get("tags", [])])]
        metadata = ModelCardData(**{**theirs, **ours, "tags": tags}, ignore_metadata_errors=True).to_yaml()
        return f"---\n{metadata}\n---\n\n{above.strip()}\n\n{MARKER}{generated}"
    return card


def metadata_of(card: ModelCard) -> dict[str, Any]:
    found: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    return found


def perplexities(summary: dict[str, Any], results: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield what was measured: when, on which split, the perplexity. What is not finite is left out."""
    found = summary.get("perplexity", {})
    for when in ("before training", "best", "final"):
        value = found.get(when.split()[0])
        if value is not None and math.isfinite(value):
            yield when, "validation", value
    if math.isfinite(results.get("test_perplexity", math.nan)):
        yield "final", "test", results["test_perplexity"]


def evaluation_results(
    measured: list[tuple[str, str, float]], summary: dict[str, Any], arguments: dict[str, Any]
) -> Iterator[tuple[str, EvalResult]]:
    kind, name = text_of(arguments)
    for when, split, value in measured:
        yield (
            when,
            EvalResult(
                task_type="text-generation",
                dataset_type=kind,
                dataset_name=name,
                dataset_split=split,
                metric_type="perplexity",
                metric_name=f"{definition_of(summary, split)}, {split}, {when}",
                metric_value=round(value, 6),
            ),
        )


def definition_of(summary: dict[str, Any], split: str) -> str:
    metric = summary.get("perplexity", {}).get("metric", "eval_perplexity")
    name = "perplexity" if split == "test" else metric.removeprefix("eval_").replace("_", " ")
    return "perplexity (token-exact)" if name == "perplexity" else name


def text_of(arguments: dict[str, Any]) -> tuple[str, str]:
    """Return the id of the data set that was evaluated on, `custom` if it is not on the Hub, and a name to show."""
    chosen = arguments.get("eval_text") or arguments.get("validation_file") or arguments.get("dataset_name")
    if not chosen:
        return "custom", "a text of their own"
    path = find_corpus(chosen).path
    if chosen == "demo" or "/" not in path or Path(chosen).exists():
        return "custom", PurePath(chosen).name
    return path, chosen


def datasets_on_the_hub(arguments: dict[str, Any]) -> list[str]:
    mix = arguments.get("dataset_mix") or ""
    names = [part.rpartition("=")[0].strip() for part in mix.split(",")] if mix else [arguments.get("dataset_name")]
    paths = [find_corpus(name).path for name in names if name and name != "demo" and not Path(name).exists()]
    return [path for path in paths if re.fullmatch(r"[\w.-]+/[\w.-]+", path)]


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
        rows = [f"| {when} | {split} | {value:.4f} |" for when, split, value in measured]
        tokens = summary.get("perplexity", {}).get("target_tokens")
        over = f" over {tokens:,} target tokens" if tokens else ""
        yield (
            "## Perplexity\n\n| when | split | "
            + definition_of(summary, "validation")
            + " |\n|---|---|---|\n"
            + "\n".join(rows)
            + f"\n\nOf {text_of(arguments)[1]}{over}. Token-exact: exp(sum of the negative log-likelihoods / number "
            "of target tokens), in blocks"
            + (f" of {arguments['block_size']} tokens" if arguments.get("block_size") else "")
            + ". Compare it only with numbers of the same tokenizer, text and definition."
        )
    pictures = sorted(path.name for path in (folder / "plots").glob("*.png")) if (folder / "plots").is_dir() else []
    if pictures:
        yield "\n\n".join(f"![{name.removesuffix('.png')}](plots/{name})" for name in pictures)
    yield "## How it was trained\n\n" + "\n".join(f"- {line}" for line in training_lines(summary, arguments, adapter))
    ledger = {key.removeprefix("train_"): value for key, value in results.items() if key.startswith("train_")}
    ledger = {**ledger, **summary.get("ledger", {})}
    spent = [
        key
        for key in ("batches", "skips", "updates", "repeats", "passes", "tokens", "flops", "seconds")
        if key in ledger
    ]
    if spent:
        shown = [f"{ledger[key]:,.4g}" if isinstance(ledger[key], float) else f"{ledger[key]:,}" for key in spent]
        yield (
            "What it cost (a pass is a forward and a backward over a batch; repeats are updates a batch):\n\n| "
            + " | ".join(spent)
            + " |\n|"
            + "---|" * len(spent)
            + "\n| "
            + " | ".join(shown)
            + " |"
        )
    commands = [provenance["argv"], *provenance.get("resumed", [])] if "argv" in provenance else []
    if commands:
        lines = "\n".join(shlex.join(["python", *masked(argv)]) for argv in commands)
        yield f"```bash\n{lines}\n```"
    versions = provenance.get("versions") or summary.get("versions", {})
    yield "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
    yield (
        "## Limits\n\nThe perplexity says how well the model predicts that text, and nothing of what it writes: it "
        "was not tested for truth, bias or safety, and has the limits of its base model. Whether repeating batches "
        "was worth its compute one run cannot show; that takes a comparison at equal cost."
    )


def training_lines(
    summary: dict[str, Any], arguments: dict[str, Any], adapter: dict[str, Any] | None
) -> Iterator[str]:
    source = arguments.get("dataset_mix") or arguments.get("train_file") or arguments.get("dataset_name")
    if source:
        shown = source if arguments.get("dataset_mix") else PurePath(source).name if Path(source).exists() else source
        config = f" ({arguments['dataset_config_name']})" if arguments.get("dataset_config_name") else ""
        yield f"data: {shown}{config}"
    if summary.get("repeat_scheduler"):
        yield f"repeat scheduler: `{summary['repeat_scheduler']}`"
    if adapter:
        targets = adapter.get("target_modules")
        shown = ", ".join(sorted(targets)) if isinstance(targets, list) else str(targets)
        yield (
            f"LoRA: r {adapter.get('r')}, alpha {adapter.get('lora_alpha')}, dropout {adapter.get('lora_dropout')}, "
            f"on {shown}"
        )
    wanted = ("learning_rate", "lr_scheduler_type", "optim", "per_device_train_batch_size", "max_passes", "seed")
    told = {**summary.get("arguments", {}), **arguments}
    shown = [f"{name} {told[name]}" for name in wanted if told.get(name) is not None]
    if shown:
        yield ", ".join(shown)


def masked(argv: list[str]) -> list[str]:
    """Return a command line without what looks like a token of the Hub."""
    return [re.sub(r"hf_\w{8,}", "hf_***", word) for word in argv]
