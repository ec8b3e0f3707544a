"""Data sets with a short name, and the format of `--dataset_mix`. Imports no library."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Corpus:
    """A data set on the Hub with a short name.

    Attributes:
        rows_are_lines: Each row is a line of a longer text, so no end-of-text token follows it.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    streaming: bool = False
    rows_are_lines: bool = False


C4_DOCUMENTS = 1100
"""Number of C4 documents in published perplexity measurements."""

CORPORA = {
    "wikitext": Corpus("Salesforce/wikitext", config="wikitext-2-raw-v1", rows_are_lines=True),
    # The data set is a loading script, which `datasets` no longer runs. Read the Hub's conversion to Parquet.
    "dailydialog": Corpus("li2017dailydialog/daily_dialog", revision="refs/convert/parquet"),
    "c4": Corpus("allenai/c4", config="en", streaming=True),
}


def find_corpus(name: str) -> Corpus:
    """Return the corpus with this short name or path; for any other name, a corpus with that path."""
    by_path = {corpus.path: corpus for corpus in CORPORA.values()}
    return CORPORA.get(name) or by_path.get(name) or Corpus(name)


def parse_mix(mix: str) -> dict[str, float]:
    """Return the probability of each data set of a `--dataset_mix`.

    >>> parse_mix("wikitext=0.7,my/texts.jsonl=0.3")
    {'wikitext': 0.7, 'my/texts.jsonl': 0.3}

    Raises:
        ValueError: A part is not `name=probability`, a name occurs twice, or the probabilities do not sum to 1.
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
                f"--dataset_mix {mix}: {part.strip()!r} must be a name, given once, with a probability between 0 and "
                "1, e.g. wikitext=0.5,c4=0.5."
            )
        shares[name] = value
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"--dataset_mix {mix}: the probabilities sum to {sum(shares.values()):g}, not to 1.")
    return shares
