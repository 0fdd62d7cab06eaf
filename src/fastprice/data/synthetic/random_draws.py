"""Random draws that are the same on every platform and Python version: all of them go through `Random.random()`.

`Random.choice` and similar methods have changed their use of the underlying bits between Python versions.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from random import Random
from statistics import NormalDist
from typing import TypeVar

__all__ = ["pick", "pick_weighted", "shuffled", "standard_normal"]

T = TypeVar("T")
_NORMAL = NormalDist()


def pick(rng: Random, options: Sequence[T]) -> T:
    """One of `options`, each with the same probability."""
    return options[int(rng.random() * len(options))]


def pick_weighted(rng: Random, weights: Mapping[str, float]) -> str:
    """One of the keys, with probability proportional to its weight."""
    bounds = list(accumulate(weights.values()))
    return list(weights)[min(bisect(bounds, rng.random() * bounds[-1]), len(bounds) - 1)]


def shuffled(rng: Random, options: Sequence[T]) -> list[T]:
    """The options in random order."""
    return [options[place] for _, place in sorted((rng.random(), place) for place in range(len(options)))]


def standard_normal(rng: Random) -> float:
    """A draw from the standard normal distribution, by its inverse distribution function: one `random()` each."""
    return _NORMAL.inv_cdf(min(max(rng.random(), 1e-9), 1 - 1e-9))
