"""The exceptions of fastprice: one tree, so that `except FastpriceError` catches every error that a user can correct.

    FastpriceError
    ├── DataError               a file of items: missing, unreadable, an unknown column, nothing usable in it
    ├── ConfigError             a setting: unknown key, impossible value, invalid YAML (every error at once)
    ├── BaseModelError          a base model or a saved estimator that cannot be found, read or trained
    ├── MissingDependencyError  an optional package or device that the request needs
    ├── TrainingError           training that started and cannot continue (loss not finite, no labeled token)
    ├── OffloadError            weights that could not be copied from host memory to the GPU
    └── NotFittedError          prediction before `fit` or `load`

Every message is one line: what is wrong, where (file, row, column, key), and what to do. The command line prints that
line and exits with status 2; `--debug` shows the traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "BaseModelError",
    "ConfigError",
    "DataError",
    "FastpriceError",
    "MissingDependencyError",
    "NotFittedError",
    "OffloadError",
    "TrainingError",
    "nearest_name",
]


class FastpriceError(Exception):
    """Every error that a user of fastprice can correct."""


class DataError(FastpriceError):
    """A file of items that cannot be used, or has nothing usable in it."""


class ConfigError(FastpriceError):
    """Invalid settings; the message names every one of them."""


class BaseModelError(FastpriceError):
    """A base model or saved estimator that cannot be found, read or trained."""


class MissingDependencyError(FastpriceError):
    """An optional package or a device that the request needs and that is missing."""


class TrainingError(FastpriceError):
    """Training that started and cannot continue."""


class OffloadError(FastpriceError):
    """Weights of an offloaded layer that could not be copied from host memory to the GPU."""


class NotFittedError(FastpriceError, ValueError, AttributeError):
    """Prediction by an estimator that was neither fitted nor loaded; with the base classes of scikit-learn's."""


def nearest_name(name: str, valid: Iterable[str]) -> str:
    """The words ` (did you mean 'x'?)` for the valid name nearest to `name`, or nothing when none is near."""
    matches = get_close_matches(name, list(valid), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
