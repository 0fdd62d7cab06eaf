"""fastprice: fine-tunes language models to estimate product prices from text.

The public names are loaded on first use (PEP 562): `import fastprice` takes milliseconds and imports no torch.
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
    OffloadError,
    TrainingError,
)

if TYPE_CHECKING:
    from fastprice.config import RunConfig, read_config
    from fastprice.data.cleaning import clean_items
    from fastprice.data.items import Item, Items, Reject, load_items
    from fastprice.data.money import parse_price
    from fastprice.data.splitting import Split, split_items
    from fastprice.estimator import PriceEstimator
    from fastprice.evaluation.evaluate import Evaluation, ModelResult, evaluate_models
    from fastprice.evaluation.metrics import Scores, score
    from fastprice.inference.conformal import Calibration
    from fastprice.inference.explain import Explanation, Span
    from fastprice.inference.price_distribution import PriceDistribution
    from fastprice.memory import MemoryEstimate, MemoryPlan, estimate_memory, plan_memory
    from fastprice.prompting import PromptedEstimator
    from fastprice.run import RunResult, train_and_evaluate
    from fastprice.training.callbacks import TrainingEvent
    from fastprice.training.train import TrainingResult

__version__ = "0.1.0"

_MODULES = {
    "Calibration": "inference.conformal",
    "Evaluation": "evaluation.evaluate",
    "Explanation": "inference.explain",
    "Item": "data.items",
    "Items": "data.items",
    "MemoryEstimate": "memory",
    "MemoryPlan": "memory",
    "ModelResult": "evaluation.evaluate",
    "PriceDistribution": "inference.price_distribution",
    "PriceEstimator": "estimator",
    "PromptedEstimator": "prompting",
    "Reject": "data.items",
    "RunConfig": "config",
    "RunResult": "run",
    "Scores": "evaluation.metrics",
    "Span": "inference.explain",
    "Split": "data.splitting",
    "TrainingEvent": "training.callbacks",
    "TrainingResult": "training.train",
    "clean_items": "data.cleaning",
    "estimate_memory": "memory",
    "evaluate_models": "evaluation.evaluate",
    "load_items": "data.items",
    "parse_price": "data.money",
    "plan_memory": "memory",
    "read_config": "config",
    "score": "evaluation.metrics",
    "split_items": "data.splitting",
    "train_and_evaluate": "run",
}

__all__ = [
    "BaseModelError",
    "Calibration",
    "ConfigError",
    "DataError",
    "Evaluation",
    "Explanation",
    "FastpriceError",
    "Item",
    "Items",
    "MemoryEstimate",
    "MemoryPlan",
    "MissingDependencyError",
    "ModelResult",
    "NotFittedError",
    "OffloadError",
    "PriceDistribution",
    "PriceEstimator",
    "PromptedEstimator",
    "Reject",
    "RunConfig",
    "RunResult",
    "Scores",
    "Span",
    "Split",
    "TrainingError",
    "TrainingEvent",
    "TrainingResult",
    "__version__",
    "clean_items",
    "estimate_memory",
    "evaluate_models",
    "load_items",
    "parse_price",
    "plan_memory",
    "read_config",
    "score",
    "split_items",
    "train_and_evaluate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fastprice' has no attribute {name!r}")
    value = getattr(import_module(f"fastprice.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
