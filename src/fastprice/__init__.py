"""fastprice: fine-tunes language models to estimate product prices from text.

The public names below are loaded on first use (PEP 562): `import fastprice` takes milliseconds and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastprice.errors import (
    BaseModelError,
    ConfigError,
    DataError,
    FastpriceError,
    MissingDependencyError,
    NotFittedError,
    TrainingError,
)

if TYPE_CHECKING:
    from fastprice.data.cleaning import clean_items
    from fastprice.data.items import Item, Items, load_items
    from fastprice.data.money import parse_price
    from fastprice.data.splitting import split_items
    from fastprice.estimator import PriceEstimator
    from fastprice.evaluation.metrics import Scores, score
    from fastprice.memory import MemoryEstimate, estimate_memory
    from fastprice.prompting import PromptedEstimator

__version__ = "0.1.0"

_HOME = {
    "Item": "data.items",
    "Items": "data.items",
    "MemoryEstimate": "memory",
    "PriceEstimator": "estimator",
    "PromptedEstimator": "prompting",
    "Scores": "evaluation.metrics",
    "clean_items": "data.cleaning",
    "estimate_memory": "memory",
    "load_items": "data.items",
    "parse_price": "data.money",
    "score": "evaluation.metrics",
    "split_items": "data.splitting",
}

__all__ = [
    "BaseModelError",
    "ConfigError",
    "DataError",
    "FastpriceError",
    "Item",
    "Items",
    "MemoryEstimate",
    "MissingDependencyError",
    "NotFittedError",
    "PriceEstimator",
    "PromptedEstimator",
    "Scores",
    "TrainingError",
    "__version__",
    "clean_items",
    "estimate_memory",
    "load_items",
    "parse_price",
    "score",
    "split_items",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastprice' has no attribute {name!r}")
    value = getattr(import_module(f"fastprice.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
