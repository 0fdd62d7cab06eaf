"""The options that commands share, and what commands make of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastprice.errors import BaseModelError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fastprice.config import RunConfig
    from fastprice.data.items import Items

Text = Annotated[list[str] | None, typer.Option("--text", metavar="COL...", help="Text columns, or '*' for all.")]
Price = Annotated[str | None, typer.Option("--price", metavar="COL", help="Price column.")]
Group = Annotated[
    list[str] | None, typer.Option("--group", metavar="COL...", help="Columns whose equal rows stay in one split.")
]
Drop = Annotated[list[str] | None, typer.Option("--drop", metavar="COL...", help="Columns that '*' leaves out.")]
Data = Annotated[str | None, typer.Option("--data", metavar="FILE", help="JSONL(.gz), CSV or Parquet file.")]
Base = Annotated[str | None, typer.Option("--base", help="'nano', a folder, or a hub id.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE...", help="Any other setting: train.pack_tokens=4096.")
]
ModelDir = Annotated[Path, typer.Option("--model", metavar="DIR", help="A run's folder, or a saved estimator.")]
ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="Settings; options override them.")]

# Options that take several values after one name.
MANY_VALUES = {"--text", "--group", "--drop", "--set", "--item", "--strategies"}


def data_settings(
    data: str | None, text: list[str] | None, price: str | None, group: list[str] | None, drop: list[str] | None
) -> dict[str, Any]:
    """The settings that the options on a data file stand for."""
    return {"data.file": data, "data.text": text, "data.price": price, "data.group": group, "data.drop": drop}


def overrides_of(pairs: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
    import yaml

    overrides = {key: value for key, value in options.items() if value is not None}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {pair!r}: write KEY=VALUE, such as train.epochs=2")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {pair!r}: {value!r} is not a YAML value") from error
    return overrides


def trained_config(model: Path) -> RunConfig | None:
    """The settings of the run that made `model`; None for an estimator that was saved by itself."""
    from fastprice.config import read_config
    from fastprice.run import CONFIG

    for folder in (model, model.parent):
        if (folder / CONFIG).is_file():
            return read_config(folder / CONFIG)
    return None


def trained_columns(model: Path) -> dict[str, Any]:
    """The data section of the run that made `model`, so that predict reads the columns that train read."""
    config = trained_config(model)
    return {} if config is None else config.data.model_dump()


def trained_cleaning(model: Path) -> dict[str, Any]:
    """The clean section of the run that made `model`, so that its texts and prices are held to what train held them."""
    from fastprice.config import CleanConfig

    config = trained_config(model)
    return (CleanConfig() if config is None else config.clean).model_dump()


def text_columns(model: Path, text: list[str] | None, *, price: str | None) -> tuple[list[str] | str, list[str]]:
    """(Text columns, columns to drop) for a file that `model` is to price: those of its training unless told."""
    trained = trained_columns(model)
    columns = text or trained.get("text") or ["text"]
    drop = [] if text else [*trained.get("drop", []), *([trained["price"]] if trained and price is None else [])]
    return columns[0] if len(columns) == 1 else columns, drop


def load_rows(file: Path, model: Path, text: list[str] | None, *, price: str | None) -> Items:
    from fastprice.data.items import load_items

    columns, drop = text_columns(model, text, price=price)
    return load_items(file, text=columns, price=price, drop=drop)


def load_estimator(model: Path) -> Any:
    from fastprice.estimator import PriceEstimator

    return PriceEstimator.load(saved_estimator_folder(model))


def saved_estimator_folder(model: Path) -> Path:
    """The folder of the saved estimator: `model`, or the one in a run's folder. Asked before any file is read."""
    for folder in (model / "model", model):
        if (folder / "fastprice.json").is_file():
            return folder
    raise BaseModelError(
        f"--model {model}: neither a run's folder nor a saved estimator (no fastprice.json); "
        "name the folder that --out or save() made"
    )


def make_console() -> Console:
    from rich.console import Console

    return Console()
