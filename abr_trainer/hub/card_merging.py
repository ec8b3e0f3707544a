"""Keep the text and the metadata that users added to a model card when a push writes the card again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

MARKER = "<!-- Each push writes anew what follows. Write above this line: that stays. -->"

RECORD = "<!-- pushed: {} -->"
"""Last line of a card: the files and metadata of the push that wrote it. The next push can thus recognise them."""

EMPTY = re.compile(r"more information needed", re.IGNORECASE)
"""Text that occurs several times in unchanged templates of transformers and PEFT."""

BLOCK = re.compile(r"\A\s*^---[ \t]*$\n(.*?)^---[ \t]*$\n?", re.DOTALL | re.MULTILINE)

OF_PEFT = ("base_model", "library_name", "pipeline_tag")
"""Metadata that PEFT writes into the card of a run each time it saves an adapter, in addition to tags."""

MISSING = object()


@dataclass(frozen=True)
class Card:
    """A parsed model card.

    Attributes:
        text: The card without its metadata.
        data: The metadata; empty if they cannot be read.
        written: The YAML of each entry of the metadata, with the comments after it.
        problem: Why the metadata cannot be read; None if they can.
    """

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    problem: str | None = None

    @property
    def is_template(self) -> bool:
        return MARKER not in self.text and len(EMPTY.findall(self.text)) >= 3

    @property
    def above(self) -> str | None:
        """The user's text: above the marker, or all of a card without a marker; None if there is none."""
        return None if self.is_template else self.text.partition(MARKER)[0].strip() or None

    @property
    def record(self) -> dict[str, Any]:
        """The `files` and `metadata` of the push that wrote this card."""
        begin, end = RECORD.split("{}")
        try:
            found = json.loads(self.text.rpartition(begin)[2].partition(end)[0])
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def files(self) -> list[str]:
        """The files of that push, without the card and checkpoints."""
        return list(self.record.get("files") or ())

    @property
    def pushed(self) -> dict[str, Any]:
        """The metadata of that push."""
        return self.record.get("metadata") or {}


def read_card(content: str) -> Card:
    """Parse a card with any line endings and byte order marks."""
    text = content.replace("\r\n", "\n").replace("\r", "\n")
    data: dict[str, Any] = {}
    written: dict[str, str] = {}
    problem = None
    while block := BLOCK.match(text.lstrip("\ufeff")):
        try:
            found, entries = yaml.safe_load(block[1]) or {}, entries_of(block[1])
        except yaml.YAMLError as error:
            line = getattr(getattr(error, "problem_mark", None), "line", None)
            problem = getattr(error, "problem", None) or "it cannot be read"
            problem += "" if line is None else f", line {line + 2}"
            found, entries = {}, {}
        if not isinstance(found, dict):
            break  # text between two horizontal lines
        data, written = {**found, **data}, {**entries, **written}
        text = text.lstrip("\ufeff")[block.end() :]
        if not text.lstrip().startswith("\ufeff"):
            break
        text = text.lstrip()  # PEFT does not recognise metadata after a byte order mark, and adds its own before them
    return Card(text.lstrip("\ufeff"), data, written, problem)


def entries_of(block: str) -> dict[str, str]:
    """Return the text of each entry of a YAML block."""
    node = yaml.compose(block, yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode) or node.flow_style:
        return {}
    ends = [key.start_mark.index for key, _ in node.value[1:]] + [len(block)]
    begins = [0, *ends]
    parts = {key.value: block[begin:end] for (key, _), begin, end in zip(node.value, begins, ends, strict=False)}
    return {name: part if part.endswith("\n") else f"{part}\n" for name, part in parts.items()}


def merged_card(card: str, remote: str | None, local: str | None, files: Sequence[str]) -> str:
    """Return our new card with the user's additions to earlier cards.

    The user's text above the marker stays: that on the Hub, or else that in the run. So do the user's metadata, which
    are all that the last push did not write. If values conflict, the new card overrides the Hub, and the Hub overrides
    the run; lists are merged.

    Args:
        card: The new card without any additions.
        remote: The card on the Hub.
        local: The card in the directory of the run.
        files: The files of this push.
    """
    ours = read_card(card)
    earlier = []
    data = ours.data
    if remote is not None:
        earlier.append(read_card(remote))
        data = merged(data, earlier[-1].pushed, without_tags_of_base(earlier[-1].data))
    if local is not None:
        earlier.append(read_card(local))
        data = merged(data, earlier[-1].pushed, without_what_peft_wrote(earlier[-1]))
    read: dict[str, Any] = {}
    written: dict[str, str] = {}
    for each in earlier[::-1]:
        read |= each.data
        written |= each.written
    order = dict.fromkeys([name for each in earlier for name in each.data if name in data] + [*data])
    entries = {
        name: written[name] if name in written and read[name] == data[name] else dumped({name: data[name]})
        for name in order
    }
    block = "".join(entries.values())
    if not says(block, data):  # e.g. an anchor or its alias has changed
        block = dumped({name: data[name] for name in order})
    above = next((each.above for each in earlier if each.above is not None), None)
    record = json.dumps({"files": [*files], "metadata": ours.data}, default=str).replace(">", "\\u003e")
    below = ours.text.partition(MARKER)[2].rstrip()
    return f"---\n{block}---\n\n" + (f"{above}\n\n" if above else "") + f"{MARKER}{below}\n\n{RECORD.format(record)}\n"


def lost_entries(local: Card, new: Card) -> list[str]:
    """Return the names of the user's metadata in the card of a run that are missing from a new card."""
    return [
        name
        for name, value in without_what_peft_wrote(local).items()
        if name != "model-index"  # its results are kept, unless ours replace them
        and value != local.pushed.get(name, MISSING)
        and not all(each in as_list(new.data.get(name)) for each in as_list(value))
    ]


def dumped(data: dict[str, Any]) -> str:
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def says(block: str, data: dict[str, Any]) -> bool:
    try:
        return bool(yaml.safe_load(block) == data)
    except yaml.YAMLError:
        return False


def without_tags_of_base(data: dict[str, Any]) -> dict[str, Any]:
    """Return metadata without the tags for the base model, which the Hub creates from `base_model`."""
    if "tags" not in data:
        return data
    return {**data, "tags": [tag for tag in as_list(data["tags"]) if not str(tag).startswith("base_model:")]}


def without_what_peft_wrote(card: Card) -> dict[str, Any]:
    """Return the metadata of a run's card without those that PEFT writes when it saves an adapter."""
    data = without_tags_of_base({name: value for name, value in card.data.items() if name not in OF_PEFT})
    if "tags" in data:
        data["tags"] = [] if card.is_template else [tag for tag in data["tags"] if tag != "transformers"]
    return data


def merged(ours: dict[str, Any], pushed: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Merge our metadata with the user's.

    Args:
        pushed: The metadata of our last push, which are not the user's.
    """
    result: dict[str, Any] = {}
    for name in dict.fromkeys([*ours, *theirs]):
        mine, before, found = (each.get(name, MISSING) for each in (ours, pushed, theirs))
        if found is MISSING or found == before:
            value = mine
        elif name == "model-index":
            value = united_index(mine, before, found)
        elif isinstance(mine, list) or isinstance(found, list):
            value = united(mine, before, found)
        else:
            value = found if mine is MISSING or mine == before else mine
        if value is not MISSING:
            result[name] = value
    return result


def united(mine: Any, before: Any, found: Any) -> Any:
    """Return our list with the user's entries added; the user's list unchanged if the entries are the same."""
    own = [each for each in as_list(found) if each not in as_list(before)]
    both = [*as_list(mine), *(each for each in own if each not in as_list(mine))]
    is_theirs = len(both) == len(as_list(found)) and all(each in as_list(found) for each in both)
    return found if is_theirs else both or MISSING


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is MISSING or value is None else [value]


def united_index(mine: Any, before: Any, found: Any) -> Any:
    """Merge our results with the user's. Of two results for the same metric and data, ours is used."""
    own = list(as_list(mine))
    pushed = [result for entry in as_list(before) for result in entry["results"]]
    for entry in as_list(found):
        if not isinstance(entry, dict) or not isinstance(entry.get("results"), list):
            continue
        left = [each for each in entry["results"] if each not in pushed]
        same = next((index for index, each in enumerate(own) if each["name"] == entry.get("name")), None)
        if same is not None:
            new = own[same]["results"]
            renewed = [measured(each) for each in new]
            own[same] = {**own[same], "results": [*new, *(each for each in left if measured(each) not in renewed)]}
        elif left:
            own.append({**entry, "results": left})
    return own or MISSING


def measured(result: Any) -> Any:
    """Return a result without its values, to compare metric and data."""
    if not isinstance(result, dict):
        return result
    metrics = [{**each, "value": None} for each in result.get("metrics") or () if isinstance(each, dict)]
    return {**result, "metrics": metrics}
