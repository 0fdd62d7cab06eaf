"""`predict_file`: a file of products in, the same rows with prices out; in constant memory, and again after a stop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprice import __version__
from fastprice.data.items import Item, Reject, open_items
from fastprice.errors import ConfigError, DataError, nearest_name
from fastprice.inference.batch import chunks
from fastprice.inference.batch.parts import EXAMPLES, Totals, open_parts
from fastprice.inference.price_distribution import LOSSES

__all__ = ["Progress", "check_options", "predict_file"]


@dataclass(frozen=True)
class Progress:
    """How far a job is: rows done, of them before this process began; the share of the source that is done, 0 to 1."""

    rows: int
    resumed: int
    share: float


def check_options(loss: str, interval: float | None) -> None:
    """ConfigError for an unknown loss, or an interval that is no share."""
    if loss not in LOSSES:
        raise ConfigError(f"unknown loss {loss!r}{nearest_name(loss, LOSSES)}: name one of {', '.join(LOSSES)}")
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
    loss: str = "mae",
    interval: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[Totals, list[str]]:
    """Writes `out` (CSV, JSON Lines or Parquet): a row for each row of `source`, see `fastprice.inference.batch.chunks`.

    source       JSON Lines, CSV, TSV (each also gzipped) or Parquet, read as `load_items` does with `text` and `drop`
    model        the folder of a saved estimator, and `load` what makes an estimator of it; called when all else is
                 in order, since it takes long
    loss, interval, mask   as in `estimate_rows`

    Memory depends on the longest rows, not on their number. `out` appears when it is whole. Until then the parts that
    are done stand in the folder `out`.partial; the same call goes on after them, and `out` is the same byte for byte
    as if it had not been stopped. What makes a call the same: the content of `source` and of the model's folder
    (the base model by its name alone), every argument but the callbacks, and fastprice's version.

    Returns what was counted, and notes on columns (`Items.notes`). Raises ConfigError when parts of another call are
    in the way; DataError for a file that cannot be read, or where no row can be priced.
    """
    check_options(loss, interval)
    with open_items(source, text=text, drop=drop) as rows:
        settings = {
            "input": _digest(source),
            "model": _digest(model),
            "--text": text if isinstance(text, str) else list(text),
            "dropped columns": list(drop),
            "mask": mask,
            "--loss": loss,
            "--interval": interval,
            "rows of a part": chunks.CHUNK_ROWS,
            "fastprice's version": __version__,
        }
        with open_parts(out, settings) as parts:
            resumed, totals = parts.totals.rows, deepcopy(parts.totals)
            read = 0.0  # share of the source

            def tell(done: int, of: int) -> None:
                """`done` of the `of` rows that were read and are not yet in `totals` are priced."""
                if on_progress:
                    known = max(1, totals.rows + of)
                    on_progress(Progress(totals.rows + done, resumed, read * (totals.rows + done) / known))

            def counted(source_rows: Iterable[Item | Reject]) -> Iterator[Item | Reject]:
                nonlocal read
                for row in source_rows:
                    if row.row is not None and row.row > parts.totals.last_row:
                        read = rows.share()
                        yield row

            estimator = load(model)
            tell(0, 0)
            for estimates in chunks.estimate_rows(
                estimator, counted(rows), loss=loss, interval=interval, mask=mask, on_row=tell
            ):
                rejects = estimates.rejects
                totals.rows += len(estimates.rows)
                totals.priced += len(estimates.prices)
                totals.cut += estimates.cut
                totals.last_row = estimates.rows[-1].row or 0
                room = EXAMPLES - len(totals.examples)
                totals.examples += [(reject.row or 0, reject.reason) for reject in rejects[:room]]
                parts.add(estimates.frame(), deepcopy(totals))
                tell(0, 0)
            if not totals.priced:
                row, reason = totals.examples[0]
                raise DataError(
                    f"{source}: none of its {totals.rows:,} rows can be priced; row {row}: {reason}; name another "
                    "column with --text or mend the file"
                )
            parts.finish()
    return totals, rows.notes()


def _digest(path: Path) -> str:
    """A hash of a file's content, or of the names and contents of all files in a folder."""
    digest = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        for inner in sorted(inner for inner in path.rglob("*") if inner.is_file()):
            digest.update(f"{inner.relative_to(path)}\0{_digest(inner)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: digest).hexdigest()
