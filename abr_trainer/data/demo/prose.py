"""Generate seeded, English-like prose in two registers, from plain to difficult, with broken passages on request.

Sentences come from a small grammar over word lists. Difficult passages use rarer words (a flatter Zipf distribution)
and more modifiers. No text is quoted.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Register = Literal["tale", "report"]


@dataclass(frozen=True)
class Lexicon:
    """The words and sentence frames of one register, most frequent first.

    In a frame, `N` is a noun phrase, `V` a verb, `A` an adjective, `P` a circumstance, `C` a clause and `D` a number.
    """

    nouns: str
    adjectives: str
    verbs: str
    circumstances: tuple[str, ...]
    clauses: tuple[str, ...]
    frames: tuple[str, ...]


TALE = Lexicon(
    nouns="girl boy dog farmer river king cat queen miller bird wolf garden lamp goat baker boat bridge apple mother "
    "tree hill kettle lantern soldier fox basket shepherd mouse window stone barrel cloak sailor hen orchard ladder "
    "spoon blacksmith cottage pony candle harbour weaver beehive whistle acorn mitten turnip owl thimble",
    adjectives="old little big red kind cold happy quiet brave tired hungry green bright wooden gentle proud golden "
    "silver muddy clever lonely crooked sleepy merry pale stubborn velvet nimble drowsy freckled",
    verbs="saw found took liked followed called carried lost wanted heard pulled washed fed hid helped opened chased "
    "painted mended kissed buried counted borrowed whistled-to scolded tickled rescued polished",
    circumstances=(
        "in the morning",
        "by the river",
        "under the hill",
        "after supper",
        "on the way home",
        "before the rain came",
        "behind the barn",
        "at the edge of the wood",
        "all winter long",
        "without a word",
    ),
    clauses=(
        "because the N was late",
        "and then they laughed",
        "but nobody knew why",
        "so the N ran away",
        "while the N slept",
        "until the N came back",
        "as if the N had asked for it",
        "though the N shook its head",
    ),
    frames=(
        "The N V the N P.",
        "One day the N V a N.",
        "P the N V the N, C.",
        '"Where is my N?" asked the N.',
        "Then the N V the N, C.",
        "The N and the N V the N P.",
        "It was a A day, and the N V the N.",
    ),
)

REPORT = Lexicon(
    nouns="committee estimate contract register allocation audit threshold invoice department procedure ledger "
    "variance supplier statute inspection quota dividend tribunal schedule deposit liability amendment warrant "
    "portfolio subsidy appendix jurisdiction covenant tariff assessor directive remittance prospectus annuity "
    "arbitration surcharge indemnity moratorium collateral debenture ordinance affidavit actuary escrow levy",
    adjectives="annual revised provisional quarterly external binding fiscal preliminary internal aggregate "
    "contractual statutory residual deferred retroactive unsecured bilateral discretionary nominal amortised "
    "fiduciary subordinate ancillary pecuniary",
    verbs="approved reviewed exceeded deferred reported amended rejected verified superseded allocated ratified "
    "rescinded reimbursed consolidated adjudicated withheld reconciled stipulated apportioned countersigned",
    circumstances=("in the second quarter", "pursuant to section D", "for the period under review", "as of day D",
                   "subject to verification", "at a rate of D percent", "in accordance with annex D", "on a pro rata "
                   "basis",
                   "with effect from year D", "notwithstanding paragraph D"),
    clauses=("provided that the N is V", "whereas the N was V in item D", "unless the N has been V", "which the N V P",
             "and the N accordingly V the N", "insofar as the N remains A"),
    frames=("The N V the N P.", "P, the N V the N, C.", "Item D: the N V a N of D units.", "The N was V, C.",
            "It was resolved that the N V the N P.", "See also N D, C.", "Total N: D; A N: D."),
)  # fmt: skip

SLOT = re.compile(r"\b[NVAPCD]\b")

BROKEN_LENGTH = 200
"""Characters of a broken passage. Each takes one or two tokens: together about as many as two good passages."""

LEXICONS: dict[Register, Lexicon] = {"tale": TALE, "report": REPORT}


def passages(
    register: Register, count: int, seed: int, broken: float = 0.0, difficulty: float | None = None
) -> Iterator[str]:
    """Yield `count` passages of four to eight sentences.

    Args:
        register: "tale", the language of the pretrained model, or "report", the language to fine-tune on.
        count: Number of passages.
        seed: The same seed gives the same passages.
        broken: Share of passages that are noise instead of prose, in [0, 1].
        difficulty: From 0 (frequent words, short sentences) to 1. None draws it at random for each passage.
    """
    rng = random.Random(f"{register}-{seed}")
    for _ in range(count):
        level = rng.random() if difficulty is None else difficulty
        text = " ".join(_Writer(LEXICONS[register], level, rng).sentence() for _ in range(rng.randint(4, 8)))
        yield rng.choice(BREAKAGES)(text[:BROKEN_LENGTH], rng) if rng.random() < broken else text


class _Writer:
    """Fill sentence frames at one level of difficulty."""

    def __init__(self, lexicon: Lexicon, difficulty: float, rng: random.Random) -> None:
        self.lexicon, self.difficulty, self.rng = lexicon, difficulty, rng

    def sentence(self) -> str:
        text = self.fill(self.pick(self.lexicon.frames))
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
        return text[0].upper() + text[1:]

    def pick(self, words: tuple[str, ...] | list[str]) -> str:
        """Draw a word. The k-th most frequent has weight `k ** -s`; s falls from 1.6 to 0.2 as difficulty rises."""
        exponent = 1.6 - 1.4 * self.difficulty
        return self.rng.choices(words, [(rank + 1) ** -exponent for rank in range(len(words))])[0]

    def fill(self, frame: str) -> str:
        slots: dict[str, Callable[[], str]] = {
            "N": self.noun_phrase,
            "V": lambda: self.pick(self.lexicon.verbs.split()).replace("-", " "),
            "A": lambda: self.pick(self.lexicon.adjectives.split()),
            "P": lambda: self.fill(self.pick(self.lexicon.circumstances)),
            "C": lambda: self.fill(self.pick(self.lexicon.clauses)),
            "D": lambda: str(self.rng.randint(1, 9 + int(990 * self.difficulty))),
        }
        return SLOT.sub(lambda match: slots[match[0]](), frame)

    def noun_phrase(self) -> str:
        adjectives = [
            self.pick(self.lexicon.adjectives.split()) for _ in range(2) if self.rng.random() < self.difficulty
        ]
        return " ".join([*adjectives, self.pick(self.lexicon.nouns.split())])


def _noise(text: str, rng: random.Random) -> str:
    """Imitate a file that is not text: as many random printable characters."""
    return "".join(rng.choices(string.ascii_letters + string.digits + string.punctuation, k=len(text)))


def _scrambled(text: str, rng: random.Random) -> str:
    """Imitate a failed text extraction: the characters of the passage in random order."""
    return "".join(rng.sample(text, len(text)))


def _mojibake(text: str, rng: random.Random) -> str:
    """Imitate a wrong encoding: every character moved into another alphabet."""
    shift = rng.randint(0x370, 0x400)
    return "".join(chr(ord(character) + shift) for character in text)


BREAKAGES: tuple[Callable[[str, random.Random], str], ...] = (_noise, _scrambled, _mojibake)
