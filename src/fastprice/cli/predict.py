"""`predict`: prices of texts or of the rows of a file."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastprice.cli.options import Criterion, ModelDir, Text, make_console
from fastprice.cli.saved_runs import load_estimator, saved_estimator_folder, text_columns, trained_cleaning
from fastprice.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fastprice.inference.batch import Estimates, Progress, Totals


def predict(
    model: ModelDir,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="JSONL(.gz), CSV or Parquet file.")] = None,
    item: Annotated[
        list[str] | None, typer.Option("--item", metavar="TEXT...", help="Texts whose prices are estimated.")
    ] = None,
    text: Text = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="CSV, JSONL or Parquet to write.")] = None,
    criterion: Criterion = "mae",
    interval: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Add the bounds of intervals with this coverage, such as 0.9.")
    ] = None,
) -> None:
    """Estimate the prices of texts, or of the rows of a file of any length.

    With --out each row of the file gives one row there; an interrupted command, given again, goes on from OUT.partial.
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
    mask = trained_cleaning(model).mask
    columns, drop = text_columns(model, text, price=None)
    if out is not None:
        assert file is not None
        check_target(out)
        with FileProgress(console) as bar:
            totals, notes = predict_file(
                file, out, model=folder, load=lambda _: load_estimator(model), text=columns, drop=drop, mask=mask,
                criterion=criterion, interval=interval, on_progress=bar,
            )  # fmt: skip
        _print_totals(console, out, totals, notes)
        return

    def print_all(rows: Any) -> None:
        estimator = load_estimator(model)
        cut = 0
        for estimates in estimate_rows(estimator, rows, criterion=criterion, interval=interval, mask=mask):
            _print_estimates(console, estimates)
            cut += estimates.cut
        if cut:
            console.print(f"{cut:,} texts were longer than {estimator.max_tokens} tokens: their ends were cut")

    if item is not None:
        print_all(Item(given, row=number) for number, given in enumerate(item, 1))
    else:
        assert file is not None
        with open_items(file, text=columns, drop=drop) as rows:
            print_all(rows)


def _print_estimates(console: Console, estimates: Estimates) -> None:
    from fastprice.data.cleaning import repair_text
    from fastprice.data.items import Item

    at = 0
    for row in estimates.rows:
        if not isinstance(row, Item):
            console.print(f"row {row.row} has no estimate: {row.reason}", highlight=False, markup=False)
            continue
        between = "" if estimates.bounds is None else "\t${:,.0f} to ${:,.0f}".format(*estimates.bounds[at])
        # Repaired: no control characters of an unknown text may reach the terminal.
        excerpt = " ".join(repair_text(row.text).split())[:90]
        console.print(f"${estimates.prices[at]:,.0f}{between}\t{excerpt}", highlight=False, markup=False)
        at += 1


def _print_totals(console: Console, out: Path, totals: Totals, notes: list[str]) -> None:
    console.print(f"{totals.priced:,} prices written to {out}", highlight=False, markup=False)
    if totals.cut:
        console.print(f"{totals.cut:,} texts were longer than the model reads: their ends were cut")
    for row, reason in totals.examples:
        console.print(f"row {row} has no estimate: {reason}", highlight=False, markup=False)
    if more := totals.rows - totals.priced - len(totals.examples):
        console.print(f"{more:,} more rows have no estimate; the column 'reason' says why")
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)


class FileProgress:
    """A progress bar with rows a second and the time left; prints nothing where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
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
        self._task = self._bar.add_task("reading", total=1.0, speed="", left="")

    def __enter__(self) -> FileProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: Progress) -> None:
        if done.rows == done.resumed:
            self._started = time.monotonic()
            self._bar.update(self._task, description=f"{done.rows:,} rows")
            return
        seconds = max(time.monotonic() - self._started, 1e-9)
        speed = (done.rows - done.resumed) / seconds
        left = timedelta(seconds=round(done.rows * (1 / max(done.share, 1e-9) - 1) / speed))
        self._bar.update(
            self._task,
            description=f"{done.rows:,} rows",
            completed=done.share,
            speed=f"{speed:,.0f} rows/s",
            left=f"{left} left",
        )
