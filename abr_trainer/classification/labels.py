"""Find the classes of a classifier, and the class of each row.

A label has the same name in every split, however a file stores it. An integer is the name of a class if a class has
that name. Otherwise it is a position among the classes, if their order is known.
"""

from __future__ import annotations

import math
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cached_property

from datasets import ClassLabel, Dataset
from transformers.utils import logging

logger = logging.get_logger(__name__)

HIDDEN = -1
"""Label of rows of a test split whose labels are hidden."""

MOST_UNASKED = 4
"""Up to this many different integers are read as classes. More of them could also be scores."""

MOST_SHOWN = 10
"""Most classes to list in a message."""
MOST_LETTERS = 60
"""Most characters of a value in a message."""

WHOLE = re.compile(r"[+-]?\d+(\.0*)?")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)

Label = str | int | float | None
"""A label as read; None if it is missing."""


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one split.

    Attributes:
        where: Column and file, for messages.
        names: If the column is a `ClassLabel`, its names in order; the values are then names.
    """

    values: Sequence[Label]
    where: str
    names: tuple[str, ...] = ()

    def first(self, count: int) -> LabelColumn:
        return replace(self, values=self.values[:count])

    def row_of(self, value: Label) -> int:
        """Return the number of the first row with a value, from 1."""
        return self.values.index(value) + 1

    def is_hidden(self, classes: Collection[str] = ()) -> bool:
        """Tell whether no row has a label, or all labels are hidden."""
        secret = set() if str(HIDDEN) in classes else {HIDDEN, str(HIDDEN)}
        return {None, *self.values} <= {None, *secret}


def read_labels(rows: Dataset, column: str, origin: str, are_cells: bool = False) -> LabelColumn:
    """Return the labels in a column.

    Args:
        are_cells: All values are text, as in a .csv. If all of them are numbers, convert them.

    Raises:
        ValueError: A value is neither text nor a number.
    """
    where = f"column {column} of {origin}"
    feature = rows.features[column]
    names = tuple(map(_cleaned, feature.names)) if isinstance(feature, ClassLabel) else ()
    values: list[Label] = []
    for index, cell in enumerate(rows[column][:]):
        if cell is not None and not isinstance(cell, str | int | float):
            raise ValueError(
                f"A label must be text or a number: row {index + 1}, {where} is {shortened(cell)}. See --label_column."
            )
        if isinstance(cell, int) and 0 <= cell < len(names):
            cell = names[cell]
        values.append(_value_of(cell))
    if are_cells and all(value is None or is_number(value) for value in values):
        values = [_value_of(_number(value)) if (whole := _whole(value)) is None else whole for value in values]
    return LabelColumn(values, where, names)


def shortened(value: object) -> str:
    """Return the `repr` of a value, cut if it is long."""
    written = repr(value)
    return written if len(written) <= MOST_LETTERS else f"{written[:MOST_LETTERS]}..."


def _value_of(cell: str | float | None) -> Label:
    if isinstance(cell, str):
        return _cleaned(cell) or None
    if cell is None or math.isnan(cell):
        return None
    return int(cell) if math.isfinite(cell) and cell == int(cell) else cell


def _cleaned(name: str) -> str:
    """Return a name with normalised white space and Unicode."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def _whole(value: Label) -> int | None:
    """Return an integer, or the integer that a text contains; None for anything else."""
    if isinstance(value, str) and WHOLE.fullmatch(value):
        return int(value.partition(".")[0])
    return value if isinstance(value, int) else None


def _number(value: Label) -> float:
    """Return a number, or the number that a text contains; NaN for anything else."""
    if value is None or (isinstance(value, str) and not NUMBER.fullmatch(value)):
        return math.nan
    return float(value)


def is_number(value: Label) -> bool:
    """Tell whether a value is a number or a text that contains one."""
    return not math.isnan(_number(value))


def key_of(name: str) -> str:
    """Return a key that is equal for names with the same meaning: it ignores case and the format of numbers.

    >>> key_of("Yes"), key_of("01"), key_of("1.0"), key_of("TRUE")
    ('yes', '1', '1', '1')
    """
    folded = name.casefold()
    folded = {"true": "1", "false": "0"}.get(folded, folded)  # some files store booleans as 0 and 1
    whole = _whole(folded)
    return folded if whole is None else str(whole)


def shown(names: Iterable[object]) -> str:
    """Return names as a list for a message, only the first of them if there are many.

    >>> shown(range(13))
    '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 3 more'
    """
    texts = [str(name) for name in names]
    more = len(texts) - MOST_SHOWN
    return ", ".join(texts[:MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


# ---- The classes of a task ----


class Order(Enum):
    """What defines the order of the classes, and thus whether an integer may be a position."""

    TASK = auto()
    """A task known by name: an integer may be a position."""
    FLAG = auto()
    """--classes, or an earlier training: it may be a position."""
    FEATURE = auto()
    """A `ClassLabel` of the training rows: it may be a position."""
    SORTED = auto()
    """Nothing defines it: an integer is not a position."""


@dataclass(frozen=True)
class Classes:
    """The classes of a task, in order.

    Attributes:
        source: Where they were found, for messages.
    """

    names: tuple[str, ...]
    order: Order
    source: str

    @cached_property
    def are_numbers(self) -> bool:
        """Whether some are integers."""
        return any(_whole(name) is not None for name in self.names)

    @property
    def are_positions(self) -> bool:
        """Whether their names are 0 to n-1, in order."""
        return self.names == tuple(map(str, range(len(self.names))))

    @cached_property
    def _by_name(self) -> dict[str, int]:
        keys = list(map(key_of, self.names))
        counts = Counter(keys)
        by_key = {key: index for index, key in enumerate(keys) if counts[key] == 1}
        return by_key | {name: index for index, name in enumerate(self.names)}

    def find(self, value: Label) -> int | None:
        """Return the class with this name, or else the only one whose name has the same key; None if there is none."""
        name = str(value)
        return self._by_name.get(name, self._by_name.get(key_of(name)))


def find_classes(column: LabelColumn, others: Sequence[LabelColumn], regression: bool | None) -> Classes | None:
    """Return the classes of the user's own task; None if it is a regression.

    Args:
        column: Labels of the training rows.
        others: Labels of the other splits.
        regression: Value of `--regression`; None if it is not given.

    Raises:
        ValueError: The labels are ambiguous, missing or all the same.
    """
    values = {value for value in column.values if value is not None}
    if column.names:
        classes = Classes(column.names, Order.FEATURE, column.where)
    elif not values:
        raise ValueError(f"Labels are missing: {column.where} has none.")
    elif any(not is_number(value) for value in values):
        _refuse_mixture(column, values)
        classes = Classes(tuple(sorted(map(str, values))), Order.SORTED, column.where)
    else:
        numbers = sorted(values, key=lambda value: (_number(value), _whole(value) or 0, str(value)))
        if regression is None:
            if any(isinstance(value, float) for value in values):
                return None
            _ask_what_numbers_are(column, numbers, others)
        elif any(isinstance(value, float) for value in values):
            raise ValueError(f"Labels in {column.where} are numbers with fractions, not classes: {shown(numbers)}.")
        classes = Classes(tuple(dict.fromkeys(map(str, numbers))), Order.SORTED, column.where)
    if classes.order is Order.SORTED:
        _refuse_alike(column, classes.names)
    if len(classes.names) < 2:
        _refuse_missing(column)
        raise ValueError(f"All labels in {column.where} are {classes.names[0]}. A classifier needs two classes.")
    return classes


def _refuse_mixture(column: LabelColumn, values: Collection[Label]) -> None:
    """Refuse a column with both names and numbers."""
    numbers = [value for value in values if is_number(value)]
    if numbers:
        number, text = min(numbers, key=_number), min(set(values).difference(numbers), key=str)
        raise ValueError(
            f"Labels in {column.where} are neither all text nor all numbers: row {column.row_of(number)} has "
            f"{number}, row {column.row_of(text)} {text!r}. If all are classes, name them with --classes."
        )


def _ask_what_numbers_are(column: LabelColumn, numbers: Sequence[Label], others: Sequence[LabelColumn]) -> None:
    """Refuse numbers that may be classes or scores.

    Integers are classes if there are few of them, or if some split has labels as text.
    """
    are_whole = all(_whole(number) is not None for number in numbers)
    have_names = any(isinstance(value, str) for each in (column, *others) for value in each.values)
    are_few = len(numbers) <= MOST_UNASKED and list(numbers) == list(range(len(numbers)))
    if are_whole and (have_names or are_few):
        return
    kind = "integers" if are_whole else "numbers stored as text"
    raise ValueError(
        f"Are the labels classes or scores? In {column.where} they are {kind}: {shown(numbers)}. Add --regression "
        "false for classes, or --regression true for scores."
    )


def _refuse_alike(column: LabelColumn, names: Sequence[str]) -> None:
    by_key: dict[str, str] = {}
    counts = Counter(map(str, column.values))
    for name in names:
        first = by_key.setdefault(key_of(name), name)
        if first != name:
            raise ValueError(
                f"Are {first!r} ({counts[first]:,} rows) and {name!r} ({counts[name]:,} rows) in {column.where} the "
                "same class? Give them the same name, or name all classes with --classes."
            )


# ---- The class of each row ----


def indices_of(column: LabelColumn, classes: Classes) -> list[int]:
    """Return the index of the class of each row.

    Raises:
        ValueError: A label is missing or not a class, or an integer may mean two classes.
    """
    _refuse_missing(column)
    values = list(dict.fromkeys(column.values))
    named = {value: index for value in values if (index := classes.find(value)) is not None}
    placed = _positions(values, column, classes)
    if classes.are_numbers and len(placed) == len(values):
        # The names of a ClassLabel are numbers: the values may be names or positions.
        if len(named) < len(values):
            named = {}
        elif named != placed:
            raise ValueError(
                f"Is {values[0]} the name of a class or its position? Labels in {column.where} are integers; "
                f"those in {classes.source} have the names {shown(classes.names)}, in this order. Give --classes, so "
                "that numbers are names."
            )
    found = placed | named
    unknown = [value for value in values if value not in found]
    if unknown:
        raise ValueError(_no_class(column, classes, unknown[0], bool(found)))
    if len(named) < len(values) and classes.order is not Order.TASK:
        read = ", ".join(
            f"{value} as {classes.names[found[value]]!r}" for value in sorted(placed, key=str)[:MOST_SHOWN]
        )
        logger.warning(f"Labels in {column.where} are read as positions among the classes: {read}.")
    return [found[value] for value in column.values]


def _positions(values: Sequence[Label], column: LabelColumn, classes: Classes) -> dict[Label, int]:
    """Return the index of the class for each value that may be a position."""
    count = len(classes.names)
    if column.names:
        # If the classes are called 0 to n-1, names of a ClassLabel that are not classes mean their positions.
        is_named = any(classes.find(name) is not None for name in column.names)
        if is_named or not classes.are_positions or len(column.names) != count:
            return {}
        return {name: index for index, name in enumerate(column.names) if name in values}
    if classes.order is Order.SORTED:
        return {}
    placed: dict[Label, int] = {}
    for value in values:
        position = _whole(value)
        if position is not None and 0 <= position < count:
            placed[value] = position
    are_names = classes.are_numbers and (classes.order is not Order.FEATURE or len(placed) < len(values))
    return {} if are_names else placed


def refuse_two_orders(columns: Sequence[LabelColumn], classes: Classes) -> None:
    """Refuse two splits with different orders of names for the classes 0 to n-1.

    Raises:
        ValueError: There are two such splits.
    """
    placed = [each for each in columns if _positions(each.names, each, classes) and not each.is_hidden()]
    for each in placed:
        if each.names != placed[0].names:
            raise ValueError(
                f"Labels in {classes.source} are {shown(classes.names)}: by position, these are "
                f"{shown(placed[0].names)} in {placed[0].where}, but {shown(each.names)} in {each.where}. Give "
                "--classes in the right order."
            )


def _no_class(column: LabelColumn, classes: Classes, value: Label, others_are: bool) -> str:
    """Return the error message for a value that is not a class."""
    are_numbers = all(_whole(each) is not None for each in column.values)
    if classes.order is Order.SORTED and not others_are and are_numbers != classes.are_numbers:
        kinds = ("integers", "names")
        here, there = kinds if are_numbers else kinds[::-1]
        return (
            f"Labels in {column.where} are {here}, but {there} in {classes.source}: {shown(classes.names)}. Give "
            "--classes with the names in the order of the numbers, first the name of 0."
        )
    if classes.are_positions:
        known = f"0 to {len(classes.names) - 1}"
    elif classes.are_numbers or classes.order is Order.SORTED:
        known = f"one of {shown(classes.names)}"
    else:
        known = f"0 to {len(classes.names) - 1} or {shown(classes.names)}"
    hint = " (hidden labels cannot be used)" if _whole(value) == HIDDEN else ""
    scores = " If labels are scores, add --regression true." if isinstance(value, float) else ""
    where = f"row {column.row_of(value)}, {column.where}"
    return f"Label out of range: {where} is {value!r}{hint}; it must be {known}.{scores}"


def _refuse_missing(column: LabelColumn) -> None:
    if None not in column.values:
        return
    count = sum(value is None for value in column.values)
    more = f" ({count:,} of {len(column.values):,} rows have none)" if count > 1 else ""
    raise ValueError(
        f"Labels are missing: row {column.row_of(None)}, {column.where} has none{more}. Add them, or remove such rows."
    )


def numbers_of(column: LabelColumn, span: tuple[float, float] | None) -> list[float]:
    """Return the regression target of each row.

    Args:
        span: Lowest and highest target allowed; None for any.

    Raises:
        ValueError: A label is missing, not a number, or out of range.
    """
    _refuse_missing(column)
    low, high = span or (-math.inf, math.inf)
    numbers = [_number(value) for value in column.values]
    for value, number in zip(column.values, numbers, strict=True):
        if not (math.isfinite(number) and low <= number <= high):
            between = f" between {low:g} and {high:g}" if span else ""
            raise ValueError(
                f"Label out of range: row {column.row_of(value)}, {column.where} is {value!r}; it must be a "
                f"number{between}."
            )
    return numbers


# ---- The first rows of a sorted file ----


def warn_of_sorted(column: LabelColumn, count: int, flag: str, are_classes: bool) -> None:
    """Warn if the labels of the first rows are distributed differently from all labels, as in a sorted file.

    Args:
        count: Number of rows that are used.
        flag: The flag that limits them.
        are_classes: Whether labels are classes, not regression targets.
    """
    values = [value for value in column.values if value is not None]
    first = [value for value in column.values[:count] if value is not None]
    if not first or len(first) == len(values):
        return
    # Allowed distance of the mean of randomly drawn rows from the mean of all, in standard deviations of one row.
    allowed = 4 * math.sqrt((len(values) - len(first)) / (len(values) - 1) / len(first))
    if are_classes:
        taken, there = Counter(map(str, first)), Counter(map(str, values))
        shares = {name: number / len(values) for name, number in there.items()}
        is_like = len(taken) == len(there) and all(
            abs(taken[name] / len(first) - share) <= allowed * math.sqrt(share * (1 - share))
            for name, share in shares.items()
        )
        missing = len(there) - len(taken)
        what, whole = (
            shown(f"{name} ({number:,} rows)" for name, number in each.most_common()) for each in (taken, there)
        )
        what += f", without {missing} of {len(there)} classes" if missing else ""
    else:
        numbers, everything = list(map(_number, first)), list(map(_number, values))
        mean, middle = statistics.fmean(numbers), statistics.fmean(everything)
        is_like = abs(mean - middle) <= allowed * statistics.pstdev(everything)
        what, whole = f"{mean:.3g} on average", f"{middle:.3g}"
    if not is_like:
        logger.warning(
            f"{flag} {count}: the first rows of {column.where} are {what}; all rows are {whole}. If the file is "
            "sorted by label, shuffle it."
        )
