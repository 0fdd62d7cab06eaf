"""Items, and reading them from a file: JSON Lines, CSV, TSV or Parquet, plain or gzipped.

Every data row of the file becomes one `Item` or one `Reject`, so ``len(items) + len(items.rejects)`` is the number
of rows, always. A file that cannot be trusted as a whole (not what its ending says, damaged half-way, an unknown
column, not one usable row) raises `DataError` with one line that names the file, the place and the remedy.

Rows are counted from 1; the header of a CSV is no row, and in JSON Lines the row is the line. Blank lines of a text
file are no rows. CSV is read by the standard library's reader in strict mode rather than by polars: polars fills short
rows up without a word and guesses types, where here each ragged row has to be told.

How a row becomes text: strings stand as they are; lists of short strings are joined by ", ", lists with any string
over 40 characters (paragraphs) by newlines; everything else gets its column's name: ``cas latency: 15``,
``modules: 2, 8``, ``modular: no``; an object becomes one ``key: value`` line per leaf; nulls, NaN and blanks are
left out. CSV has no types, so cells that look like a number, true or false get their column's name as well.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprice.common.files import atomic_file
from fastprice.data.money import parse_price
from fastprice.data.readers import Table, open_table, shown
from fastprice.errors import DataError, nearest_name

__all__ = ["Item", "ItemRows", "Items", "Reject", "load_items", "open_items"]

_PARAGRAPH = 40  # characters from which a string in a list is a paragraph, not a token
_LABEL_LEAK = re.compile(r"price|msrp|usd|amount|cost(?!um)", re.IGNORECASE)
_FOREIGN = re.compile(r"[€£¥₹]|\b(?:EUR|GBP|CAD|AUD|NZD|CHF|JPY|CNY|INR)\b")
_CELL_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Item:
    """A product: its text, its price in dollars, the group it may not be split from, its row in the source (from 1)."""

    text: str
    price: float | None = None
    group: str | None = None
    row: int | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be used, why, and the first 200 characters of it."""

    row: int | None
    reason: str
    text: str = ""


class Items(list[Item]):
    """A list of items that remembers the rows it could not use, where it came from, and what a person should know."""

    def __init__(
        self,
        items: Iterable[Item] = (),
        *,
        rejects: Iterable[Reject] = (),
        source: str = "",
        notes: Iterable[str] = (),
    ) -> None:
        super().__init__(items)
        self.rejects = list(rejects)
        self.source = source
        self.notes = list(notes)

    def write_rejects(self, path: str | os.PathLike[str]) -> None:
        """Write the rejects as JSON Lines of row, reason and text: the whole file, or none of it.

        Raises DataError when the file cannot be written.
        """
        try:
            with atomic_file(path) as half, half.open("w", encoding="utf-8") as lines:
                for reject in self.rejects:
                    lines.write(json.dumps({"row": reject.row, "reason": reject.reason, "text": reject.text}) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot write the rejects: {error.strerror}") from error


def load_items(
    path: str | os.PathLike[str],
    *,
    text: str | Sequence[str] = "text",
    price: str | None = None,
    group: str | Sequence[str] | None = None,
    drop: Sequence[str] = (),
) -> Items:
    """Read a file of products.

    text: one column, or several joined by newlines in that order; "*" takes every column but `price`, those in
    `drop`, a nameless one (an index that pandas wrote), and those whose name says that they hold the price in disguise
    (price, cost, msrp, usd, amount): these stand in `.notes`. Naming such a column yourself is allowed and noted.
    price: the column of the price, a number or text such as "$1,299.99". Where it is given, rows without a usable
    price become rejects; where not, items have no price.
    group: one column or several (joined by " | "); a row where any of them is missing has no group.

    Raises DataError: no such file or column, a file that is not what its ending says, nothing usable in it.
    """
    path = Path(path)
    with open_items(path, text=text, price=price, group=group, drop=drop) as rows:
        items = Items(source=str(path))
        for row in rows:
            if isinstance(row, Item):
                items.append(row)
            else:
                items.rejects.append(row)
        items.notes += rows.notes()
    if not items:
        raise DataError(_nothing_usable(items, rows.wanted))
    return items


@contextmanager
def open_items(
    path: str | os.PathLike[str],
    *,
    text: str | Sequence[str] = "text",
    price: str | None = None,
    group: str | Sequence[str] | None = None,
    drop: Sequence[str] = (),
) -> Iterator[ItemRows]:
    """`load_items` for a file of any length: its rows one after the other, of which none is kept."""
    path = Path(path)
    wanted = _Columns.of(text, price, group, drop, path)
    with open_table(path, wanted.needed()) as table:
        if table.columns:
            wanted.check(table.columns, path)
        yield ItemRows(path, wanted, table)


class ItemRows:
    """The rows of a file in their order, each an Item or a Reject, to be gone through once; `open_items` makes it.

    What is wrong with the file as a whole is found out, and raised as DataError, when its last row has been read.
    """

    def __init__(self, path: Path, wanted: _Columns, table: Table) -> None:
        self.path, self.wanted, self.share = path, wanted, table.share
        self._table = table
        self._renderer = _Renderer(wanted, typed=table.typed)
        self._foreign = 0

    def notes(self) -> list[str]:
        """What a person should know about the columns of the rows that were read."""
        foreign = f"{self._foreign:,} prices are in another currency than dollars and were taken as they stand"
        return self._renderer.notes() + ([foreign] if self._foreign else [])

    def __iter__(self) -> Iterator[Item | Reject]:
        path, columns = self.path, self._table.columns
        usable = any_row = False
        first = ""
        for number, record, problem in self._table.rows:
            row = self._row(number, record, problem)
            usable |= isinstance(record, dict)
            first = first or (f"row {number}: {row.reason}" if isinstance(row, Reject) else "")
            any_row = True
            yield row
        if not any_row:
            raise DataError(f"{path}: has {'a header and ' if columns else ''}no rows; is it the right file?")
        if not columns:
            raise DataError(f"{path}: no row is usable; {first}")
        self.wanted.check(columns, path)

    def _row(self, row: int, record: dict[str, Any] | str, problem: str) -> Item | Reject:
        if not isinstance(record, dict):
            return Reject(row, problem, shown(record))
        price = self.wanted.price
        try:
            body = self._renderer.text(record)
            amount, problem = _price(record.get(price)) if price is not None else (None, "")
            together = _group(record, self.wanted.group)
            problem = problem or ("" if body else "no text")
        except RecursionError:
            body, problem = "", "nested too deeply"
        if problem:
            return Reject(row, problem, shown(body or record))
        written = record.get(price or "")
        self._foreign += isinstance(written, str) and bool(_FOREIGN.search(written))
        return Item(body, amount, together, row)


def _nothing_usable(items: Items, wanted: _Columns) -> str:
    reason, count = Counter(reject.reason for reject in items.rejects).most_common(1)[0]
    row = next(reject.row for reject in items.rejects if reject.reason == reason)
    where = f"column {wanted.price!r}, " if "price" in reason else ""
    where = f"text of {', '.join(map(repr, wanted.text))}, " if reason == "no text" else where
    return (
        f"{items.source}: none of its {len(items.rejects):,} rows is usable; the most frequent reason, in {count:,} of "
        f"them: {reason} ({where}first in row {row}); name another column or mend the file"
    )


# ---- Columns -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    text: tuple[str, ...]  # ("*",) for every column
    price: str | None
    group: tuple[str, ...]
    drop: frozenset[str]

    @classmethod
    def of(
        cls,
        text: str | Sequence[str],
        price: str | None,
        group: str | Sequence[str] | None,
        drop: Sequence[str],
        path: Path,
    ) -> _Columns:
        def names(value: str | Sequence[str] | None) -> tuple[str, ...]:
            return (value,) if isinstance(value, str) else tuple(dict.fromkeys(value or ()))

        columns = cls(names(text), price, names(group), frozenset(names(drop)))
        if not columns.text:
            raise DataError(f"{path}: no text column is named; name one or several, or '*' for all")
        if "*" in columns.text and len(columns.text) > 1:
            raise DataError(f"{path}: text is '*' (every column) or a list of columns, not both")
        if price in columns.text:
            raise DataError(f"{path}: column {price!r} is both the price and part of the text; take it out of the text")
        if both := columns.drop.intersection(columns.text):
            raise DataError(f"{path}: column {min(both)!r} is both dropped and part of the text")
        return columns

    def needed(self) -> frozenset[str] | None:
        """The columns to read; None for all."""
        if self.text == ("*",):
            return None
        return frozenset((*self.text, *self.group, *(() if self.price is None else (self.price,))))

    def check(self, present: Mapping[str, None], path: Path) -> None:
        text = () if self.text == ("*",) else self.text
        for name in (*text, *((self.price,) if self.price is not None else ()), *self.group, *sorted(self.drop)):
            if name in present:
                continue
            names = [shown(other if other.isprintable() else repr(other), 60) for other in present]
            listed = ", ".join(names[:60]) + (", ..." if len(names) > 60 else "")
            one = len(names) == 1 and re.search(r"[;\t|,]", names[0])
            hint = f" (is {one[0]!r} what separates its fields?)" if one else ""
            raise DataError(f"{path}: no column {name!r}{nearest_name(name, present)}; its columns are: {listed}{hint}")


class _Renderer:
    """Turns records into text, and remembers which columns looked like the price in disguise."""

    def __init__(self, wanted: _Columns, *, typed: bool) -> None:
        self.wanted = wanted
        self.typed = typed
        self.every = wanted.text == ("*",)
        self.leaks: dict[str, None] = {}

    def text(self, record: Mapping[str, Any]) -> str:
        names: Iterable[str] = record if self.every else self.wanted.text
        lines: list[str] = []
        for name in names:
            if self.every and (not name or name == self.wanted.price or name in self.wanted.drop):
                continue
            lines += self._lines(name, name, record.get(name), nested=False)
        # Half a surrogate pair can be written in JSON, but not encoded again.
        return "\n".join(lines).encode("utf-8", "replace").decode("utf-8")

    def notes(self) -> list[str]:
        if not self.leaks:
            return []
        names = ", ".join(self.leaks)
        if self.every:
            return [f"left out of the text, since they may hold the price in disguise: {names}"]
        return [f"the text holds {names}, which may be the price in disguise: the model would learn to copy it"]

    def _lines(self, path: str, name: str, value: Any, *, nested: bool) -> list[str]:
        """The lines that one value gives; `path` is its full name ("attrs.price"), `name` its own."""
        if _is_missing(value):
            return []
        if _LABEL_LEAK.search(name):
            self.leaks[path] = None
            if self.every:
                return []
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        label = name.replace("_", " ").strip()
        if isinstance(value, str):
            if not self.typed and _CELL_NUMBER.fullmatch(value.strip()):
                return [f"{label}: {value.strip()}"]
            if not self.typed and value.strip().lower() in ("true", "false"):
                return [f"{label}: {_word(value.strip().lower() == 'true')}"]
            return [f"{label}: {value}" if nested else value]
        if isinstance(value, dict):
            return [
                line
                for key, inner in value.items()
                for line in self._lines(f"{path}.{key}", str(key), inner, nested=True)
            ]
        if isinstance(value, (list, tuple)):
            present = [inner for inner in value if not _is_missing(inner)]
            if any(isinstance(inner, (dict, list, tuple)) for inner in present):
                return [line for inner in present for line in self._lines(path, name, inner, nested=nested)]
            words = [_word(inner) for inner in present]
            if any(len(word) > _PARAGRAPH for word in words):
                return words
            texts = all(isinstance(inner, str) for inner in present)
            joined = ", ".join(words)
            return [joined if texts and not nested else f"{label}: {joined}"] if words else []
        return [f"{label}: {_word(value)}"]


def _is_missing(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    return value is None or (isinstance(value, (str, bytes)) and not value.strip())


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value)


def _group(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    values = [record.get(name) for name in names]
    if not values or any(_is_missing(value) or value in ([], {}) for value in values):
        return None
    return " | ".join(_word(value).strip() for value in values)


def _price(value: Any) -> tuple[float | None, str]:
    """The price in dollars, or why the value is none."""
    if _is_missing(value) and not isinstance(value, float):
        return None, "no price"
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    told = shown(value, 40)
    number: float | None = None
    if isinstance(value, str):
        plain = value.strip()
        try:
            number = float(plain) if "_" not in plain else parse_price(plain)
        except ValueError:
            number = parse_price(plain)
            if number is None and re.fullmatch(r"\W*0+(?:[.,]0+)?\W*", plain):
                number = 0.0
    elif not isinstance(value, bool) and hasattr(value, "__float__"):  # int, float, Decimal
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if number is None:
        return None, f"price {told!r} is not a price" if isinstance(value, str) else f"price {told} is not a price"
    if math.isnan(number) or math.isinf(number):
        return None, f"price is {'nan' if math.isnan(number) else 'infinite'}"
    if number <= 0:
        return None, "price is 0" if number == 0 else f"price is negative ({number:g})"
    return number, ""
