"""A file that is written in parts beside its place, and put there when it is whole.

While `prices.csv` is made, `prices.csv.partial/` holds

    000000.csv, 000001.csv, ...   the chunks that are done, each of them a readable file
    ledger.json                   what the parts were made from and with, how many there are, and what was counted
    lock                          held by the process at work

A part appears under its name when it is whole, then the ledger counts it, each by a rename. So a process killed at any
moment leaves whole parts and a true ledger; a part that the ledger does not count is made again.
Parts of another source, model or option are never mixed with one's own: they are refused while they hold estimates.
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
EXAMPLES = 5  # rows without an estimate that are told one by one
_GROUP_ROWS, _GROUP_BYTES = 2**14, 2**26  # of a row group of a Parquet file


@dataclass
class Totals:
    """What was counted over all parts: rows of the source, those priced, texts cut.

    `last_row` is the last row's number; `examples` are the first rows without an estimate, with their reasons.
    """

    rows: int = 0
    priced: int = 0
    cut: int = 0
    last_row: int = 0
    examples: list[tuple[int, str]] = field(default_factory=list)


def check_target(path: Path) -> None:
    """ConfigError when a table cannot be written to `path`; asked before the work, not after it."""
    if path.suffix not in ENDINGS:
        raise ConfigError(f"--out {path}: the ending must be one of {', '.join(ENDINGS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ConfigError(f"--out {path}: is a folder; name a file")


class Parts:
    """The parts of `target`: `add` and `finish` write, `totals` says what is there. Made by `open_parts`."""

    def __init__(self, target: Path, folder: Path, settings: dict[str, Any], count: int, totals: Totals) -> None:
        self.target, self.folder, self.settings = target, folder, settings
        self.count, self.totals = count, totals

    def add(self, frame: polars.DataFrame, totals: Totals) -> None:
        """Writes the next part; `totals` are those of all parts up to it."""
        with atomic_file(self._part(self.count)) as half:
            _write_frame(frame, half, self.target.suffix)
        self.count, self.totals = self.count + 1, totals
        self.write_ledger()

    def write_ledger(self) -> None:
        ledger = {"settings": self.settings, "parts": self.count, "totals": asdict(self.totals)}
        write_text_atomically(self.folder / LEDGER, json.dumps(ledger))

    def finish(self) -> None:
        """Puts the parts together under the target's name, and takes them away."""
        parts = [self._part(index) for index in range(self.count)]
        whole = self.folder / f"whole{self.target.suffix}"
        (_join_parquet if self.target.suffix == ".parquet" else _join_text)(parts, whole)
        move_into_place(whole, self.target)
        shutil.rmtree(self.folder)

    def _part(self, index: int) -> Path:
        return self.folder / f"{index:06d}{self.target.suffix}"


@contextmanager
def open_parts(target: Path, settings: dict[str, Any]) -> Iterator[Parts]:
    """The parts of `target` made with `settings` (JSON values), those of an earlier process among them.

    A mistake of the user's before the first estimate leaves nothing behind. Raises ConfigError when the parts there
    hold estimates made with other settings (naming which), are damaged, or when another process is writing them.
    """
    check_target(target)
    folder = target.with_name(target.name + ".partial")
    if folder.exists() and not (folder / LOCK).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is in the way and was not made by predict; move it, or name another --out")
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
    """(Parts that are done, their totals) of the folder; none where no estimate of them would be lost."""
    path = folder / LEDGER
    if not path.is_file():
        return 0, Totals()
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
        count, totals, then = int(ledger["parts"]), Totals(**ledger["totals"]), dict(ledger["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is damaged ({error}); delete {folder} to start anew") from error
    totals.examples = [(row, reason) for row, reason in totals.examples]
    changed = [name for name in {**settings, **then} if settings.get(name) != then.get(name)]
    if not changed:
        return count, totals
    if not totals.priced:
        return 0, Totals()
    raise ConfigError(
        f"{folder}: holds {totals.rows:,} rows that an earlier command left, and since then changed: "
        f"{', '.join(changed)}; repeat that command to go on with them, or delete the folder to start anew"
    )


def _write_frame(frame: polars.DataFrame, path: Path, ending: str) -> None:
    if ending == ".csv":
        frame.write_csv(path)
    elif ending == ".jsonl":
        frame.write_ndjson(path)
    else:
        frame.write_parquet(path)


def _join_text(parts: list[Path], whole: Path) -> None:
    """CSV and JSON Lines one after the other; of the CSV headers, the first alone."""
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
