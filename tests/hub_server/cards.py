"""What the Hub refuses in a model card's metadata, as far as its answers are known."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import EvalResult, model_index_to_eval_results

# The common ones of the identifiers in the Hub's documentation of licenses.
LICENSES = (
    *("apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0"),
    *("afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc", "cc0-1.0", "cc-by-4.0"),
    *("cc-by-3.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0"),
    *("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "wtfpl", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gpl", "gpl-2.0", "gpl-3.0"),
    *("lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "mpl-2.0", "odc-by", "odbl", "unlicense", "zlib", "pddl", "llama2"),
    *("llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "deepfloyd-if-license", "unknown", "other"),
)
# ISO 639-1. Of codes with three letters only the form is looked at.
LANGUAGES = """
aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el
en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu
ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na
nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so
sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
"""
HUB_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Return what is wrong with the metadata of a card, and what is to be warned of."""
    try:
        metadata = read_metadata(text)
    except yaml.YAMLError as error:
        return [f"YAML metadata cannot be parsed: {error}"], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["YAML metadata must be an object"], []
    return list(errors_of(metadata)), []


def read_metadata(text: str) -> Any:
    block = REGEX_YAML_BLOCK.search(text)
    return yaml.safe_load(block[2]) if block else None


def errors_of(metadata: dict[str, Any]) -> Iterator[str]:
    for name, license in entries(metadata, "license"):
        if license not in LICENSES:
            yield f"{name} must be one of [{', '.join(LICENSES)}]"
    for name, language in entries(metadata, "language"):
        if not isinstance(language, str):
            yield f"{name} must be a string"
        elif language != language.lower():
            yield f"{name} must only contain lowercase characters"
        elif language not in (*LANGUAGES.split(), "code", "multilingual") and not re.fullmatch("[a-z]{3}", language):
            yield (
                f"{name} with value {language!r} is not valid. It must be an ISO 639-1, 639-2 or 639-3 code "
                '(two/three letters), or a special value like "code", "multilingual".'
            )
    for field, page in (("base_model", "models"), ("datasets", "datasets")):
        for name, value in entries(metadata, field):
            if not isinstance(value, str):
                yield f"{name} must be a string"
            elif not HUB_ID.fullmatch(value):
                yield f'{name} with value "{value}" is not valid. Use an id from https://hf.co/{page}.'
    for name, tag in entries(metadata, "tags"):
        if not isinstance(tag, str):
            yield f"{name} must be a string"
    for field in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if not isinstance(metadata.get(field, ""), str):
            yield f'"{field}" must be a string'
    if "model-index" in metadata:
        yield from errors_of_index(metadata["model-index"])


def entries(metadata: dict[str, Any], field: str) -> Iterator[tuple[str, Any]]:
    """Yield the name, as an error says it, and the value of each entry; a value alone is its only entry."""
    value = metadata.get(field, [])
    if isinstance(value, list):
        yield from ((f'"{field}[{i}]"', each) for i, each in enumerate(value))
    else:
        yield f'"{field}"', value


def errors_of_index(index: Any) -> Iterator[str]:
    """Yield what is wrong with results: the client's own reading of them, then the types that it takes on trust."""
    if not isinstance(index, list):
        yield '"model-index" must be an array'
        return
    try:
        name, results = model_index_to_eval_results(index)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        yield f'"model-index" is malformed: {error!r}'
        return
    if not isinstance(name, str):
        yield '"model-index[0].name" must be a string'
    for i, result in enumerate(results):
        yield from (f'"model-index" in its metric {i}: {each}' for each in errors_of_result(result))


def errors_of_result(result: EvalResult) -> Iterator[str]:
    for part in ("task_type", "dataset_type", "dataset_name", "metric_type"):
        if not isinstance(getattr(result, part), str):
            yield f'"{part.replace("_", ".")}" is required, and must be a string'
    for part in ("task_name", "dataset_config", "dataset_split", "metric_name", "source_name", "source_url"):
        if not isinstance(getattr(result, part), str | None):
            yield f'"{part.replace("_", ".")}" must be a string'
    if isinstance(result.dataset_type, str) and not HUB_ID.fullmatch(result.dataset_type):
        yield f'"dataset.type" with value "{result.dataset_type}" is not valid. Use an id from https://hf.co/datasets.'
    if result.metric_value is None:
        yield '"metric.value" is required'
