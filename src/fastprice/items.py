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

import codecs
import csv
import gzip
import io
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastprice.errors import DataError, nearest_name
from fastprice.money import parse_price

__all__ = ["Item", "Items", "Reject", "load_items"]

_PARAGRAPH = 40  # characters from which a string in a list is a paragraph, not a token
_SHOWN = 200  # characters of a row that its reject keeps
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
        path = Path(path)
        half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with half.open("w", encoding="utf-8") as lines:
                for reject in self.rejects:
                    lines.write(json.dumps({"row": reject.row, "reason": reject.reason, "text": reject.text}) + "\n")
            half.replace(path)
        except OSError as error:
            raise DataError(f"{path}: cannot write the rejects: {error.strerror}") from error
        finally:
            if half.exists():
                half.unlink()


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
    wanted = _Columns.of(text, price, group, drop, path)
    with _opened(path) as table:
        items = Items(source=str(path))
        if table.columns:
            wanted.check(table.columns, path)
        renderer = _Renderer(wanted, typed=table.typed)
        rows = foreign = 0
        for row, record, problem in table.rows:
            rows += 1
            if not isinstance(record, dict):
                items.rejects.append(Reject(row, problem, _shown(record)))
                continue
            try:
                body = renderer.text(record)
                amount, problem = _price(record.get(price)) if price is not None else (None, "")
                together = _group(record, wanted.group)
                problem = problem or ("" if body else "no text")
            except RecursionError:
                body, problem = "", "nested too deeply"
            if problem:
                items.rejects.append(Reject(row, problem, _shown(body or record)))
                continue
            foreign += isinstance(record.get(price or ""), str) and bool(_FOREIGN.search(record[price or ""]))
            items.append(Item(body, amount, together, row))
        if not rows:
            raise DataError(f"{path}: has {'a header and ' if table.columns else ''}no rows; is it the right file?")
        if not table.columns:
            raise DataError(f"{path}: no row is usable; row {items.rejects[0].row}: {items.rejects[0].reason}")
        wanted.check(table.columns, path)
    if not items:
        raise DataError(_nothing_usable(items, wanted))
    items.notes += renderer.notes()
    if foreign:
        items.notes.append(f"{foreign:,} prices are in another currency than dollars and were taken as they stand")
    return items


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

    def check(self, present: Mapping[str, None], path: Path) -> None:
        text = () if self.text == ("*",) else self.text
        for name in (*text, *((self.price,) if self.price is not None else ()), *self.group, *sorted(self.drop)):
            if name in present:
                continue
            names = [_shown(other if other.isprintable() else repr(other), 60) for other in present]
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
    shown = _shown(value, 40)
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


def _shown(value: Any, limit: int = _SHOWN) -> str:
    if isinstance(value, (dict, list)):
        try:
            value = json.dumps(value, ensure_ascii=False, default=str)
        except RecursionError:
            value = "(nested too deeply)"
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**limit:
        value = "(a huge number)"  # str() of more than 4,300 digits raises
    return str(value)[:limit].encode("utf-8", "replace").decode("utf-8")


# ---- Files ---------------------------------------------------------------------------------------------------------


@dataclass
class _Table:
    """Rows to come: (row, record, "") or (row, raw text, problem). `columns` grows while JSON Lines are read."""

    rows: Iterator[tuple[int, dict[str, Any] | str, str]]
    columns: dict[str, None] = field(default_factory=dict)
    typed: bool = True


@contextmanager
def _opened(path: Path) -> Iterator[_Table]:
    """Open a file of items by its ending; whatever goes wrong in it becomes a DataError that names the file."""
    _check_there(path)
    name = path.name.lower()
    packed = name.endswith(".gz")
    ending = Path(name.removesuffix(".gz")).suffix
    readers: dict[str, Callable[[io.BufferedReader[Any], Path], _Table]] = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".csv": _read_csv,
        ".tsv": partial(_read_csv, delimiter="\t"),
    }
    if not packed and ending in (".parquet", ".pq"):
        yield _read_parquet(path)
        return
    if ending not in readers:
        raise DataError(
            f"{path}: its ending is none of .jsonl, .ndjson, .csv, .tsv (each also with .gz) and .parquet; "
            "convert or rename the file"
        )
    try:
        with path.open("rb") as raw:
            if not raw.peek(1):
                raise DataError(f"{path}: the file is empty")
            if packed and not raw.peek(2).startswith(b"\x1f\x8b"):
                raise DataError(f"{path}: is not gzip, as its ending says; take .gz off its name or compress it")
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if packed else raw
            head = stream.peek(4096)[:4096]
            if not head:
                raise DataError(f"{path}: the file is empty")
            if kind := _binary_kind(head):
                raise DataError(f"{path}: is not {ending[1:].upper()} text, as its ending says, but {kind}")
            if head.startswith(codecs.BOM_UTF8):
                stream.read(len(codecs.BOM_UTF8))
            yield readers[ending](stream, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip data is damaged or cut off ({error}); fetch or make it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _check_there(path: Path) -> None:
    try:
        if path.is_file():
            return
        if path.is_dir():
            raise DataError(f"{path}: is a folder, not a file; name a file in it")
        if path.exists():
            raise DataError(f"{path}: is not an ordinary file")
        if not path.parent.is_dir():
            raise DataError(f"{path}: no such file, and no folder {path.parent} either")
        beside = [other.name for other in path.parent.iterdir()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    raise DataError(f"{path}: no such file{nearest_name(path.name, beside)}")


def _binary_kind(head: bytes) -> str:
    """What the first bytes of a file show it to be, if not UTF-8 text."""
    for magic, kind in (
        (b"\x1f\x8b", "gzip; end its name in .gz"),
        (b"PAR1", "Parquet; end its name in .parquet"),
        (b"PK\x03\x04", "a zip archive or spreadsheet; unpack or export it first"),
        (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
        (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
    ):
        if head.startswith(magic):
            return kind
    if b"\0" in head:
        half = len(head) // 2
        utf16 = max(head[::2].count(0), head[1::2].count(0)) > 0.4 * half
        return "UTF-16 text; save it as UTF-8" if utf16 else "binary data"
    if re.match(rb"\s*<(?:!doctype html|html)", head, re.IGNORECASE):
        return "a web page; fetch the data itself"
    return ""


def _read_jsonl(stream: io.BufferedReader[Any], path: Path) -> _Table:
    columns: dict[str, None] = {}

    def rows() -> Iterator[tuple[int, dict[str, Any] | str, str]]:
        parsed, failed = False, 0
        for number, raw in enumerate(stream, 1):
            if not raw.strip():
                continue
            try:
                record = json.loads(raw.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                failed += 1
                if failed == 5 and not parsed:
                    raise DataError(f"{path}: is not JSON Lines, as its ending says: row {number}: {error}") from error
                yield number, _shown(raw.decode("utf-8", "replace").strip()), f"not JSON: {error}"
                continue
            parsed = True
            if isinstance(record, dict):
                columns.update(dict.fromkeys(record))
                yield number, record, ""
            else:
                yield number, _shown(record), f"not a JSON object but {_json_kind(record)}"
        if failed and not parsed:
            raise DataError(f"{path}: is not JSON Lines, as its ending says: no line of it is JSON")

    return _Table(rows(), columns)


def _json_kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list (is the file one JSON array? write one object per line)"
    return {str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


def _read_csv(stream: io.BufferedReader[Any], path: Path, delimiter: str = ",") -> _Table:
    # Bytes that are not UTF-8 survive as lone surrogates, so that the row that holds them can be named.
    raw: list[str] = []  # the lines of the row being read

    def lines() -> Iterator[str]:
        for line in stream:
            raw.append(line.decode("utf-8", "surrogateescape"))
            yield raw[-1]

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        header = [cell.strip() for cell in next(filter(None, reader), [])]
    except csv.Error as error:
        raise DataError(f"{path}: the header (line {reader.line_num}) is not CSV: {error}") from error
    if any("\ud800" <= character <= "\udfff" for cell in header for character in cell):
        raise DataError(f"{path}: the header is not UTF-8; save the file as UTF-8")
    if header and header[0].startswith(("{", "[")):
        raise DataError(f"{path}: looks like JSON, not CSV as its ending says; rename it")
    if doubles := [name for name, count in Counter(header).items() if count > 1]:
        places = [str(index) for index, name in enumerate(header, 1) if name == doubles[0]]
        raise DataError(
            f"{path}: the header names column {doubles[0]!r} twice (fields {', '.join(places)}); rename one"
        )

    def rows() -> Iterator[tuple[int, dict[str, Any] | str, str]]:
        number = 0
        while True:
            raw.clear()
            first = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                number += 1
                where = f"line {first}" + (f" to {reader.line_num}" if reader.line_num > first else "")
                if "end of data" in str(error) or "field limit" in str(error):
                    size = (
                        "to the end of the file"
                        if "end" in str(error)
                        else f"over {csv.field_size_limit():,} characters"
                    )
                    raise DataError(
                        f"{path}: row {number} ({where}): a field runs {size}; is a quote in it never closed?"
                    ) from error
                yield number, _shown("".join(raw).strip()), f"{where} is not CSV: {error}"
                continue
            if not cells:
                continue
            number += 1
            text = "".join(raw).strip()
            if any("\udc80" <= character <= "\udcff" for character in text):
                yield number, _shown(text), f"line {first} is not UTF-8; save the file as UTF-8"
            elif len(cells) != len(header):
                yield number, _shown(text), f"{len(cells)} fields where the header has {len(header)}"
            else:
                yield number, dict(zip(header, cells, strict=True)), ""

    return _Table(rows(), dict.fromkeys(header), typed=False)


def _read_parquet(path: Path) -> _Table:
    import polars

    with path.open("rb") as raw:
        head = raw.read(4096)
    if not head:
        raise DataError(f"{path}: the file is empty")
    if not head.startswith(b"PAR1"):
        kind = _binary_kind(head) or "text"
        raise DataError(f"{path}: is not Parquet, as its ending says, but {kind.split(';')[0]}; rename or convert it")
    try:
        frame = polars.read_parquet(path, glob=False)
    except (polars.exceptions.PolarsError, polars.exceptions.PanicException, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: the Parquet data is damaged or cut off ({reason}); fetch or make it again") from error
    rows = ((number, record, "") for number, record in enumerate(frame.iter_rows(named=True), 1))
    return _Table(rows, dict.fromkeys(frame.columns))
