"""Files of rows: JSON Lines, CSV, TSV or Parquet, plain or gzipped, opened by their ending and held to it.

`open_table` gives columns and rows; a row is `(number, record, problem)`, numbered from 1, where either the record is
a dict or the problem says why it is none. A file that cannot be trusted as a whole raises DataError. Rows are read as
they are asked for, and none is kept: a file may be larger than memory.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastprice.errors import DataError, nearest_name

__all__ = ["Table", "open_table", "shown"]

SHOWN = 200  # characters of a row that its reject keeps
FIELD_LIMIT = 2**24  # characters of a CSV field; the csv module's own limit is 2**17, less than some descriptions
_BATCH = 1024  # rows of a Parquet file that are decoded at once


@dataclass
class Table:
    """Rows to come: (row, record, "") or (row, raw text, problem). `columns` grows while JSON Lines are read.

    `share()` is how much of the file has been read, from 0 to 1.
    """

    rows: Iterator[tuple[int, dict[str, Any] | str, str]]
    columns: dict[str, None] = field(default_factory=dict)
    typed: bool = True
    share: Callable[[], float] = float


@contextmanager
def open_table(path: Path, wanted: frozenset[str] | None = None) -> Iterator[Table]:
    """Open a file of items by its ending; whatever goes wrong in it becomes a DataError that names the file.

    wanted  the columns that a Parquet file is read for; None: all. Text files are read whole, whatever is wanted.
    """
    _check_there(path)
    name = path.name.lower()
    packed = name.endswith(".gz")
    ending = Path(name.removesuffix(".gz")).suffix
    readers: dict[str, Callable[[io.BufferedReader[Any], Path], Table]] = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".csv": _read_csv,
        ".tsv": partial(_read_csv, delimiter="\t"),
    }
    if not packed and ending in (".parquet", ".pq"):
        with _open_parquet(path, wanted) as table:
            yield table
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
            table = readers[ending](stream, path)
            size = path.stat().st_size
            table.share = lambda: raw.tell() / size
            with _field_limit():
                yield table
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip data is damaged or cut off ({error}); fetch or make it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextmanager
def _field_limit() -> Iterator[None]:
    """The csv module's limit, which is one for the whole process, at `FIELD_LIMIT`."""
    before = csv.field_size_limit(FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


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


def _read_jsonl(stream: io.BufferedReader[Any], path: Path) -> Table:
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
                yield number, shown(raw.decode("utf-8", "replace").strip()), f"not JSON: {error}"
                continue
            parsed = True
            if isinstance(record, dict):
                columns.update(dict.fromkeys(record))
                yield number, record, ""
            else:
                yield number, shown(record), f"not a JSON object but {_json_kind(record)}"
        if failed and not parsed:
            raise DataError(f"{path}: is not JSON Lines, as its ending says: no line of it is JSON")

    return Table(rows(), columns)


def _json_kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list (is the file one JSON array? write one object per line)"
    return {str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


def _read_csv(stream: io.BufferedReader[Any], path: Path, delimiter: str = ",") -> Table:
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
    if not all(map(_is_utf8, header)):
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
                    size = "to the end of the file" if "end" in str(error) else f"over {FIELD_LIMIT:,} characters"
                    raise DataError(
                        f"{path}: row {number} ({where}): a field runs {size}; is a quote in it never closed?"
                    ) from error
                yield number, shown("".join(raw).strip()), f"{where} is not CSV: {error}"
                continue
            if not cells:
                continue
            number += 1
            text = "".join(raw).strip()
            if not _is_utf8(text):
                yield number, shown(text), f"line {first} is not UTF-8; save the file as UTF-8"
            elif len(cells) != len(header):
                yield number, shown(text), f"{len(cells)} fields where the header has {len(header)}"
            else:
                yield number, dict(zip(header, cells, strict=True)), ""

    return Table(rows(), dict.fromkeys(header), typed=False)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _open_parquet(path: Path, wanted: frozenset[str] | None) -> Iterator[Table]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as raw:
        head = raw.read(4096)
    if not head:
        raise DataError(f"{path}: the file is empty")
    if not head.startswith(b"PAR1"):
        kind = _binary_kind(head) or "text"
        raise DataError(f"{path}: is not Parquet, as its ending says, but {kind.split(';')[0]}; rename or convert it")
    try:
        # A row group may be the whole file: its columns are read piece by piece, not buffered as a whole.
        file = ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    except (ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    with file:
        names = file.schema_arrow.names
        total = max(1, file.metadata.num_rows)
        read = 0

        def rows() -> Iterator[tuple[int, dict[str, Any] | str, str]]:
            import polars

            nonlocal read
            columns = None if wanted is None else [name for name in names if name in wanted]
            try:
                for batch in file.iter_batches(_BATCH, columns=columns, use_threads=False):
                    for record in polars.DataFrame(polars.from_arrow(batch)).iter_rows(named=True):
                        read += 1
                        yield read, record, ""
            except (ArrowException, OSError, polars.exceptions.PolarsError, polars.exceptions.PanicException) as error:
                raise _damaged(path, error) from error

        yield Table(rows(), dict.fromkeys(names), share=lambda: read / total)


def _damaged(path: Path, error: BaseException) -> DataError:
    said = str(error).strip()
    reason = said.splitlines()[0] if said else type(error).__name__
    return DataError(f"{path}: the Parquet data is damaged or cut off ({reason}); fetch or make it again")


def shown(value: Any, limit: int = SHOWN) -> str:
    if isinstance(value, (dict, list)):
        try:
            value = json.dumps(value, ensure_ascii=False, default=str)
        except RecursionError:
            value = "(nested too deeply)"
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**limit:
        value = "(a huge number)"  # str() of more than 4,300 digits raises
    return str(value)[:limit].encode("utf-8", "replace").decode("utf-8")
