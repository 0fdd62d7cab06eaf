"""Items, and reading them from a file: JSON Lines, CSV, TSV or Parquet, the text formats also gzipped.

Every data row of the file becomes one `Item` or one `Reject`, so ``len(items) + len(items.rejects)`` is the number of
rows. A file that cannot be used as a whole (not what its ending says, damaged, an unknown column, not one usable row)
raises `DataError`, one line with the file, the place and what to do.

Rows are counted from 1; the header of a CSV is not a row, and in JSON Lines the row is the line. Blank lines of a text
file are not rows. How a row becomes text is in `fastprice.data.row_text`.
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
from fastprice.data.readers import Table, excerpt, open_table
from fastprice.data.row_text import RowRenderer, cell_text, is_missing
from fastprice.errors import DataError, nearest_name

__all__ = ["Item", "ItemRows", "Items", "Reject", "load_items", "open_items"]

_FOREIGN_CURRENCY = re.compile(r"[€£¥₹]|\b(?:EUR|GBP|CAD|AUD|NZD|CHF|JPY|CNY|INR)\b")


@dataclass(frozen=True, slots=True)
class Item:
    """A product.

    Attributes:
        text: what the price is estimated from.
        price: dollars, or None if unknown.
        group: items of one group are put into the same part of a split; None: no group.
        row: number of the row in its source, from 1.
    """

    text: str
    price: float | None = None
    group: str | None = None
    row: int | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be used: its number, the reason, and its first 200 characters."""

    row: int | None
    reason: str
    text: str = ""


class Items(list[Item]):
    """A list of items with the rows that could not be used.

    Attributes:
        rejects: those rows, with reasons.
        source: the file, or what else the items are from.
        notes: messages for a person about the items, one line each.
    """

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
        """Writes the rejects as JSON Lines of row, reason and text, atomically.

        Raises DataError when the file cannot be written.
        """
        try:
            with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as lines:
                for reject in self.rejects:
                    lines.write(json.dumps({"row": reject.row, "reason": reject.reason, "text": reject.text}) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot write the rejects ({error.strerror}); give another place") from error


def load_items(
    path: str | os.PathLike[str],
    *,
    text: str | Sequence[str] = "text",
    price: str | None = None,
    group: str | Sequence[str] | None = None,
    drop: Sequence[str] = (),
) -> Items:
    """Reads a file of products.

    Args:
        path: JSON Lines (.jsonl, .ndjson), CSV, TSV (each also with .gz) or Parquet.
        text: one column, or several that are joined by newlines in that order; "*" is every column but `price`, those
            in `drop`, a nameless one (an index that pandas wrote), and those whose names suggest that they contain the
            price (price, cost, msrp, usd, amount), which are listed in `notes`. Naming such a column is allowed and
            noted.
        price: the column of the price, a number or text such as "$1,299.99": rows without a usable price become
            rejects. None: the items have no price.
        group: one column or several (joined by " | "); a row where any of them is missing has no group.
        drop: columns that "*" leaves out.

    Raises DataError for a missing file or column, a file that is not what its ending says, or no usable row.
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
        raise DataError(_no_usable_row(items, rows.selection))
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
    """`load_items` for a file of any length: its rows one after the other, without storing them."""
    path = Path(path)
    selection = _ColumnSelection.of(text, price, group, drop, path)
    with open_table(path, selection.columns_to_read()) as table:
        if table.columns:
            selection.check(table.columns, path)
        yield ItemRows(path, selection, table)


class ItemRows:
    """The rows of a file in their order, each an Item or a Reject; `open_items` makes it, for one iteration.

    `fraction_read()` is how much of the file has been read, from 0 to 1. Problems of the file as a whole raise
    DataError when its last row has been read.
    """

    def __init__(self, path: Path, selection: _ColumnSelection, table: Table) -> None:
        self.path, self.selection, self.fraction_read = path, selection, table.fraction_read
        self._table = table
        self._renderer = selection.renderer(typed=table.typed)
        self._foreign_prices = 0

    def notes(self) -> list[str]:
        """Messages about the columns and prices of the rows read so far."""
        foreign = f"{self._foreign_prices:,} prices are in another currency than dollars and were not converted"
        return self._renderer.notes() + ([foreign] if self._foreign_prices else [])

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
            raise DataError(f"{path}: has {'a header and ' if columns else ''}no rows; check that it is the right file")
        if not columns:
            raise DataError(f"{path}: no row is usable; {first}")
        self.selection.check(columns, path)

    def _row(self, row: int, record: dict[str, Any] | str, problem: str) -> Item | Reject:
        if not isinstance(record, dict):
            return Reject(row, problem, excerpt(record))
        price = self.selection.price
        try:
            text = self._renderer.text(record)
            dollars, problem = _price(record.get(price)) if price is not None else (None, "")
            group = _group(record, self.selection.group)
            problem = problem or ("" if text else "no text")
        except RecursionError:
            text, problem = "", "nested too deeply"
        if problem:
            return Reject(row, problem, excerpt(text or record))
        cell = record.get(price or "")
        self._foreign_prices += isinstance(cell, str) and bool(_FOREIGN_CURRENCY.search(cell))
        return Item(text, dollars, group, row)


def _no_usable_row(items: Items, selection: _ColumnSelection) -> str:
    reason, count = Counter(reject.reason for reject in items.rejects).most_common(1)[0]
    row = next(reject.row for reject in items.rejects if reject.reason == reason)
    where = f"column {selection.price!r}, " if "price" in reason else ""
    where = f"text of {', '.join(map(repr, selection.text))}, " if reason == "no text" else where
    return (
        f"{items.source}: none of its {len(items.rejects):,} rows is usable; the most frequent reason, in {count:,} of "
        f"them: {reason} ({where}first in row {row}); name another column or correct the file"
    )


# ---- Columns -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ColumnSelection:
    """The columns that a call names, checked against each other and then against those of the file."""

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
    ) -> _ColumnSelection:
        def names(value: str | Sequence[str] | None) -> tuple[str, ...]:
            return (value,) if isinstance(value, str) else tuple(dict.fromkeys(value or ()))

        columns = cls(names(text), price, names(group), frozenset(names(drop)))
        if not columns.text:
            raise DataError(f"{path}: no text column is named; name one or several, or '*' for all")
        if "*" in columns.text and len(columns.text) > 1:
            raise DataError(f"{path}: text is '*' (every column) or a list of columns; give one of them")
        if price in columns.text:
            raise DataError(f"{path}: column {price!r} is both the price and part of the text; remove it from the text")
        if both := columns.drop.intersection(columns.text):
            raise DataError(f"{path}: column {min(both)!r} is both dropped and part of the text; remove it from one")
        return columns

    def columns_to_read(self) -> frozenset[str] | None:
        """None for all."""
        if self.text == ("*",):
            return None
        return frozenset((*self.text, *self.group, *(() if self.price is None else (self.price,))))

    def renderer(self, *, typed: bool) -> RowRenderer:
        if self.text == ("*",):
            return RowRenderer(None, self.drop if self.price is None else self.drop | {self.price}, typed=typed)
        return RowRenderer(self.text, typed=typed)

    def check(self, present: Mapping[str, None], path: Path) -> None:
        text = () if self.text == ("*",) else self.text
        for name in (*text, *((self.price,) if self.price is not None else ()), *self.group, *sorted(self.drop)):
            if name in present:
                continue
            names = [excerpt(other if other.isprintable() else repr(other), 60) for other in present]
            listed = ", ".join(names[:60]) + (", ..." if len(names) > 60 else "")
            separator = len(names) == 1 and re.search(r"[;\t|,]", names[0])
            hint = f" (are its fields separated by {separator[0]!r}?)" if separator else ""
            raise DataError(f"{path}: no column {name!r}{nearest_name(name, present)}; its columns are: {listed}{hint}")


# ---- Prices and groups -----------------------------------------------------------------------------------------------


def _group(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    values = [record.get(name) for name in names]
    if not values or any(is_missing(value) or value in ([], {}) for value in values):
        return None
    return " | ".join(cell_text(value).strip() for value in values)


def _price(value: Any) -> tuple[float | None, str]:
    """(Price in dollars, ""), or (None, why the value is not a price)."""
    if is_missing(value) and not isinstance(value, float):
        return None, "no price"
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    shown = excerpt(value, 40)
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
        return None, f"price {shown!r} is not a price" if isinstance(value, str) else f"price {shown} is not a price"
    if math.isnan(number) or math.isinf(number):
        return None, f"price is {'nan' if math.isnan(number) else 'infinite'}"
    if number <= 0:
        return None, "price is 0" if number == 0 else f"price is negative ({number:g})"
    return number, ""
