"""Published definitions of perplexity, by name: how text is joined and cut into windows, which tokens count, the mean.

The same model on the same test set has published perplexities of 5.47, 5.12, 8.71 and 60.98, by different definitions.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.corpora import C4_DOCUMENTS
from ..records.errors import find_named
from .windows import IntArray, Window, perplexity_of, sliding_windows

C4_WINDOWS = 256
"""Number of windows of C4's validation split on which GPTQ, SparseGPT and Wanda report perplexity."""


@dataclass(frozen=True)
class Text:
    """The rows of a data set, or the lines of a file, and their tokenizer.

    Attributes:
        rows: The rows in order; lines with their line breaks.
        rows_are_lines: Whether each row is a line of a longer text, not a document.
        is_c4: Whether the text is C4, of which `wanda` measures only a part.
    """

    rows: list[str]
    rows_are_lines: bool
    tokenizer: PreTrainedTokenizerBase
    is_c4: bool = False

    @cached_property
    def is_wikitext(self) -> bool:
        """Whether the rows are lines of WikiText, recognised by the headings of its pages."""
        return self.rows_are_lines and any(HEADING.fullmatch(row) for row in self.rows)

    @cached_property
    def trained(self) -> IntArray:
        """The tokens as `abr train` makes them: row by row, with an end-of-text token after each document."""
        eos = self.tokenizer.eos_token_id
        end = [] if self.rows_are_lines or eos is None else [eos]
        rows = self.tokenizer(self.rows, add_special_tokens=False, verbose=False)["input_ids"]
        return np.fromiter((token for row in rows for token in (*row, *end)), np.int64)

    @cached_property
    def documents(self) -> list[tuple[str, str]]:
        """Pairs of each document that is not blank: the original, and the text for the model.

        Pages of WikiText are detokenized for the model; other documents are unchanged.
        """
        whole = self.rows
        if self.rows_are_lines:
            whole = pages_of(self.rows) if self.is_wikitext else ["".join(self.rows)]
        return [(document, shown_document(document)) for document in whole if document.strip()]

    def joined(self, between: str, rows: int | None = None) -> IntArray:
        """Return the tokens of the first rows joined into one text, with the special tokens that the tokenizer adds.

        Blank rows of WikiText count as empty, as on the Hub. Lines of any other text are joined without `between`.
        """
        if self.rows_are_lines and not self.is_wikitext:
            between = ""
        shown = (row if row.strip() or not self.is_wikitext else "" for row in self.rows[:rows])
        text = between.join(shown)
        return np.array(self.tokenizer(text, verbose=False)["input_ids"], np.int64)

    def tokens_of(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @property
    def prefix(self) -> int:
        """The token before a text: the begin-of-text token if there is one, else the end-of-text token.

        Raises:
            ValueError: The tokenizer has neither.
        """
        tokens: tuple[int | None, ...] = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((token for token in tokens if token is not None), None)
        if found is None:
            raise ValueError(
                "This --definition needs a begin-of-text or end-of-text token, but the tokenizer has none."
            )
        return found


class Definition(ABC):
    """How to cut a text into windows, and how to compute one number from their likelihoods.

    Attributes:
        name: Value of `--definition`.
        says: The formula in words; printed beside the number.
        takes_stride: Whether windows may overlap.
        wants_whole_texts: Whether a part of a document would give a wrong number.
    """

    name: str
    says: str
    takes_stride = False
    wants_whole_texts = False

    @property
    def metric(self) -> str:
        """Prefix of the metrics in a run: `hf_stride` for "hf-stride"."""
        return self.name.replace("-", "_")

    @abstractmethod
    def windows(self, text: Text, length: int, stride: int) -> Iterator[Window]:
        """Yield windows of at most `length` tokens."""

    def numbers(self, text: Text, windows: Sequence[Window], nlls: Sequence[float]) -> dict[str, float]:
        """Return `perplexity`, exp of the weighted mean over windows, and any other numbers of this definition.

        Args:
            nlls: Summed negative log-likelihood of the targets of each window, in nats.
        """
        total = math.fsum(window.weight for window in windows)
        if total == 0:
            return {"perplexity": math.nan}
        terms = (window.weight / window.targets * nll for window, nll in zip(windows, nlls, strict=True))
        return {"perplexity": perplexity_of(math.fsum(terms) / total)}


class Token(Definition):
    """Token-exact: every target token counts once, for any windows and batches."""

    name = "token"
    says = "exp(sum of nll / number of target tokens), tokenized row by row as for training"
    takes_stride = True

    def windows(self, text: Text, length: int, stride: int) -> Iterator[Window]:
        for begin, end, scored in spans(text.trained, length, stride):
            yield Window(text.trained[begin:end], scored, weight=scored)


class TrainerBlocks(Definition):
    """`exp(eval_loss)` of Trainer over the blocks of run_clm, which drops the tail that does not fill a block."""

    name = "trainer"
    says = "exp(mean over full blocks of their mean nll), as exp(eval_loss) of Trainer on the blocks of run_clm"

    def windows(self, text: Text, length: int, stride: int) -> Iterator[Window]:
        yield from whole_windows(text.trained, length)


class HfStride(Definition):
    """The loop in the documentation of transformers, "Perplexity of fixed-length models".

    It weights each window by its number of new tokens minus 1, because it assumes that the first token has no
    prediction. For overlapping windows this is wrong: all new tokens have one.
    """

    name = "hf-stride"
    says = "rows joined by blank lines; exp(sum of mean nll x (new tokens - 1) / sum of (new tokens - 1)) over windows"
    takes_stride = True

    def windows(self, text: Text, length: int, stride: int) -> Iterator[Window]:
        ids = text.joined("\n\n")
        done = 0
        for begin, end, scored in spans(ids, length, stride):
            yield Window(ids[begin:end], scored, weight=end - done - 1)
            done = end


class Wanda(Definition):
    """Perplexity of GPTQ (`c4-new` for C4), SparseGPT and Wanda: full windows without overlap; the tail is dropped.

    Rows of WikiText are joined with blank lines, documents with spaces. C4 is its first 1,100 documents, cut to 256
    windows.
    """

    name = "wanda"
    says = (
        "WikiText joined by blank lines, documents by spaces (C4: 1,100 of them, 256 windows); "
        "exp(mean over full disjoint windows of the mean nll of their length - 1 targets)"
    )

    def windows(self, text: Text, length: int, stride: int) -> Iterator[Window]:
        yield from whole_windows(published_tokens(text, length), length)


class WandaLora(Definition):
    """Perplexity of Wanda's LoRA fine-tuning: as `wanda`, but the short tail counts as a full window."""

    name = "wanda-lora"
    says = "text as for wanda; exp(mean over disjoint windows of their mean nll), the short tail as a full window"

    def windows(self, text: Text, length: int, stride: int) -> Iterator[Window]:
        ids = published_tokens(text, length)
        for begin, end, scored in spans(ids, length, stride=length):
            yield Window(ids[begin:end], scored, weight=1)


class LmEval(Definition):
    """The `wikitext` task of lm-evaluation-harness: the likelihood of detokenized pages per word of the original.

    Each token of a document is scored once; the first one follows the begin-of-text token. Documents other than
    WikiText are not changed. Also returns `byte_perplexity` and `bits_per_byte`.
    """

    name = "lm-eval"
    says = "exp(sum of nll / number of words), by document; words and bytes are counted before detokenization"
    wants_whole_texts = True

    def windows(self, text: Text, length: int, stride: int) -> Iterator[Window]:
        for document, (_, shown) in enumerate(text.documents):
            tokens = text.tokens_of(shown)
            for start in range(0, len(tokens), length):
                new = tokens[start : start + length]
                before = tokens[:start][-(length + 1 - len(new)) :] if start else [text.prefix]
                yield Window([*before, *new], len(new), weight=len(new), document=document)

    def numbers(self, text: Text, windows: Sequence[Window], nlls: Sequence[float]) -> dict[str, float]:
        seen = {window.document for window in windows}
        originals = [original for document, (original, _) in enumerate(text.documents) if document in seen]
        nll = math.fsum(nlls)
        words = sum(len(re.split(r"\s+", original)) for original in originals)
        size = sum(len(original.encode("utf-8")) for original in originals)
        return {
            "perplexity": perplexity_of(nll / words),
            "byte_perplexity": perplexity_of(nll / size),
            "bits_per_byte": nll / size / math.log(2),
        }


class Evaluate(Definition):
    """The metric `perplexity` of the package evaluate: the mean of one perplexity per text.

    The worst texts dominate this mean: on short lines it is ten times the other perplexities.
    """

    name = "evaluate"
    says = "mean over rows of exp(mean nll of the row); each row has a begin-of-text token and is cut to one window"

    def windows(self, text: Text, length: int, stride: int) -> Iterator[Window]:
        for document, row in enumerate(row for row in text.rows if row.strip()):
            ids = [text.prefix, *text.tokens_of(row)][:length]
            if len(ids) > 1:
                yield Window(ids, len(ids) - 1, weight=1, document=document)

    def numbers(self, text: Text, windows: Sequence[Window], nlls: Sequence[float]) -> dict[str, float]:
        each = [perplexity_of(nll / window.targets) for window, nll in zip(windows, nlls, strict=True)]
        return {"perplexity": math.fsum(each) / len(each)}


DEFINITIONS: dict[str, Definition] = {
    definition.name: definition
    for definition in (Token(), TrainerBlocks(), HfStride(), Wanda(), WandaLora(), LmEval(), Evaluate())
}


def find_definition(name: str, flag: str = "definition") -> Definition:
    """Return the definition with this name.

    Args:
        flag: The flag that gave the name, for messages.

    Raises:
        ValueError: There is none.
    """
    return find_named(f"--{flag}", name, DEFINITIONS)


def spans(ids: IntArray, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield the spans of `sliding_windows`; none if the text is shorter than a window."""
    return sliding_windows(len(ids), length, stride) if len(ids) >= length else iter(())


def whole_windows(ids: IntArray, length: int) -> Iterator[Window]:
    for begin in range(0, len(ids) - length + 1, length):
        yield Window(ids[begin : begin + length], length - 1, weight=1)


def published_tokens(text: Text, length: int) -> IntArray:
    """Return the tokens of a text, joined and cut as in GPTQ and its successors."""
    if text.is_c4:
        return text.joined(" ", rows=C4_DOCUMENTS)[: C4_WINDOWS * length]
    return text.joined("\n\n" if text.rows_are_lines else " ")


# ---- Documents, and detokenized WikiText ----

HEADING = re.compile(r"\s*= (?!=).*(?<!=) =\s*")
"""The heading of a page of WikiText. Headings of sections have more equals signs."""


def shown_document(document: str) -> str:
    """Return the text of a document for the model: detokenized if it begins with a heading of WikiText."""
    first = next(line for line in document.splitlines() if line.strip())
    return detokenized(document) if HEADING.fullmatch(first) else document


def pages_of(rows: Sequence[str]) -> list[str]:
    r"""Return the pages of WikiText; each begins with its heading.

    >>> pages_of(["", " = One = \n", "", " text \n", " = = Section = = \n", " = Two = \n", " more \n"])
    [' = One = \n \n text \n = = Section = = ', ' = Two = \n more ']
    """
    pages: list[list[str]] = [[]]
    for row in rows:
        if HEADING.fullmatch(row):
            pages.append([])
        pages[-1].append(row.removesuffix("\n") or " ")
    joined = ("\n".join(page) for page in pages)
    return [page for page in joined if page.strip()]


MARKS = {" @-@ ": "-", " @,@ ": ",", " @.@ ": "."} | {f" {mark} ": f"{mark} " for mark in ":;.!?,"}
ENCLOSING = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
SIGNS = {"= = = =": "====", "= = =": "===", "= =": "==", " \N{DEGREE SIGN} ": "\N{DEGREE SIGN}"}
REST = {" \n": "\n", "\n ": "\n", " N ": " 1 ", " 's": "'s"}


def detokenized(page: str) -> str:
    """Remove the spaces of a WikiText page before marks, inside brackets and quotes, and in numbers.

    The rules and their order are those of lm-evaluation-harness, so that its numbers are reproduced.

    >>> detokenized("In 1 @,@ 200 villages ( all of them ) , the ' river ' ; it 's old . ")
    "In 1,200 villages (all of them), the 'river'; it's old. "
    """
    page = _replaced(page, {"s '": "s'"} | MARKS)
    for begin, end in ENCLOSING:
        first, last = re.escape(begin), re.escape(end)
        page = re.sub(rf"{first}\s*([^{last}]*?)\s*{last}", rf"{begin}\1{end}", page)
    return _replaced(page, SIGNS | REST)


def _replaced(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text
