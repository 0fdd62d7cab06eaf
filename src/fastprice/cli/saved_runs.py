"""What commands need of an earlier run: its settings, its saved estimator, the columns that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastprice.config import CleanConfig, DataConfig, RunConfig, read_config
from fastprice.errors import BaseModelError

if TYPE_CHECKING:
    from fastprice.data.items import Items
    from fastprice.estimator import PriceEstimator

__all__ = [
    "load_estimator",
    "load_rows",
    "saved_estimator_folder",
    "text_columns",
    "trained_cleaning",
    "trained_config",
    "trained_data",
]


def saved_estimator_folder(model: Path) -> Path:
    """The folder of the saved estimator: `model`, or the one in a run's folder. BaseModelError where there is none."""
    for folder in (model / "model", model):
        if (folder / "fastprice.json").is_file():
            return folder
    raise BaseModelError(
        f"--model {model}: neither a run's folder nor a saved estimator (no fastprice.json); "
        "name the folder that --out or save() made"
    )


def load_estimator(model: Path) -> PriceEstimator:
    from fastprice.estimator import PriceEstimator

    return PriceEstimator.load(saved_estimator_folder(model))


def trained_config(model: Path) -> RunConfig | None:
    """The settings of the run that made `model`; None for an estimator that was saved without a run."""
    from fastprice.run import CONFIG

    for folder in (model, model.parent):
        if (folder / CONFIG).is_file():
            return read_config(folder / CONFIG)
    return None


def trained_data(model: Path) -> DataConfig | None:
    """The data section of the run that made `model`, so that its columns are read again; None without a run."""
    config = trained_config(model)
    return None if config is None else config.data


def trained_cleaning(model: Path) -> CleanConfig:
    """The clean section of the run that made `model`, so that other texts and prices are treated alike."""
    config = trained_config(model)
    return CleanConfig() if config is None else config.clean


def text_columns(model: Path, text: list[str] | None, *, price: str | None) -> tuple[list[str] | str, list[str]]:
    """(Text columns, columns to drop) of a file that `model` is to price: without `text`, those of its training."""
    trained = trained_data(model)
    columns = text or (["text"] if trained is None else trained.text)
    drop = [] if text or trained is None else [*trained.drop, *([trained.price] if price is None else [])]
    return columns[0] if len(columns) == 1 else columns, drop


def load_rows(file: Path, model: Path, text: list[str] | None, *, price: str | None) -> Items:
    from fastprice.data.items import load_items

    columns, drop = text_columns(model, text, price=price)
    return load_items(file, text=columns, price=price, drop=drop)
