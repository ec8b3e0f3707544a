"""What people have written into a card stays when a push writes it anew: their text, and their metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

MARKER = "<!-- Each push writes anew what follows. Write above this line: that stays. -->"

RECORD = "<!-- pushed: {} -->"
"""Ends a card: what the push that wrote it has put into the repository, so that the next one can tell it apart."""

EMPTY = re.compile(r"more information needed", re.IGNORECASE)
"""What stands, many times, in the templates of transformers and PEFT that nobody has filled in."""

BLOCK = re.compile(r"\A\s*^---[ \t]*$\n(.*?)^---[ \t]*$\n?", re.DOTALL | re.MULTILINE)

OF_PEFT = ("base_model", "library_name", "pipeline_tag")
"""What PEFT writes into the card in the directory of a run each time it saves an adapter, beside tags."""

MISSING = object()


@dataclass(frozen=True)
class Card:
    """A card, taken apart.

    Attributes:
        text: All but the metadata.
        data: The metadata; empty if they cannot be read.
        written: How each entry of the metadata stands in the file, with the comments after it.
        problem: Why the metadata cannot be read.
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
        """What people have written: above the marker, or all of a card that has none; None if nothing."""
        return None if self.is_template else self.text.partition(MARKER)[0].strip() or None

    @property
    def record(self) -> dict[str, Any]:
        """What the push that wrote this card has put into the repository: `files`, `metadata`."""
        begin, end = RECORD.split("{}")
        try:
            found = json.loads(self.text.rpartition(begin)[2].partition(end)[0])
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def files(self) -> list[str]:
        """What this push had put into the repository, beside the card and checkpoints."""
        return list(self.record.get("files") or ())

    @property
    def pushed(self) -> dict[str, Any]:
        """The metadata that this push had put there."""
        return self.record.get("metadata") or {}


def read_card(content: str) -> Card:
    """Take a card apart, whatever marks of bytes and lines an editor has left in it."""
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
            break  # a line above and below a text
        data, written = {**found, **data}, {**entries, **written}
        text = text.lstrip("\ufeff")[block.end() :]
        if not text.lstrip().startswith("\ufeff"):
            break
        text = text.lstrip()  # PEFT does not know a block behind a byte order mark, and puts its own before it
    return Card(text.lstrip("\ufeff"), data, written, problem)


def entries_of(block: str) -> dict[str, str]:
    """Return each entry of a block of YAML as it is written."""
    node = yaml.compose(block, yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode) or node.flow_style:
        return {}
    ends = [key.start_mark.index for key, _ in node.value[1:]] + [len(block)]
    begins = [0, *ends]
    parts = {key.value: block[begin:end] for (key, _), begin, end in zip(node.value, begins, ends, strict=False)}
    return {name: part if part.endswith("\n") else f"{part}\n" for name, part in parts.items()}


def merged_card(card: str, remote: str | None, local: str | None, files: Sequence[str]) -> str:
    """Return a card of ours with what people wrote into earlier ones.

    Their text above the marker stays: that on the Hub, else that in the run. So does their metadata: what the last
    push did not put there is theirs. Where both say something new, this card wins over the Hub, the Hub over the run;
    lists are united.

    Args:
        card: What the push would write if there were none.
        remote: The card on the Hub.
        local: The card in the directory of the run.
        files: What the push puts into the repository.
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
    if not says(block, data):  # an anchor and what refers to it, of which one is another now
        block = dumped({name: data[name] for name in order})
    above = next((each.above for each in earlier if each.above is not None), None)
    record = json.dumps({"files": [*files], "metadata": ours.data}, default=str).replace(">", "\\u003e")
    below = ours.text.partition(MARKER)[2].rstrip()
    return f"---\n{block}---\n\n" + (f"{above}\n\n" if above else "") + f"{MARKER}{below}\n\n{RECORD.format(record)}\n"


def lost_entries(local: Card, new: Card) -> list[str]:
    """Return the names of the metadata of people in the directory of a run that a new card does not hold."""
    return [
        name
        for name, value in without_what_peft_wrote(local).items()
        if name != "model-index"  # of which all is kept that ours does not renew
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
    """Return metadata without the tags that name a base model: the Hub makes them of `base_model`."""
    if "tags" not in data:
        return data
    return {**data, "tags": [tag for tag in as_list(data["tags"]) if not str(tag).startswith("base_model:")]}


def without_what_peft_wrote(card: Card) -> dict[str, Any]:
    """Return the metadata in the directory of a run without those that PEFT writes with each adapter it saves."""
    data = without_tags_of_base({name: value for name, value in card.data.items() if name not in OF_PEFT})
    if "tags" in data:
        data["tags"] = [] if card.is_template else [tag for tag in data["tags"] if tag != "transformers"]
    return data


def merged(ours: dict[str, Any], pushed: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return metadata of ours and theirs.

    Args:
        pushed: What our last push had put there, which is not theirs.
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
    """Return the list of ours with what is theirs; theirs as it is where that is the same."""
    own = [each for each in as_list(found) if each not in as_list(before)]
    both = [*as_list(mine), *(each for each in own if each not in as_list(mine))]
    is_theirs = len(both) == len(as_list(found)) and all(each in as_list(found) for each in both)
    return found if is_theirs else both or MISSING


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is MISSING or value is None else [value]


def united_index(mine: Any, before: Any, found: Any) -> Any:
    """Return results of ours and theirs; of two on the same measure of the same text, ours."""
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
    """Return a result without its values: what was measured on what."""
    if not isinstance(result, dict):
        return result
    metrics = [{**each, "value": None} for each in result.get("metrics") or () if isinstance(each, dict)]
    return {**result, "metrics": metrics}
