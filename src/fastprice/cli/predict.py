"""`predict` and `evaluate`: a saved estimator at work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastprice.cli.options import (
    ModelDir,
    Price,
    Text,
    load_estimator,
    load_rows,
    make_console,
    saved_estimator_folder,
    text_columns,
    trained_cleaning,
    trained_columns,
)
from fastprice.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fastprice.inference.batch import Estimates, Totals


def predict(
    model: ModelDir,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="JSONL(.gz), CSV or Parquet file.")] = None,
    item: Annotated[list[str] | None, typer.Option("--item", metavar="TEXT...", help="Texts to price.")] = None,
    text: Text = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="CSV, JSONL or Parquet to write.")] = None,
    criterion: Annotated[str, typer.Option(help="What the estimates minimize: mae, mse, rmsle, mape or hits.")] = "mae",
    interval: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Add low and high that hold this share, such as 0.9.")
    ] = None,
) -> None:
    """Estimate prices of texts, or of every row of a file; a file of any length, and again after a stop.

    With --out each row of the file gives one row there. It appears when it is whole; until then its parts are in
    OUT.partial, and the same command goes on where it was stopped.
    """
    folder = saved_estimator_folder(model)
    if (file is None) == (item is None):
        raise ConfigError("predict: give either a FILE or texts with --item 'some text'")
    if item is not None and out is not None:
        raise ConfigError("predict: --out is for the rows of a FILE; the prices of --item are printed")

    from fastprice.data.items import Item, open_items
    from fastprice.inference.batch import check_options, check_target, estimate_rows, predict_file

    check_options(criterion, interval)
    console = make_console()
    mask = trained_cleaning(model)["mask"]
    columns, drop = text_columns(model, text, price=None)
    if out is not None:
        assert file is not None
        check_target(out)
        with _Bar(console) as bar:
            totals, notes = predict_file(
                file, out, model=folder, load=lambda _: load_estimator(model), text=columns, drop=drop, mask=mask,
                criterion=criterion, interval=interval, on_progress=bar,
            )  # fmt: skip
        _say_totals(console, out, totals, notes)
        return

    def show(rows: Any) -> None:
        estimator = load_estimator(model)
        cut = 0
        for estimates in estimate_rows(estimator, rows, criterion=criterion, interval=interval, mask=mask):
            _say_estimates(console, estimates)
            cut += estimates.cut
        if cut:
            console.print(f"{cut:,} texts were longer than {estimator.max_tokens} tokens: their ends were cut")

    if item is not None:
        show(Item(given, row=number) for number, given in enumerate(item, 1))
    else:
        assert file is not None
        with open_items(file, text=columns, drop=drop) as rows:
            show(rows)


def evaluate(
    model: ModelDir,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL(.gz), CSV or Parquet file with prices.")],
    text: Text = None,
    price: Price = None,
) -> None:
    """Score a saved model on the priced rows of a file."""
    saved_estimator_folder(model)
    items = load_rows(file, model, text, price=price or trained_columns(model).get("price") or "price")

    from fastprice.data.cleaning import clean_items

    items = clean_items(items, **trained_cleaning(model))
    estimator = load_estimator(model)

    from fastprice.evaluation.evaluate import evaluate_models

    console = make_console()
    console.print(evaluate_models({str(model): estimator.predict}, items).table())
    if items.rejects:
        console.print(f"{len(items.rejects):,} rows were not used, such as row {items.rejects[0].row}: "
                      f"{items.rejects[0].reason}", highlight=False, markup=False)  # fmt: skip


def _say_estimates(console: Console, estimates: Estimates) -> None:
    from fastprice.data.cleaning import repair_text
    from fastprice.data.items import Item

    at = 0
    for row in estimates.rows:
        if not isinstance(row, Item):
            console.print(f"row {row.row} has no estimate: {row.reason}", highlight=False, markup=False)
            continue
        between = "" if estimates.bounds is None else "\t${:,.0f} to ${:,.0f}".format(*estimates.bounds[at])
        # Repaired: a text from anywhere must not steer the terminal with control characters.
        shown = " ".join(repair_text(row.text).split())[:90]
        console.print(f"${estimates.prices[at]:,.0f}{between}\t{shown}", highlight=False, markup=False)
        at += 1


def _say_totals(console: Console, out: Path, totals: Totals, notes: list[str]) -> None:
    console.print(f"{totals.priced:,} prices written to {out}", highlight=False, markup=False)
    if totals.cut:
        console.print(f"{totals.cut:,} texts were longer than the model reads: their ends were cut")
    for row, reason in totals.examples:
        console.print(f"row {row} has no estimate: {reason}", highlight=False, markup=False)
    if more := totals.rows - totals.priced - len(totals.examples):
        console.print(f"nor have {more:,} other rows; the column 'reason' says why")
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)


class _Bar:
    """A progress bar with rows a second and the time left, on a terminal; nothing elsewhere."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._shown = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._shown.add_task("reading", total=1.0, speed="", left="")

    def __enter__(self) -> _Bar:
        self._shown.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.stop()

    def __call__(self, done: Any) -> None:
        """Takes a fastprice.inference.batch.Progress."""
        import time
        from datetime import timedelta

        if done.rows == done.resumed:
            self._started = time.monotonic()
            self._shown.update(self._task, description=f"{done.rows:,} rows")
            return
        seconds = max(time.monotonic() - self._started, 1e-9)
        speed = (done.rows - done.resumed) / seconds
        left = timedelta(seconds=round(done.rows * (1 / max(done.share, 1e-9) - 1) / speed))
        self._shown.update(
            self._task,
            description=f"{done.rows:,} rows",
            completed=done.share,
            speed=f"{speed:,.0f} rows/s",
            left=f"{left} left",
        )
