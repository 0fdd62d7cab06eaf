"""Fits a training into its memory: recompute levels from the estimate, corrected by what the first steps reserve.

`CandidateLevels` lists the levels to choose from, from the most memory (nothing recomputed) to the least (every layer's
input offloaded), with the bytes that the estimate expects of each. `RecomputeController` puts one of them in force. It
begins with the first that is expected to fit, or with levels that the user gave. After the first optimizer step, when
its states are allocated, it measures the peak of a window of micro-batches, adds the difference from the estimate to
every candidate, and takes the first that then fits, until a measurement changes nothing.

Where nothing is recomputed and memory is left, frozen weights stay dequantized (dense_weights.py), as many as the
estimate, and then the measurement, allows; they are freed before any level changes.

A micro-batch that runs out of memory, at any time, runs again with levels that need less, with the same random numbers.
Parameters that already have their gradient are frozen meanwhile, so that each gets its share once, and the optimizer
has seen nothing: losses and weights are those of a run that never ran out. Levels that need as much as one that failed
are never taken again. Only when the last candidate fails does training end, with a one-line error.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from fastprice.errors import BaseModelError, TrainingError
from fastprice.memory.activation_checkpointing import ActivationCheckpointing
from fastprice.memory.byte_sizes import GIB
from fastprice.memory.dense_weights import DenseWeights
from fastprice.memory.estimate import CUDA_CONTEXT, estimate_memory
from fastprice.memory.recompute_levels import RECOMPUTE_LEVELS, format_recompute_levels
from fastprice.models.shapes import read_shape

__all__ = [
    "CandidateLevels",
    "CudaMemoryMeter",
    "MemoryMeter",
    "RecomputeController",
    "reserved_bytes_estimator",
]

MARGIN = 0.03  # share of the limit that is left free: packs differ, and the allocator's rounding with them
WINDOW = 8  # micro-batches of one measurement
MAX_MEASUREMENTS = 4

T = TypeVar("T")


class MemoryMeter(Protocol):
    """Bytes that a device's allocator reserves for tensors, cached blocks included, the CUDA context excluded."""

    def limit(self) -> int:
        """The most bytes that may be reserved."""

    def peak(self) -> int:
        """The most bytes that were reserved since the last `reset`."""

    def reset(self) -> None:
        """Returns cached blocks to the device and begins a new measurement."""


class CudaMemoryMeter:
    """The current CUDA device, limited to `budget` bytes, its context included; by default to what is free now."""

    def __init__(self, budget: int | None = None) -> None:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        available = free + torch.cuda.memory_reserved()
        self._limit = available if budget is None else min(available, budget - CUDA_CONTEXT)

    def limit(self) -> int:
        return self._limit

    def peak(self) -> int:
        return torch.cuda.max_memory_reserved()

    def reset(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class CandidateLevels:
    """The recompute levels that a model of `layers` layers may get, in the order of falling memory: `candidates`.

    estimate   bytes that given levels need, context excluded; None if there is no estimate for the model: then the
               candidates are "full" and "offload" for every layer
    offload    whether inputs may be offloaded to the host
    initial    levels to begin with, whatever is expected of them; then the only other candidates are those that need
               less
    """

    def __init__(
        self,
        layers: int,
        estimate: Callable[[Sequence[str]], int] | None = None,
        *,
        offload: bool = True,
        initial: Sequence[str] | None = None,
    ) -> None:
        allowed = RECOMPUTE_LEVELS if offload else RECOMPUTE_LEVELS[:-1]
        if estimate is None:
            self.candidates = [(level,) * layers for level in allowed[allowed.index("full") :]]
        else:
            self.candidates = [(allowed[0],) * layers]
            for level, next_level in pairwise(allowed):
                self.candidates += [(next_level,) * (n + 1) + (level,) * (layers - n - 1) for n in range(layers)]
        self._estimate = estimate
        self.has_initial = initial is not None
        if initial is not None:
            smaller = [
                levels
                for levels in self.candidates
                if levels != tuple(initial) and (not estimate or estimate(levels) < estimate(initial))
            ]
            self.candidates = [tuple(initial), *smaller]

    def expected_bytes(self, index: int) -> int | None:
        """Bytes that the estimate expects of a candidate; None without an estimate."""
        return None if self._estimate is None else self._estimate(self.candidates[index])

    def first_fitting(self, available: int, *, start: int = 0) -> int:
        """Index of the first candidate from `start` on that is expected to need at most `available` bytes, or of the
        last one if none is."""
        for index in range(start, len(self.candidates)):
            expected = self.expected_bytes(index)
            if expected is None or expected <= available:
                return index
        return len(self.candidates) - 1


class RecomputeController:
    """Runs micro-batches under the recompute levels that fit; `remove` restores the model.

    warmup               micro-batches before the first measurement: those of the first optimizer step
    adapt                whether measurements change the levels; otherwise only running out of memory does
    preserve_rng_state   as in `ActivationCheckpointing`
    dense                frozen weights that may stay dequantized

    levels    the recompute levels in force
    changes   each change of them and its reason, as text
    retries   how many micro-batches ran again
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: CandidateLevels,
        meter: MemoryMeter,
        *,
        warmup: int = 1,
        adapt: bool = True,
        preserve_rng_state: bool = True,
        dense: DenseWeights | None = None,
    ) -> None:
        self.changes: list[str] = []
        self._dense = dense
        self.retries = 0
        self._candidates, self._meter = candidates, meter
        self._available = int(meter.limit() * (1 - MARGIN))
        self._current = 0 if candidates.has_initial else candidates.first_fitting(self._available)
        self._last_failed = -1  # index of the candidate of least memory that ran out of it
        self._measurements_left = MAX_MEASUREMENTS if adapt and candidates.expected_bytes(0) is not None else 0
        self._micro_batches_left = warmup  # until the warm-up or the window ends
        self._warmed_up = False
        self._checkpointing = ActivationCheckpointing(
            model, candidates.candidates[self._current], preserve_rng_state=preserve_rng_state
        )
        self._with_gradient: list[nn.Parameter] = []  # those that got their gradient in this micro-batch
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._hooks = [p.register_post_accumulate_grad_hook(self._with_gradient.append) for p in trainable]
        self._fit_dense_weights(0)
        meter.reset()

    @property
    def levels(self) -> tuple[str, ...]:
        return self._checkpointing.levels

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._checkpointing.remove()

    def run(self, micro_batch: Callable[[], T], undo: Callable[[], Any] = lambda: None) -> T:
        """Runs `micro_batch()`, forward and backward of one micro-batch; again, after `undo()`, if memory runs out.

        Raises TrainingError if it runs out under the last candidate.
        """
        self._with_gradient.clear()
        done: list[nn.Parameter] = []
        rng_states = _rng_states()
        while True:
            for parameter in done:
                parameter.requires_grad_(False)
            try:
                result = micro_batch()
            except torch.OutOfMemoryError:
                pass  # handled below: the traceback holds the tensors of the failed micro-batch
            else:
                self._measure()
                return result
            finally:
                for parameter in done:
                    parameter.requires_grad_(True)
            done += self._with_gradient
            self._with_gradient.clear()
            gc.collect()
            self._reduce_memory()
            undo()
            _restore_rng_states(rng_states)

    def restart_measurement(self) -> None:
        """Discards the current measurement, because something else used memory, such as an evaluation."""
        if self._measurements_left and self._warmed_up:
            self._micro_batches_left = WINDOW
            self._meter.reset()

    def _fit_dense_weights(self, excess: int) -> bool:
        """Makes frozen weights dense in the memory that is left, `excess` bytes being needed beyond the estimate, where
        nothing is recomputed; whether that changed anything."""
        if self._dense is None or set(self.levels) != {"none"}:
            return False
        expected = self._candidates.expected_bytes(self._current)
        return self._dense.fit(0 if expected is None else self._available - expected - excess)

    def _reduce_memory(self) -> None:
        if self._dense is not None and self._dense.give_up():
            self.retries += 1
            self.changes.append("out of memory; weights that were kept dense are freed")
            self._meter.reset()
            return
        if self._current == len(self._candidates.candidates) - 1:
            raise TrainingError(
                f"out of memory: a micro-batch does not fit in {self._meter.limit() / GIB:.1f} GiB even with "
                f"recompute={format_recompute_levels(self.levels)!r}; lower pack_tokens, or take a smaller base"
            )
        self._last_failed = self._current
        expected = self._candidates.expected_bytes(self._current)
        # It needed more than the limit, whatever was expected of it.
        excess = 0 if expected is None else max(0, self._meter.limit() - expected)
        self.retries += 1
        smaller = self._candidates.first_fitting(self._available - excess, start=self._current + 1)
        self._change(smaller, "out of memory")

    def _measure(self) -> None:
        """Counts a micro-batch that succeeded; at the end of a window, compares its peak with the estimate."""
        if not self._measurements_left:
            return
        self._micro_batches_left -= 1
        if self._micro_batches_left > 0:
            return
        if not self._warmed_up:
            self._warmed_up = True
        else:
            self._measurements_left -= 1
            expected = self._candidates.expected_bytes(self._current)
            assert expected is not None
            excess = self._meter.peak() - expected - (0 if self._dense is None else self._dense.bytes)
            fitting = self._candidates.first_fitting(self._available - excess, start=self._last_failed + 1)
            if fitting == self._current:
                self._measurements_left = 0
                if self._fit_dense_weights(excess):
                    assert self._dense is not None
                    self.changes.append(f"memory measured; weights of {self._dense.count} layers are kept dense")
                return
            if self._dense is not None:
                self._dense.give_up()
            self._change(fitting, f"{self._meter.peak() / GIB:.2f} GiB reserved, {expected / GIB:.2f} GiB expected")
        self._micro_batches_left = WINDOW
        self._meter.reset()

    def _change(self, index: int, reason: str) -> None:
        self._current = index
        self._checkpointing.set_levels(self._candidates.candidates[index])
        self.changes.append(f"{reason}; recompute is now: {format_recompute_levels(self.levels)}")
        if self._warmed_up:
            self._micro_batches_left = WINDOW
        self._meter.reset()


def reserved_bytes_estimator(
    model: Any,
    *,
    tokens: int,
    sequences: int,
    labeled: float,
    kernels: bool,
    offloaded_layers: int = 0,
    mlp_tile: int | None = None,
) -> Callable[[Sequence[str]], int] | None:
    """A function from recompute levels to the bytes that training `model` is expected to reserve, context excluded.

    None for a family of models that `estimate_memory` does not know.

    tokens, sequences   of a micro-batch
    labeled             share of tokens with a label
    kernels             whether the model runs on fastprice_kernels, without dropout
    offloaded_layers    layers whose weights are on the host
    mlp_tile            tokens that an MLP on the kernels computes at a time
    """
    try:
        shape = read_shape(model.config)
    except BaseModelError:
        return None
    adapters = getattr(model, "peft_config", {}).values()
    rank = max((int(getattr(adapter, "r", 1)) for adapter in adapters), default=1)
    packed = any(parameter.dtype == torch.uint8 for parameter in model.parameters())
    method = "full" if not adapters else "qlora" if packed else "lora"

    def expected_bytes(levels: Sequence[str]) -> int:
        estimate = estimate_memory(
            shape, method=method, rank=rank, tokens=tokens, sequences=sequences, recompute=levels,
            loss_head="completion", labeled=labeled, engine="fastprice" if kernels else "peft",
            offloaded_layers=offloaded_layers, mlp_tile=mlp_tile if kernels else None,
        )  # fmt: skip
        return estimate.peak_bytes - CUDA_CONTEXT

    return expected_bytes


def _rng_states() -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _restore_rng_states(states: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])
