"""`compare`: prompting strategies ranked on one data set."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastprice.cli.options import ConfigFile, Criterion, Plot, make_console, settings_options
from fastprice.cli.saved_runs import load_estimator, saved_estimator_folder
from fastprice.common.files import write_text_atomically
from fastprice.common.plots import check_plot
from fastprice.config import RunConfig, read_config
from fastprice.errors import ConfigError

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator
    from fastprice.prompting.compare import StrategyComparison
    from fastprice.run import PreparedItems

STRATEGIES = ["zero-shot", "few-shot:4", "retrieval:4", "chaining", "tools"]
RESULT = "compare.json"


@settings_options(
    "data", "clean", "split", "model.base", "model.method", "model.max_tokens", "train.batch_size", "seed"
)
def compare(
    given: dict[str, Any],
    config: ConfigFile = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="A run's folder: its model on its own unseen items.")
    ] = None,
    strategies: Annotated[
        list[str] | None,
        typer.Option("--strategies", metavar="NAME...", help="zero-shot, few-shot:K, retrieval:K, chaining, tools."),
    ] = None,
    items: Annotated[int, typer.Option(help="Test items, drawn with the seed.", min=1)] = 200,
    calibrate: Annotated[int, typer.Option(help="Validation items for the intervals; 0: none.", min=0)] = 100,
    criterion: Criterion = "mae",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for compare.json.")] = None,
    plot: Plot = None,
) -> None:
    """Rank prompting strategies (zero-shot, few-shot, retrieval, chaining, tools) on unseen items."""
    from fastprice.data.estimator_inputs import draw_items
    from fastprice.prompting import make_strategy
    from fastprice.prompting.compare import check_unique_names, compare_strategies, ranking_metric
    from fastprice.run import prepare_items

    ranking_metric(criterion)
    if model is not None and {"model.base", "model.method"} & set(given):
        raise ConfigError("compare: give --model (a run's) or --base, not both; a run knows its base and method")
    settings = _settings(config, model, given)
    chosen = [make_strategy(name, seed=settings.seed) for name in strategies or STRATEGIES]
    check_unique_names(chosen)
    if out is not None:
        _make_folder(out)
    if plot is not None:
        check_plot(plot)  # after --out, whose folder it may be in
    prepared = prepare_items(settings)
    checked = model is None or _same_items(model, prepared)

    split = prepared.split
    test = draw_items(split.test, items, settings.seed)
    calibration = draw_items(split.validation, calibrate, settings.seed) if calibrate else []
    console = make_console()
    console.print(f"{len(test):,} of {len(split.test):,} test items, {len(calibration):,} to calibrate intervals, "
                  f"{len(split.train):,} to take examples from")  # fmt: skip
    if not checked:
        console.print(f"{model} holds no results.json: that the data is still what it was trained on was not checked")
    estimator = _base(settings, prepared) if model is None else load_estimator(model)

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen) * (len(test) + len(calibration)))
        comparison = compare_strategies(
            estimator,
            chosen,
            split.train,
            calibration,
            test,
            criterion=criterion,
            on_items=lambda name, more: progress.update(task, description=name, advance=more),
        )
    console.print(comparison.table())
    if out is not None:
        path = _write(out, settings, str(model or settings.model.base), comparison)
        console.print(f"written: {path}", highlight=False, markup=False)
    if plot is not None:
        from fastprice.prompting.plot import plot_comparison

        plot_comparison(comparison, plot)
        console.print(f"plot: {plot}", highlight=False, markup=False)


def _settings(config: Path | None, model: Path | None, given: dict[str, Any]) -> RunConfig:
    """The settings of this comparison: those of the run that made `model`, or of `config`, overridden by `given`."""
    from fastprice.run import CONFIG

    if model is None:
        return read_config(config, {"out": "unused", **given})
    if config is not None:
        raise ConfigError(f"compare: --model comes with its own settings; leave out {config} or --model")
    saved_estimator_folder(model)
    folder = next((each for each in (model, model.parent) if (each / CONFIG).is_file()), None)
    if folder is None:
        raise ConfigError(
            f"--model {model}: no {CONFIG} beside it, so which items it was trained on is unknown; give the folder "
            "that fastprice train wrote"
        )
    trained = read_config(folder / CONFIG)
    settings = read_config(folder / CONFIG, given)
    before, now = _flat(trained), _flat(settings)
    if changed := [key for key in before if before[key] != now[key]]:
        raise ConfigError(
            f"--model {model}: its run had other settings for {', '.join(changed)}, and with others its test items are "
            "not those that it has not seen; leave these options out"
        )
    return settings


def _flat(settings: RunConfig) -> dict[str, Any]:
    """Settings by dotted key, less the data's file: it may have moved, and what it holds is checked by its counts."""
    dotted: dict[str, Any] = {}
    for section, value in asdict(settings).items():
        inside = value if isinstance(value, dict) else {"": value}
        dotted.update({f"{section}.{key}".rstrip("."): each for key, each in inside.items()})
    del dotted["data.file"]
    return dotted


def _same_items(model: Path, prepared: PreparedItems) -> bool:
    """Whether the data gives the run's counts; False where the run left none.

    Raises ConfigError when it gives others: other items make another split.
    """
    from fastprice.run import RESULTS

    for folder in (model, model.parent):
        if (folder / RESULTS).is_file():
            counts = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["counts"]
            if counts != prepared.counts():
                raise ConfigError(
                    f"{prepared.items.source}: not the items that {model} was trained on ({counts['train']:,} train, "
                    f"{counts['test']:,} test; now {len(prepared.split.train):,} and {len(prepared.split.test):,}), so "
                    "its unseen items are not known; give the file of the run with --data"
                )
            return True
    return False


def _base(settings: RunConfig, prepared: PreparedItems) -> PriceEstimator:
    """The base model, untrained, with the fallback and ceiling price that training on these items would set."""
    import numpy as np

    from fastprice.estimator import PriceEstimator

    # As `PriceEstimator.load` does: the unsloth engine may give no distributions.
    estimator = PriceEstimator(**{**settings.estimator_params(), "engine": "peft"}).prepare()
    prices = [item.price for item in prepared.split.train if item.price is not None]
    estimator.fallback_price_, estimator.ceiling_price_ = float(np.median(prices)), max(prices)
    return estimator


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: no folder can be made there ({error.strerror}); name another place") from error


def _write(out: Path, settings: RunConfig, model: str, comparison: StrategyComparison) -> Path:
    from fastprice import __version__

    about = {"model": model, "data": asdict(settings.data), "seed": settings.seed, "fastprice": __version__}
    write_text_atomically(out / RESULT, json.dumps({**about, **comparison.as_dict()}, indent=1) + "\n")
    return out / RESULT
