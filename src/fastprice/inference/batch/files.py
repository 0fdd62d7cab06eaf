"""`predict_file`: estimates for a file of products of any length, in constant memory, resumable after a stop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprice import __version__
from fastprice.data.items import Item, Reject, open_items
from fastprice.errors import ConfigError, DataError
from fastprice.inference.batch import chunks
from fastprice.inference.batch.parts import EXAMPLES, Totals, open_parts
from fastprice.inference.price_distribution import check_criterion

__all__ = ["Progress", "check_options", "predict_file"]


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    rows     finished rows
    resumed  of them, those that were finished before this process began
    share    the finished share of the source, 0 to 1
    """

    rows: int
    resumed: int
    share: float


def check_options(criterion: str, interval: float | None) -> None:
    """Raises ConfigError for an unknown criterion, or an interval that is not between 0 and 1."""
    check_criterion(criterion)
    if interval is not None and not 0 < interval < 1:
        raise ConfigError(f"interval {interval}: give a share between 0 and 1, such as 0.9")


def predict_file(
    source: Path,
    out: Path,
    *,
    model: Path,
    load: Callable[[Path], Any],
    text: str | Sequence[str] = "text",
    drop: Sequence[str] = (),
    mask: str = "own",
    criterion: str = "mae",
    interval: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[Totals, list[str]]:
    """Writes `out` (CSV, JSON Lines or Parquet) with a row for each row of `source` (columns: `batch.chunks`).

    source       JSON Lines, CSV, TSV (each also gzipped) or Parquet, read as `load_items` does with `text` and `drop`
    model        the folder of a saved estimator, and `load` the function that loads it; called last, as it takes long
    criterion, interval, mask   as in `estimate_rows`

    Memory depends on the longest rows, not on their number. `out` appears when it is complete. Until then its finished
    parts are in the folder `out`.partial; the same call goes on after them, and `out` is the same byte for byte as if
    the job had not been stopped. A call is the same if these are: the content of `source` and of the model's folder
    (the base model by its name alone), every argument but the callbacks, and fastprice's version.

    Returns the totals, and notes on columns (`Items.notes`). Raises ConfigError when parts of another call are in the
    folder; DataError for a file that cannot be read, or where no row gets an estimate.
    """
    check_options(criterion, interval)
    with open_items(source, text=text, drop=drop) as rows:
        settings = {
            "input": _digest(source),
            "model": _digest(model),
            "--text": text if isinstance(text, str) else list(text),
            "dropped columns": list(drop),
            "mask": mask,
            "--criterion": criterion,
            "--interval": interval,
            "rows of a part": chunks.CHUNK_ROWS,
            "fastprice's version": __version__,
        }
        with open_parts(out, settings) as parts:
            resumed, totals = parts.totals.rows, deepcopy(parts.totals)
            read = 0.0  # share of the source

            def report(done: int, pending: int) -> None:
                """Of the `pending` rows that were read and are not yet in `totals`, `done` are finished."""
                if on_progress:
                    known = max(1, totals.rows + pending)
                    on_progress(Progress(totals.rows + done, resumed, read * (totals.rows + done) / known))

            def remaining(source_rows: Iterable[Item | Reject]) -> Iterator[Item | Reject]:
                nonlocal read
                for row in source_rows:
                    if row.row is not None and row.row > parts.totals.last_row:
                        read = rows.fraction_read()
                        yield row

            estimator = load(model)
            report(0, 0)
            for estimates in chunks.estimate_rows(
                estimator, remaining(rows), criterion=criterion, interval=interval, mask=mask, on_row=report
            ):
                rejects = estimates.rejects
                totals.rows += len(estimates.rows)
                totals.priced += len(estimates.prices)
                totals.cut += estimates.cut
                totals.last_row = estimates.rows[-1].row or 0
                room = EXAMPLES - len(totals.examples)
                totals.examples += [(reject.row or 0, reject.reason) for reject in rejects[:room]]
                parts.add(estimates.frame(), deepcopy(totals))
                report(0, 0)
            if not totals.priced:
                row, reason = totals.examples[0]
                raise DataError(
                    f"{source}: none of its {totals.rows:,} rows has an estimate; row {row}: {reason}; name another "
                    "column with --text or correct the file"
                )
            parts.finish()
    return totals, rows.notes()


def _digest(path: Path) -> str:
    """A hash of a file's content, or of the names and contents of all files of a folder."""
    digest = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        for inner in sorted(inner for inner in path.rglob("*") if inner.is_file()):
            digest.update(f"{inner.relative_to(path)}\0{_digest(inner)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: digest).hexdigest()
