"""Estimates for rows, a chunk at a time, so that memory does not depend on the number of rows.

A chunk ends after `CHUNK_ROWS` rows or `CHUNK_CHARACTERS` of text, counted from the first row of the source: its bounds
depend on the source alone. The texts that share a batch decide the last digits of a probability, so a stopped job gives
the same result as another one only with equal chunks.

Every row of the source gives one row of the result, in the same order. Its columns:

    row         number of the row in the source, from 1 (in JSON Lines: the line)
    estimate    dollars; empty where there is none
    low, high   dollars, with an interval only
    reason      why there is no estimate; empty where there is one
    text        the text that was read, or the first 200 characters of a row without an estimate
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastprice.data.cleaning import prediction_text
from fastprice.data.items import Item, Reject

if TYPE_CHECKING:
    import polars

__all__ = ["CHUNK_CHARACTERS", "CHUNK_ROWS", "Estimates", "chunked", "estimate_rows"]

CHUNK_ROWS = 1024
CHUNK_CHARACTERS = 2**24


@dataclass(frozen=True)
class Estimates:
    """The rows of one chunk in order, and the estimates for the N items among them.

    prices  (N,) dollars
    bounds  (N, 2) dollars: low and high; None without an interval
    cut     number of texts that were longer than the model reads
    """

    rows: list[Item | Reject]
    prices: NDArray[np.float64]
    bounds: NDArray[np.float64] | None
    cut: int

    @property
    def rejects(self) -> list[Reject]:
        return [row for row in self.rows if isinstance(row, Reject)]

    def frame(self) -> polars.DataFrame:
        """One row for each of `rows`, with the columns listed at the top of this module."""
        import polars as pl

        index = np.cumsum([isinstance(row, Item) for row in self.rows]) - 1

        def by_row(values: NDArray[np.float64]) -> list[float | None]:
            return [
                float(values[at]) if isinstance(row, Item) else None for at, row in zip(index, self.rows, strict=True)
            ]

        columns: dict[str, tuple[list[Any], Any]] = {
            "row": ([row.row for row in self.rows], pl.Int64),
            "estimate": (by_row(self.prices), pl.Float64),
        }
        if self.bounds is not None:
            columns["low"] = (by_row(self.bounds[:, 0]), pl.Float64)
            columns["high"] = (by_row(self.bounds[:, 1]), pl.Float64)
        # "" and not null: readers of JSON Lines infer the type of a column from its first rows.
        columns["reason"] = ([row.reason if isinstance(row, Reject) else "" for row in self.rows], pl.String)
        columns["text"] = ([_encodable(row.text) for row in self.rows], pl.String)
        return pl.DataFrame({name: pl.Series(values, dtype=dtype) for name, (values, dtype) in columns.items()})


def chunked(rows: Iterable[Item | Reject]) -> Iterator[list[Item | Reject]]:
    """The rows in non-empty chunks, see the module."""
    chunk: list[Item | Reject] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row.text)
        if len(chunk) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def estimate_rows(
    estimator: Any,
    rows: Iterable[Item | Reject],
    *,
    criterion: str = "mae",
    interval: float | None = None,
    mask: str = "own",
    on_row: Callable[[int, int], None] | None = None,
) -> Iterator[Estimates]:
    """Yields the estimates of each chunk of `rows`.

    estimator  a PriceEstimator that was fitted or loaded
    criterion  what the estimates minimize, as in `PriceEstimator.predict`
    interval   the coverage of unseen prices by low and high, between 0 and 1; None: no bounds
    mask       that of the training texts (`clean_items`): "prices" masks every mention of money here as well
    on_row     called as (finished rows of the chunk, rows of the chunk)

    Raises ConfigError for an unknown criterion or an impossible interval, DataError for one that is not calibrated.
    """
    for chunk in chunked(rows):
        yield _estimate(estimator, chunk, criterion, interval, mask, on_row)


def _estimate(
    estimator: Any,
    chunk: list[Item | Reject],
    criterion: str,
    interval: float | None,
    mask: str,
    on_row: Callable[[int, int], None] | None,
) -> Estimates:
    texts = [prediction_text(row.text, mask) for row in chunk if isinstance(row, Item)]
    rejected = len(chunk) - len(texts)

    def on_batch(done: int) -> None:
        if on_row:
            on_row(rejected + done, len(chunk))

    prompts = estimator.prompts(texts)
    distributions = estimator.distributions(prompts, on_batch=on_batch)
    prices = estimator.estimates(distributions, criterion)
    bounds = None if interval is None else estimator.intervals(distributions, interval)
    return Estimates(chunk, prices, bounds, sum(prompt.cut > 0 for prompt in prompts))


def _encodable(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which has no UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")
