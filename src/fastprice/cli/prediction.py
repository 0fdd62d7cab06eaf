"""`predict` and `evaluate`: a saved estimator at work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastprice.cli.options import (
    ModelDir,
    Price,
    Text,
    load_estimator,
    load_rows,
    make_console,
    saved_estimator_folder,
    trained_columns,
)
from fastprice.errors import ConfigError


def predict(
    model: ModelDir,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="JSONL(.gz), CSV or Parquet file.")] = None,
    item: Annotated[list[str] | None, typer.Option("--item", metavar="TEXT...", help="Texts to price.")] = None,
    text: Text = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="CSV, JSONL or Parquet to write.")] = None,
    loss: Annotated[str, typer.Option(help="What the estimates make small: mae, mse, rmsle, mape or hits.")] = "mae",
    interval: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Add low and high that hold this share, such as 0.9.")
    ] = None,
) -> None:
    """Estimate prices of texts, or of every row of a file."""
    saved_estimator_folder(model)
    if (file is None) == (item is None):
        raise ConfigError("predict: give either a FILE or texts with --item 'some text'")
    if item is not None:
        from fastprice.items import Item, Items

        items = Items([Item(given, row=number) for number, given in enumerate(item, 1)])
    else:
        assert file is not None
        items = load_rows(file, model, text, price=None)

    from fastprice.predictions import check_target, write_predictions

    if out is not None:
        check_target(out)
    estimator = load_estimator(model)
    prompts = estimator.prompts(items)
    distributions = estimator.distributions(prompts)
    prices = estimator.guesses(distributions, loss)
    bounds = None if interval is None else estimator.intervals(distributions, interval)
    cut = sum(prompt.cut > 0 for prompt in prompts)
    console = make_console()
    if out is None:
        for index, (each, amount) in enumerate(zip(items, prices, strict=True)):
            between = "" if bounds is None else f"\t${bounds[index, 0]:,.0f} to ${bounds[index, 1]:,.0f}"
            text_shown = " ".join(each.text.split())[:90]
            console.print(f"${amount:,.0f}{between}\t{text_shown}", highlight=False, markup=False)
    else:
        write_predictions(out, items, prices, bounds)
        console.print(f"{len(items):,} prices written to {out}")
    if cut:
        console.print(f"{cut:,} texts were longer than {estimator.max_tokens} tokens: their ends were cut")
    for reject in items.rejects:
        console.print(f"row {reject.row} has no estimate: {reject.reason}", highlight=False, markup=False)


def evaluate(
    model: ModelDir,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL(.gz), CSV or Parquet file with prices.")],
    text: Text = None,
    price: Price = None,
) -> None:
    """Score a saved model on the priced rows of a file."""
    saved_estimator_folder(model)
    items = load_rows(file, model, text, price=price or trained_columns(model).get("price") or "price")

    from fastprice.cleaning import clean_items

    items = clean_items(items)
    estimator = load_estimator(model)

    from fastprice.evaluation import evaluate_all

    console = make_console()
    console.print(evaluate_all({str(model): estimator.predict}, items).table())
    if items.rejects:
        console.print(f"{len(items.rejects):,} rows were not used, such as row {items.rejects[0].row}: "
                      f"{items.rejects[0].reason}", highlight=False, markup=False)  # fmt: skip
