"""Hands what the suite measured to pytest-benchmark, so that its tables, files, comparisons and histograms work.

The suite times by device events, in processes of their own, and in turns with the peers. `RecordedTime` is a timer
that pytest-benchmark reads and that goes forward by each of those samples: its rounds are the suite's rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["TIME", "RecordedTime", "extra_info", "selected_values"]

# In `benchmark.extra_info` of every case; None where a case has no such figure.
_FIGURES = ("tokens_per_second", "items_per_second", "peak_allocated", "peak_reserved", "host_peak", "settings")


class RecordedTime:
    """A timer, in seconds, that stands still but for `advance`."""

    __name__ = "fastprice.benchmarking.recorded_time"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds

    def record(self, benchmark: Any, samples: Sequence[float]) -> None:
        """Gives pytest-benchmark's fixture one round for each of `samples` (seconds)."""
        left = list(reversed(samples))
        benchmark.pedantic(lambda: self.advance(left.pop()), rounds=len(samples))


# The one that tests name as their timer: pytest.mark.benchmark(timer=TIME).
TIME = RecordedTime()


def extra_info(row: Mapping[str, Any], *, cuda: bool, **more: Any) -> dict[str, Any]:
    """Tokens/s, items/s (medians), peak VRAM allocated and reserved, host peak in bytes and the settings of a row.

    Without a CUDA device there is no VRAM: both peaks are None and `vram` says why. `more` replaces or adds figures.
    """
    found: dict[str, Any] = {name: _median(row.get(name)) for name in _FIGURES}
    found |= {"attention": (row.get("settings") or {}).get("attention")}
    found["vram"] = "peaks of PyTorch's allocator" if cuda else "none: measured on a CPU"
    return {**found, **more}


def _median(value: Any) -> Any:
    return value["p50"] if isinstance(value, Mapping) and "p50" in value else value


def selected_values(items: Sequence[Any], function: str, name: str, **same: Any) -> list[Any]:
    """The values of the parameter `name` over all of pytest's `items` of this test function whose other parameters are
    `same`: with `-k` only what was selected is measured."""
    found = []
    for item in items:
        if getattr(item, "originalname", None) == function:
            values = item.callspec.params
            if all(values[each] == value for each, value in same.items()):
                found.append(values[name])
    return list(dict.fromkeys(found))
