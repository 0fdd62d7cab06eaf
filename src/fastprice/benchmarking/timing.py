"""Times that can be believed: warm-up, interleaved rounds, medians with their spread, and device clocks on a GPU.

On CUDA each call lies between two events, and the L2 cache is overwritten before it, so that a kernel is timed on data
from memory, as in training, and its launch is queued while the overwriting runs. Rounds go A, B, C, A, B, C..., so that
a drift of clocks or temperature falls on all alike; a ratio is the median of the rounds' own ratios. On a CPU the same
rounds are timed by `perf_counter`, with nothing to flush.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["NOISY", "Spread", "Stopwatch", "interleave", "ratios", "spread_of", "synchronize"]

NOISY = 0.05  # spread above which a figure is flagged


@dataclass(frozen=True)
class Spread:
    """Percentiles of `count` samples; `noise` is (p80 - p20) / p50."""

    p20: float
    p50: float
    p80: float
    count: int

    @property
    def noise(self) -> float:
        return (self.p80 - self.p20) / self.p50 if self.p50 else float("inf")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "noise": round(self.noise, 4), "noisy": self.noise > NOISY}


def spread_of(samples: Sequence[float]) -> Spread:
    """The 20th, 50th and 80th percentile, interpolated; ValueError for no samples."""
    if not samples:
        raise ValueError("a spread needs at least one sample")
    ordered = sorted(samples)

    def percentile(q: float) -> float:
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Spread(percentile(0.2), percentile(0.5), percentile(0.8), len(ordered))


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the ratios of samples taken side by side, round by round."""
    return spread_of([above / below for above, below in zip(numerator, denominator, strict=True)])


def synchronize(device: torch.device | str) -> None:
    """Waits for all work queued on `device`; does nothing for a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Marks on the device's own time line; `intervals` gives the seconds between them, after the last is reached.

    A mark is a CUDA event, recorded without waiting for the device, or the host's clock where there is no device.
    """

    def __init__(self, device: torch.device | str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._clock = clock
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(self._clock())

    def intervals(self) -> list[float]:
        if not self._cuda:
            return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]
        torch.cuda.synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def interleave(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device | str,
    *,
    seconds: float,
    warmup: int = 3,
    most: int = 200,
    least: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function, one sample a round, for about `seconds` in all after `warmup` untimed rounds.

    Between `least` and `most` rounds are run. Each function must do the same work every time it is called. `clock`
    serves where there is no device; `time.process_time` leaves out what other programs take.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    synchronize(device)
    flush = _flusher(device)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        for name, function in functions.items():
            flush()
            watch = Stopwatch(device, clock)
            watch.mark()
            function()
            watch.mark()
            samples[name] += watch.intervals()
    return samples


def _flusher(device: torch.device | str) -> Callable[[], None]:
    """A function that overwrites the L2 cache of a CUDA device, several times its size."""
    if torch.device(device).type != "cuda":
        return lambda: None
    size = max(4 * int(torch.cuda.get_device_properties(device).L2_cache_size), 64 * 2**20)
    scratch = torch.empty(size, dtype=torch.uint8, device=device)

    def flush() -> None:
        scratch.zero_()

    return flush
