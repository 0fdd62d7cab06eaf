"""Readers of tables: JSON Lines, CSV, TSV or Parquet, the text formats also gzipped; the file's ending decides.

`open_table` gives columns and rows. A row is `(number, record, problem)`, numbered from 1, where either the record is a
dict or the problem says why the row is rejected. A file that is not what its ending says, or is damaged, raises
DataError. Rows are read one at a time and none is stored, so a file may be larger than memory.

CSV is read by the standard library's reader in strict mode rather than by polars, which fills short rows without a
message and guesses types; here each ragged row is rejected with its number.
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

__all__ = ["Table", "TableRow", "excerpt", "open_table"]

EXCERPT_CHARACTERS = 200  # of a row in its reject
FIELD_LIMIT = 2**24  # characters of a CSV field; the csv module's default is 2**17, less than some descriptions
_PARQUET_BATCH = 1024  # rows that are decoded at once

TableRow = tuple[int, dict[str, Any] | str, str]  # (row number, record, "") or (row number, raw text, problem)


@dataclass
class Table:
    """An open file of rows.

    Attributes:
        rows: read when iterated.
        columns: the names of the columns, in order; of JSON Lines, those of the rows read so far.
        typed: whether values have types; False for CSV, where all are strings.
        fraction_read: a function that returns how much of the file has been read, from 0 to 1.
    """

    rows: Iterator[TableRow]
    columns: dict[str, None] = field(default_factory=dict)
    typed: bool = True
    fraction_read: Callable[[], float] = float


@contextmanager
def open_table(path: Path, columns: frozenset[str] | None = None) -> Iterator[Table]:
    """Open a table by the ending of its file.

    columns   those to read of a Parquet file; None: all. Text files are always read whole.

    Raises DataError, which names the file, for one that is missing, damaged or not what its ending says, also while
    rows are read.
    """
    _check_exists(path)
    name = path.name.lower()
    gzipped = name.endswith(".gz")
    ending = Path(name.removesuffix(".gz")).suffix
    readers: dict[str, Callable[[io.BufferedReader[Any], Path], Table]] = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".csv": _read_csv,
        ".tsv": partial(_read_csv, delimiter="\t"),
    }
    if not gzipped and ending in (".parquet", ".pq"):
        with _open_parquet(path, columns) as table:
            yield table
        return
    if ending not in readers:
        raise DataError(
            f"{path}: the ending must be .jsonl, .ndjson, .csv, .tsv (each also with .gz) or .parquet; convert or "
            "rename the file"
        )
    try:
        with path.open("rb") as raw:
            if not raw.peek(1):
                raise DataError(f"{path}: the file is empty")
            if gzipped and not raw.peek(2).startswith(b"\x1f\x8b"):
                raise DataError(f"{path}: is not gzip, as its ending says; remove .gz from its name or compress it")
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if gzipped else raw
            head = stream.peek(4096)[:4096]
            if not head:
                raise DataError(f"{path}: the file is empty")
            if kind := _binary_kind(head):
                raise DataError(f"{path}: is not {ending[1:].upper()} text, as its ending says, but {kind}")
            if head.startswith(codecs.BOM_UTF8):
                stream.read(len(codecs.BOM_UTF8))
            table = readers[ending](stream, path)
            size = path.stat().st_size
            table.fraction_read = lambda: raw.tell() / size
            with _field_limit():
                yield table
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip data is damaged or truncated ({error}); download or create it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextmanager
def _field_limit() -> Iterator[None]:
    """Sets the csv module's field limit, which holds for the whole process, to `FIELD_LIMIT`."""
    before = csv.field_size_limit(FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_exists(path: Path) -> None:
    try:
        if path.is_file():
            return
        if path.is_dir():
            raise DataError(f"{path}: is a folder, not a file; give a file in it")
        if path.exists():
            raise DataError(f"{path}: is not a regular file; give a file of rows")
        if not path.parent.is_dir():
            raise DataError(f"{path}: no such file, and no folder {path.parent}; check the path")
        names = [other.name for other in path.parent.iterdir()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    raise DataError(f"{path}: no such file{nearest_name(path.name, names)}")


def _binary_kind(head: bytes) -> str:
    """What kind of file begins with these bytes and what to do with it; "" for UTF-8 text."""
    for magic, kind in (
        (b"\x1f\x8b", "gzip; add .gz to its name"),
        (b"PAR1", "Parquet; rename it to .parquet"),
        (b"PK\x03\x04", "a zip archive or spreadsheet; unpack or export it"),
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
        return "a web page; download the data itself"
    return ""


def _read_jsonl(stream: io.BufferedReader[Any], path: Path) -> Table:
    columns: dict[str, None] = {}

    def rows() -> Iterator[TableRow]:
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
                yield number, excerpt(raw.decode("utf-8", "replace").strip()), f"not JSON: {error}"
                continue
            parsed = True
            if isinstance(record, dict):
                columns.update(dict.fromkeys(record))
                yield number, record, ""
            else:
                yield number, excerpt(record), f"not a JSON object but {_json_kind(record)}"
        if failed and not parsed:
            raise DataError(f"{path}: is not JSON Lines, as its ending says: no line is JSON; rename or convert it")

    return Table(rows(), columns)


def _json_kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list (is the file one JSON array? write one object per line)"
    return {str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


def _read_csv(stream: io.BufferedReader[Any], path: Path, delimiter: str = ",") -> Table:
    # Bytes that are not UTF-8 become lone surrogates, so that the row that contains them can be named.
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
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        fields = [str(index) for index, name in enumerate(header, 1) if name == repeated[0]]
        raise DataError(
            f"{path}: the header names column {repeated[0]!r} twice (fields {', '.join(fields)}); rename one"
        )

    def rows() -> Iterator[TableRow]:
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
                lines_read = f"line {first}" + (f" to {reader.line_num}" if reader.line_num > first else "")
                if "end of data" in str(error) or "field limit" in str(error):
                    size = "to the end of the file" if "end" in str(error) else f"over {FIELD_LIMIT:,} characters"
                    raise DataError(
                        f"{path}: row {number} ({lines_read}): a field runs {size}; check that its quote is closed"
                    ) from error
                yield number, excerpt("".join(raw).strip()), f"{lines_read} is not CSV: {error}"
                continue
            if not cells:
                continue
            number += 1
            text = "".join(raw).strip()
            if not _is_utf8(text):
                yield number, excerpt(text), f"line {first} is not UTF-8; save the file as UTF-8"
            elif len(cells) != len(header):
                yield number, excerpt(text), f"{len(cells)} fields where the header has {len(header)}"
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
def _open_parquet(path: Path, columns: frozenset[str] | None) -> Iterator[Table]:
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
        # A row group may be the whole file, so its columns are read in pieces, not buffered as a whole.
        file = ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    except (ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    with file:
        names = file.schema_arrow.names
        total = max(1, file.metadata.num_rows)
        read = 0

        def rows() -> Iterator[TableRow]:
            import polars

            nonlocal read
            read_columns = None if columns is None else [name for name in names if name in columns]
            try:
                for batch in file.iter_batches(_PARQUET_BATCH, columns=read_columns, use_threads=False):
                    for record in polars.DataFrame(polars.from_arrow(batch)).iter_rows(named=True):
                        read += 1
                        yield read, record, ""
            except (ArrowException, OSError, polars.exceptions.PolarsError, polars.exceptions.PanicException) as error:
                raise _damaged(path, error) from error

        yield Table(rows(), dict.fromkeys(names), fraction_read=lambda: read / total)


def _damaged(path: Path, error: BaseException) -> DataError:
    message = str(error).strip()
    reason = message.splitlines()[0] if message else type(error).__name__
    return DataError(f"{path}: the Parquet data is damaged or truncated ({reason}); download or create it again")


def excerpt(value: Any, limit: int = EXCERPT_CHARACTERS) -> str:
    """At most `limit` characters of a value as text that can be encoded as UTF-8, for messages and rejects."""
    if isinstance(value, (dict, list)):
        try:
            value = json.dumps(value, ensure_ascii=False, default=str)
        except RecursionError:
            value = "(nested too deeply)"
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**limit:
        value = "(a huge number)"  # str() of more than 4,300 digits raises
    return str(value)[:limit].encode("utf-8", "replace").decode("utf-8")
