"""The data sets that go by a short name, and how a mix of several is written; needs no library to read them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Corpus:
    """A data set on the Hub that goes by a short name.

    Attributes:
        rows_are_lines: A row is a line of a longer text, and nothing marks its end.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    streaming: bool = False
    rows_are_lines: bool = False


C4_DOCUMENTS = 1100
"""Documents of C4 that published perplexities are measured on."""

CORPORA = {
    "wikitext": Corpus("Salesforce/wikitext", config="wikitext-2-raw-v1", rows_are_lines=True),
    # The data set is a loading script, which `datasets` no longer runs: read what the Hub converted it to.
    "dailydialog": Corpus("li2017dailydialog/daily_dialog", revision="refs/convert/parquet"),
    "c4": Corpus("allenai/c4", config="en", streaming=True),
}


def find_corpus(name: str) -> Corpus:
    """Return the corpus of this short name or path; any other name stands for itself."""
    by_path = {corpus.path: corpus for corpus in CORPORA.values()}
    return CORPORA.get(name) or by_path.get(name) or Corpus(name)


def parse_mix(mix: str) -> dict[str, float]:
    """Return the probability of each data set of a `--dataset_mix`.

    >>> parse_mix("wikitext=0.7,my/texts.jsonl=0.3")
    {'wikitext': 0.7, 'my/texts.jsonl': 0.3}

    Raises:
        ValueError: A part is no `name=probability`, a name stands twice, or they do not sum to 1.
    """
    shares: dict[str, float] = {}
    for part in mix.split(","):
        name, _, share = part.strip().rpartition("=")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not name or not 0 < value < 1 or name in shares:
            raise ValueError(
                f"--dataset_mix {mix}: {part.strip()!r} is not a name of its own with a probability between 0 and 1, "
                "as in wikitext=0.5,c4=0.5."
            )
        shares[name] = value
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"--dataset_mix {mix}: the probabilities sum to {sum(shares.values()):g}, not to 1.")
    return shares
