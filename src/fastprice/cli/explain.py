"""`explain`: the words that moved one estimate."""

from __future__ import annotations

from typing import Annotated

import typer

from fastprice.cli.options import Criterion, ModelDir, Plot, make_console
from fastprice.cli.saved_runs import load_estimator, saved_estimator_folder, trained_cleaning
from fastprice.common.plots import check_plot


def explain(
    model: ModelDir,
    item: Annotated[str, typer.Option("--item", metavar="TEXT", help="The text whose estimate is explained.")],
    criterion: Criterion = "mae",
    plot: Plot = None,
) -> None:
    """Show which words raised or lowered the estimate of a text: what it would be without each of them."""
    if plot is not None:
        check_plot(plot)
    saved_estimator_folder(model)

    from fastprice.data.cleaning import prediction_text
    from fastprice.inference.batch import check_options

    check_options(criterion, None)
    text = prediction_text(item, trained_cleaning(model).mask)
    explanation = load_estimator(model).explain(text, criterion=criterion)
    console = make_console()
    console.print(explanation)
    if plot is not None:
        explanation.plot(plot)
        console.print(f"plot: {plot}", highlight=False, markup=False)
