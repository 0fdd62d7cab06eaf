"""`evaluate`: a saved estimator scored on a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fastprice.cli.options import ModelDir, Price, Text, make_console
from fastprice.cli.saved_runs import (
    load_estimator,
    load_rows,
    saved_estimator_folder,
    trained_cleaning,
    trained_data,
)


def evaluate(
    model: ModelDir,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL(.gz), CSV or Parquet file with prices.")],
    text: Text = None,
    price: Price = None,
) -> None:
    """Score a saved model on the priced rows of a file."""
    saved_estimator_folder(model)
    trained = trained_data(model)
    items = load_rows(file, model, text, price=price or ("price" if trained is None else trained.price))

    from fastprice.data.cleaning import clean_items

    items = clean_items(items, **asdict(trained_cleaning(model)))
    estimator = load_estimator(model)

    from fastprice.evaluation.evaluate import evaluate_models

    console = make_console()
    console.print(evaluate_models({str(model): estimator.predict}, items).table())
    if items.rejects:
        console.print(f"{len(items.rejects):,} rows were not used, such as row {items.rejects[0].row}: "
                      f"{items.rejects[0].reason}", highlight=False, markup=False)  # fmt: skip
