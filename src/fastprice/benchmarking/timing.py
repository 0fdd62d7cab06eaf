"""Timing that holds: warm-up, interleaved rounds, medians with their spread, and device clocks on a GPU.

On CUDA each call lies between two events, and the L2 cache is overwritten before it, so that a kernel is timed on data
from memory, as in training, and its launch is queued while the overwriting runs. Rounds go A, B, C, A, B, C..., so that
a drift of clocks or temperature affects all alike; a ratio is the median of the rounds' own ratios. On a CPU the same
rounds are timed by `perf_counter`, with nothing to flush.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

__all__ = [
    "NOISY",
    "Spread",
    "Stopwatch",
    "interleave",
    "ratios",
    "seconds_per_launch",
    "spread_of",
    "synchronize",
]

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
    p20, p50, p80 = map(float, np.percentile(samples, (20, 50, 80)))
    return Spread(p20, p50, p80, len(samples))


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the ratios of samples that were taken in the same rounds."""
    return spread_of([above / below for above, below in zip(numerator, denominator, strict=True)])


def synchronize(device: torch.device | str) -> None:
    """Waits for all work queued on `device`; does nothing for a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Marks on the device's own time line; `intervals` gives the seconds between them, after the last is reached.

    A mark is a CUDA event, recorded without waiting for the device, or a reading of `clock` where there is no device.
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
    min_rounds: int = 5,
    max_rounds: int = 200,
    clock: Callable[[], float] = time.perf_counter,
    flush: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each function, one sample a round, for about `seconds` in all after `warmup` untimed rounds.

    Between `min_rounds` and `max_rounds` rounds are run. Each function must do the same work every time it is called.
    `clock` serves where there is no device; `time.process_time` leaves out the time of other programs. flush: overwrite
    the L2 cache before each call.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    synchronize(device)
    overwrite_cache = _flusher(device) if flush else lambda: None
    samples: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() > end:
            break
        for name, function in functions.items():
            overwrite_cache()
            watch = Stopwatch(device, clock)
            watch.mark()
            function()
            watch.mark()
            samples[name] += watch.intervals()
    return samples


def seconds_per_launch(
    launches: Sequence[Callable[[], object]], device: torch.device | str, *, rounds: int = 20
) -> tuple[float, str]:
    """(median seconds of one of `launches`, "graph" or "stream"): all of them back to back, `rounds` times.

    For kernels of a few microseconds, next to which an event and a launch by the host cost too much: on CUDA the
    launches are captured and replayed as one CUDA graph, or go through the stream where they cannot be captured. Give
    each its own tensors, together larger than the L2 cache, or they are timed on cached data.
    """
    for launch in launches:
        launch()  # compilation and autotuning must be over before a capture
    synchronize(device)

    def run() -> None:
        for launch in launches:
            launch()

    how = "stream"
    if torch.device(device).type == "cuda":
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:
            synchronize(device)
        else:
            run, how = graph.replay, "graph"
    samples = interleave({"launches": run}, device, seconds=0.0, min_rounds=rounds, flush=False)
    return spread_of(samples["launches"]).p50 / len(launches), how


def _flusher(device: torch.device | str) -> Callable[[], None]:
    """A function that overwrites the L2 cache of a CUDA device, several times its size."""
    if torch.device(device).type != "cuda":
        return lambda: None
    size = max(4 * int(torch.cuda.get_device_properties(device).L2_cache_size), 64 * 2**20)
    scratch = torch.empty(size, dtype=torch.uint8, device=device)

    def flush() -> None:
        scratch.zero_()

    return flush
