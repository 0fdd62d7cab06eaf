"""Writing estimates to a file: CSV, JSON Lines or Parquet, by its ending; whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastprice.errors import ConfigError
from fastprice.items import Item

__all__ = ["check_target", "write_predictions"]

ENDINGS = (".csv", ".jsonl", ".parquet")


def check_target(path: Path) -> None:
    """ConfigError when predictions cannot be written to `path`; asked before the work, not after it."""
    if path.suffix not in ENDINGS:
        raise ConfigError(f"--out {path}: the ending must be one of {', '.join(ENDINGS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: the folder {path.parent} does not exist")


def write_predictions(
    path: Path, items: Sequence[Item], prices: NDArray[np.float64], bounds: NDArray[np.float64] | None = None
) -> None:
    """One row an item: `row` (of the source, from 1), `estimate`, and with `bounds` (N, 2) `low`, `high`; `text`.

    Amounts are dollars.
    """
    import polars as pl

    check_target(path)
    sides = {} if bounds is None else {"low": bounds[:, 0], "high": bounds[:, 1]}
    frame = pl.DataFrame(
        {"row": [item.row for item in items], "estimate": prices, **sides, "text": [item.text for item in items]}
    )
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".csv":
            frame.write_csv(half)
        elif path.suffix == ".jsonl":
            frame.write_ndjson(half)
        else:
            frame.write_parquet(half)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
