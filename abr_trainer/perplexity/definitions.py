"""The perplexities that people publish, by name: which text, which windows, which tokens count, and how they average.

The same model on the same test set is published as 5.47, 5.12, 8.71 and 60.98, and all of them are its perplexity.
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
"""How much of C4's validation split GPTQ, SparseGPT and Wanda are measured on."""


@dataclass(frozen=True)
class Text:
    """The rows of a data set, or the lines of a file, and what turns them into tokens.

    Attributes:
        rows: In their order; lines with their line breaks.
        rows_are_lines: Whether a row is a line of a longer text, and no document.
        is_c4: Whether they are C4, of which a part is measured by `wanda`.
    """

    rows: list[str]
    rows_are_lines: bool
    tokenizer: PreTrainedTokenizerBase
    is_c4: bool = False

    @cached_property
    def is_wikitext(self) -> bool:
        """Whether rows are lines of WikiText, by the headings of its pages."""
        return self.rows_are_lines and any(HEADING.fullmatch(row) for row in self.rows)

    @cached_property
    def trained(self) -> IntArray:
        """The tokens that `abr train` would make of it: row by row, the end of a document marked."""
        eos = self.tokenizer.eos_token_id
        end = [] if self.rows_are_lines or eos is None else [eos]
        rows = self.tokenizer(self.rows, add_special_tokens=False, verbose=False)["input_ids"]
        return np.fromiter((token for row in rows for token in (*row, *end)), np.int64)

    @cached_property
    def documents(self) -> list[tuple[str, str]]:
        """Each document that is not blank, as it is and as a model is to see it: pages of WikiText detokenized."""
        whole = self.rows
        if self.rows_are_lines:
            whole = pages_of(self.rows) if self.is_wikitext else ["".join(self.rows)]
        return [(document, shown_document(document)) for document in whole if document.strip()]

    def joined(self, between: str, rows: int | None = None) -> IntArray:
        """Return the tokens of these rows as one text, with what special tokens the tokenizer adds by itself.

        A blank row of WikiText is an empty one, as on the Hub; the lines of any other text are joined as they are.
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
        """The token that begins a text: the one that is made for it, or else the one that ends a text.

        Raises:
            ValueError: The tokenizer has neither.
        """
        tokens: tuple[int | None, ...] = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((token for token in tokens if token is not None), None)
        if found is None:
            raise ValueError("The tokenizer has no token to begin a text with, which this --definition needs.")
        return found


class Definition(ABC):
    """A way to cut a text into windows, and to make one number of their likelihoods.

    Attributes:
        name: As `--definition` takes it.
        says: What is averaged over what; printed beside the number.
        takes_stride: Whether windows may overlap.
        wants_whole_texts: Whether a part of a document would give a wrong number.
    """

    name: str
    says: str
    takes_stride = False
    wants_whole_texts = False

    @property
    def metric(self) -> str:
        """What the metrics of a run begin with: `hf_stride` of "hf-stride"."""
        return self.name.replace("-", "_")

    @abstractmethod
    def windows(self, text: Text, length: int, stride: int) -> Iterator[Window]:
        """Yield windows of at most `length` tokens."""

    def numbers(self, text: Text, windows: Sequence[Window], nlls: Sequence[float]) -> dict[str, float]:
        """Return `perplexity`, and what else goes by this definition: exp of the weighted mean over windows."""
        total = math.fsum(window.weight for window in windows)
        if total == 0:
            return {"perplexity": math.nan}
        terms = (window.weight / window.targets * nll for window, nll in zip(windows, nlls, strict=True))
        return {"perplexity": perplexity_of(math.fsum(terms) / total)}


class Token(Definition):
    """Exact: every target token counts once, whatever the windows and batches are."""

    name = "token"
    says = "exp(sum of nll / number of target tokens), tokenized row by row as for training"
    takes_stride = True

    def windows(self, text: Text, length: int, stride: int) -> Iterator[Window]:
        for begin, end, scored in spans(text.trained, length, stride):
            yield Window(text.trained[begin:end], scored, weight=scored)


class TrainerBlocks(Definition):
    """What `exp(eval_loss)` of a Trainer is over the blocks of run_clm: the tail that fills no block is dropped."""

    name = "trainer"
    says = "exp(mean over whole blocks of their mean nll), as exp(eval_loss) of Trainer on the blocks of run_clm"

    def windows(self, text: Text, length: int, stride: int) -> Iterator[Window]:
        yield from whole_windows(text.trained, length)


class HfStride(Definition):
    """The loop in the documentation of transformers, "Perplexity of fixed-length models".

    It weighs a window by one less than the tokens that are new in it, because it takes each loss for one with a target
    less; where windows overlap there is none less.
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
    """That of GPTQ (for C4 its `c4-new`), SparseGPT and Wanda: whole disjoint windows, and the tail dropped.

    WikiText's rows are joined by a blank line, documents by a space: of C4 the first 1,100, cut to 256 windows.
    """

    name = "wanda"
    says = (
        "WikiText joined by blank lines, documents by spaces (C4: 1,100 of them, 256 windows); "
        "exp(mean over whole disjoint windows of the mean nll of their length - 1 targets)"
    )

    def windows(self, text: Text, length: int, stride: int) -> Iterator[Window]:
        yield from whole_windows(published_tokens(text, length), length)


class WandaLora(Definition):
    """That of Wanda's LoRA fine-tuning: as `wanda`, but the short tail counts as a whole window."""

    name = "wanda-lora"
    says = "texts as wanda's; exp(mean over disjoint windows of their mean nll), the short tail as a whole window"

    def windows(self, text: Text, length: int, stride: int) -> Iterator[Window]:
        ids = published_tokens(text, length)
        for begin, end, scored in spans(ids, length, stride=length):
            yield Window(ids[begin:end], scored, weight=1)


class LmEval(Definition):
    """The `wikitext` task of lm-evaluation-harness: the likelihood of detokenized pages for each word of the original.

    Each token of a document is scored once, the first one after the token that begins a text. Documents that are no
    WikiText are taken as they are. Also returns `byte_perplexity` and `bits_per_byte`.
    """

    name = "lm-eval"
    says = "exp(sum of nll / number of words), by document; words and bytes of the text before it is detokenized"
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
    """The metric `perplexity` of the package evaluate: one perplexity a text, and their mean.

    The mean of perplexities is moved by its worst texts: on short lines it is ten times the others.
    """

    name = "evaluate"
    says = "mean over rows of exp(mean nll of the row), each begun by a token of its own and cut to one window"

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
    """Return the definition of this name, which a flag has given.

    Raises:
        ValueError: There is none.
    """
    return find_named(f"--{flag}", name, DEFINITIONS)


def spans(ids: IntArray, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield what `sliding_windows` does, and nothing of a text that is shorter than a window."""
    return sliding_windows(len(ids), length, stride) if len(ids) >= length else iter(())


def whole_windows(ids: IntArray, length: int) -> Iterator[Window]:
    for begin in range(0, len(ids) - length + 1, length):
        yield Window(ids[begin : begin + length], length - 1, weight=1)


def published_tokens(text: Text, length: int) -> IntArray:
    """Return the tokens of WikiText or C4 as GPTQ and its successors join and cut them."""
    if text.is_c4:
        return text.joined(" ", rows=C4_DOCUMENTS)[: C4_WINDOWS * length]
    return text.joined("\n\n" if text.rows_are_lines else " ")


# ---- Documents, and WikiText made readable ----

HEADING = re.compile(r"\s*= (?!=).*(?<!=) =\s*")
"""That of a page of WikiText. Those of its sections have more signs."""


def shown_document(document: str) -> str:
    """Return a document as a model is to see it: a page of WikiText, by its heading, detokenized."""
    first = next(line for line in document.splitlines() if line.strip())
    return detokenized(document) if HEADING.fullmatch(first) else document


def pages_of(rows: Sequence[str]) -> list[str]:
    r"""Return the pages of WikiText, each from its heading on.

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
    """Return a page of WikiText as it was written: no spaces before marks, inside brackets and quotes, or in numbers.

    The rules and their order are those of lm-evaluation-harness, so that its numbers come out.

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
