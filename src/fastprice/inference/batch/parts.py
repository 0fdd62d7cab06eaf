"""A file that is written in parts beside its place, and moved there when it is complete.

While `prices.csv` is written, `prices.csv.partial/` has

    000000.csv, 000001.csv, ...   the finished chunks, each of them a readable file
    ledger.json                   the settings of the job, the number of parts, and their totals
    lock                          locked by the process at work

A part gets its name when it is complete, then the ledger counts it, each by a rename. So a process killed at any moment
leaves complete parts and a correct ledger; a part that the ledger does not count is written again. Parts of another
source, model or option are never mixed with these: while they have estimates, they are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from fastprice.common.files import atomic_file, move_into_place, write_text_atomically
from fastprice.errors import ConfigError, FastpriceError

if TYPE_CHECKING:
    import polars

__all__ = ["ENDINGS", "Parts", "Totals", "check_target"]

ENDINGS = (".csv", ".jsonl", ".parquet")
LEDGER, LOCK = "ledger.json", "lock"
EXAMPLES = 5  # rows without an estimate that are reported one by one
_GROUP_ROWS, _GROUP_BYTES = 2**14, 2**26  # of a row group of a Parquet file


@dataclass
class Totals:
    """Counts over all parts of a job.

    rows      of the source
    priced    of them, those with an estimate
    cut       texts that were longer than the model reads
    last_row  number of the last row in the source
    examples  the first rows without an estimate: (number, reason)
    """

    rows: int = 0
    priced: int = 0
    cut: int = 0
    last_row: int = 0
    examples: list[tuple[int, str]] = field(default_factory=list)


def check_target(path: Path) -> None:
    """Raises ConfigError when a table cannot be written to `path`; to be called before the work."""
    if path.suffix not in ENDINGS:
        raise ConfigError(f"--out {path}: the ending must be one of {', '.join(ENDINGS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ConfigError(f"--out {path}: is a folder; name a file")


class Parts:
    """The finished parts of `target`, their number and totals. Made by `open_parts`."""

    def __init__(self, target: Path, folder: Path, settings: dict[str, Any], count: int, totals: Totals) -> None:
        self.target, self.folder, self.settings = target, folder, settings
        self.count, self.totals = count, totals

    def add(self, frame: polars.DataFrame, totals: Totals) -> None:
        """Writes the next part; `totals` are those of all parts up to and with it."""
        with atomic_file(self._part(self.count)) as half:
            _write_frame(frame, half, self.target.suffix)
        self.count, self.totals = self.count + 1, totals
        self.write_ledger()

    def write_ledger(self) -> None:
        ledger = {"settings": self.settings, "parts": self.count, "totals": asdict(self.totals)}
        write_text_atomically(self.folder / LEDGER, json.dumps(ledger))

    def finish(self) -> None:
        """Joins the parts under the target's name, and deletes them."""
        parts = [self._part(index) for index in range(self.count)]
        whole = self.folder / f"whole{self.target.suffix}"
        (_join_parquet if self.target.suffix == ".parquet" else _join_text)(parts, whole)
        move_into_place(whole, self.target)
        shutil.rmtree(self.folder)

    def _part(self, index: int) -> Path:
        return self.folder / f"{index:06d}{self.target.suffix}"


@contextmanager
def open_parts(target: Path, settings: dict[str, Any]) -> Iterator[Parts]:
    """The parts of `target` written with `settings` (JSON values), with those of an earlier process.

    A FastpriceError before the first estimate leaves nothing behind. Raises ConfigError when the parts there have
    estimates made with other settings (and says which), are damaged, or are being written by another process.
    """
    check_target(target)
    folder = target.with_name(target.name + ".partial")
    if folder.exists() and not (folder / LOCK).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists and was not made by predict; move it, or name another --out")
    folder.mkdir(exist_ok=True)
    try:
        lock = FileLock(folder / LOCK).acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(f"{folder}: another process is writing it; wait for it, or name another --out") from error
    with lock:
        count, totals = _read_ledger(folder, settings)
        parts = Parts(target, folder, settings, count, totals)
        try:
            parts.write_ledger()
            yield parts
        except FastpriceError:
            if not parts.totals.priced:
                shutil.rmtree(folder)
            raise


def _read_ledger(folder: Path, settings: dict[str, Any]) -> tuple[int, Totals]:
    """(Number of finished parts, their totals) of the folder; none if their settings differ and no estimate is lost."""
    path = folder / LEDGER
    if not path.is_file():
        return 0, Totals()
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
        count, totals, earlier = int(ledger["parts"]), Totals(**ledger["totals"]), dict(ledger["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is damaged ({error}); delete {folder} to start anew") from error
    totals.examples = [(row, reason) for row, reason in totals.examples]
    changed = [name for name in {**settings, **earlier} if settings.get(name) != earlier.get(name)]
    if not changed:
        return count, totals
    if not totals.priced:
        return 0, Totals()
    raise ConfigError(
        f"{folder}: has {totals.rows:,} rows of an earlier command, and since then changed: {', '.join(changed)}; "
        "repeat that command to go on with them, or delete the folder to start anew"
    )


def _write_frame(frame: polars.DataFrame, path: Path, ending: str) -> None:
    if ending == ".csv":
        frame.write_csv(path)
    elif ending == ".jsonl":
        frame.write_ndjson(path)
    else:
        frame.write_parquet(path)


def _join_text(parts: list[Path], whole: Path) -> None:
    """CSV or JSON Lines files one after the other; of CSV headers, only the first."""
    with whole.open("wb") as out:
        for index, part in enumerate(parts):
            with part.open("rb") as lines:
                if index and whole.suffix == ".csv":
                    lines.readline()
                shutil.copyfileobj(lines, out)


def _join_parquet(parts: list[Path], whole: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetWriter(whole, parquet.read_schema(parts[0]), compression="zstd") as out:
        group: list[Any] = []
        for part in parts:
            group.append(parquet.read_table(part))
            if sum(map(len, group)) >= _GROUP_ROWS or sum(table.nbytes for table in group) >= _GROUP_BYTES:
                out.write_table(pyarrow.concat_tables(group))
                group = []
        if group:
            out.write_table(pyarrow.concat_tables(group))
