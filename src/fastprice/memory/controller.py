"""Keeps a training within its memory: the plan from the estimate, confirmed by the first steps, corrected when wrong.

A `Ladder` holds every plan from the dearest (each layer keeps everything) to the cheapest (each layer's input on the
host), with the bytes that the estimate expects of it. A `Keeper` stands on one rung:

- it starts on the dearest that is expected to fit, or on the levels that were asked for by name, which only running
  out of memory moves;
- after the first optimizer step, when its states are there, it measures the most that some micro-batches reserve. What
  they took beyond (or below) the estimate is added to every rung's figure, and the dearest rung that then fits is
  taken, up or down; this goes on until a measurement moves nothing;
- a micro-batch that runs out of memory at any time is done again on a rung that needs less, with the same random
  numbers. Weights whose gradient had come already stand still meanwhile, so each gets its share once; the optimizer
  has seen nothing. Losses and weights are those of an undisturbed run. Rungs as dear as one that failed are never
  taken again;
- only on the last rung it gives up, with one line.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from fastprice.errors import BaseModelError, TrainingError
from fastprice.memory.activation_checkpointing import Keeping
from fastprice.memory.estimate import CUDA_CONTEXT, GIB, estimate_memory
from fastprice.memory.recompute_levels import write_levels
from fastprice.models.shapes import read_shape

__all__ = ["CudaMeter", "Keeper", "Ladder", "Meter", "expected_bytes"]

MARGIN = 0.03  # share of the limit that a plan leaves free: packs differ, and the allocator's rounding with them
WINDOW = 8  # micro-batches measured before the plan is looked at again
WINDOWS = 4  # measurements at most

T = TypeVar("T")


class Meter(Protocol):
    """What a Keeper asks of the device: bytes reserved for tensors, cached ones included, no context."""

    def limit(self) -> int:
        """The most that may be reserved."""

    def peak(self) -> int:
        """The most that was reserved since the last `reset`."""

    def reset(self) -> None:
        """Gives memory that no tensor uses back to the device, and begins a new measurement."""


class CudaMeter:
    """The current CUDA device: `budget` bytes in all, its context included, or whatever is free when this is made."""

    def __init__(self, budget: int | None = None) -> None:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        there = free + torch.cuda.memory_reserved()
        self._limit = there if budget is None else min(there, budget - CUDA_CONTEXT)

    def limit(self) -> int:
        return self._limit

    def peak(self) -> int:
        return torch.cuda.max_memory_reserved()

    def reset(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Ladder:
    """The plans of a model of `layers` layers, dearest first: `rungs`.

    expected   bytes that a plan needs, context excluded; None where no estimate can be had: then the plans are those
               that were safe without one, every layer's input on the device or on the host
    host       whether inputs may go to the host
    first      levels to begin with, whatever is expected of them: the dearest plan there is then
    """

    def __init__(
        self,
        layers: int,
        expected: Callable[[Sequence[str]], int] | None = None,
        *,
        host: bool = True,
        first: Sequence[str] | None = None,
    ) -> None:
        steps = ("all", "costly", "input", "host")[: 4 if host else 3]
        if expected is None:
            steps = steps[2:]
            self.rungs = [(level,) * layers for level in steps]
        else:
            self.rungs = [(steps[0],) * layers]
            for dearer, cheaper in pairwise(steps):
                self.rungs += [(cheaper,) * (n + 1) + (dearer,) * (layers - n - 1) for n in range(layers)]
        self._expected = expected
        self.begins = first is not None
        if first is not None:
            below = [r for r in self.rungs if r != tuple(first) and (not expected or expected(r) < expected(first))]
            self.rungs = [tuple(first), *below]

    def expected(self, rung: int) -> int | None:
        return None if self._expected is None else self._expected(self.rungs[rung])

    def dearest(self, room: int, *, start: int = 0) -> int:
        """The first rung from `start` on that is expected to need at most `room` bytes; the last where none is."""
        for rung in range(start, len(self.rungs)):
            expected = self.expected(rung)
            if expected is None or expected <= room:
                return rung
        return len(self.rungs) - 1


class Keeper:
    """Runs micro-batches on the rung that fits; `remove` leaves the model as it was.

    warmup    micro-batches before the first measurement: those of the first optimizer step
    measures  whether measurements move the plan; without, only running out of memory does
    random    whether layers draw random numbers (see `Keeping`)

    `levels` are the ones in force, `moves` what was changed and why, `redone` counts micro-batches done again.
    """

    def __init__(
        self,
        model: nn.Module,
        ladder: Ladder,
        meter: Meter,
        *,
        warmup: int = 1,
        measures: bool = True,
        random: bool = True,
    ) -> None:
        self.moves: list[str] = []
        self.redone = 0
        self._ladder, self._meter = ladder, meter
        self._room = int(meter.limit() * (1 - MARGIN))
        self._rung = 0 if ladder.begins else ladder.dearest(self._room)
        self._failed = -1  # the cheapest rung that ran out of memory
        self._windows = WINDOWS if measures and ladder.expected(0) is not None else 0
        self._until = warmup
        self._warm = False
        self._keeping = Keeping(model, ladder.rungs[self._rung], random=random)
        self._there: list[nn.Parameter] = []  # those that got their gradient in this micro-batch
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._hooks = [p.register_post_accumulate_grad_hook(self._there.append) for p in trained]
        meter.reset()

    @property
    def levels(self) -> tuple[str, ...]:
        return self._keeping.levels

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._keeping.remove()

    def run(self, micro_batch: Callable[[], T], undo: Callable[[], Any] = lambda: None) -> T:
        """`micro_batch()`: forward and backward of one micro-batch; again, after `undo()`, when memory runs out.

        Raises TrainingError when it runs out with nothing left to give up.
        """
        self._there.clear()
        done: list[nn.Parameter] = []
        states = _random_states()
        while True:
            for parameter in done:
                parameter.requires_grad_(False)
            try:
                result = micro_batch()
            except torch.OutOfMemoryError:
                pass  # left here first: the traceback holds the failed micro-batch's tensors
            else:
                self._measure()
                return result
            finally:
                for parameter in done:
                    parameter.requires_grad_(True)
            done += self._there
            self._there.clear()
            gc.collect()
            self._step_down()
            undo()
            _set_random_states(states)

    def _step_down(self) -> None:
        last = len(self._ladder.rungs) - 1
        if self._rung == last:
            raise TrainingError(
                f"out of memory: a micro-batch does not fit in {self._meter.limit() / GIB:.1f} GiB even where each "
                f"layer keeps the least ({write_levels(self.levels)}); lower pack_tokens, or take a smaller base"
            )
        self._failed = self._rung
        expected = self._ladder.expected(self._rung)
        # It needed more than there is, whatever was expected of it.
        beyond = 0 if expected is None else max(0, self._meter.limit() - expected)
        self.redone += 1
        self._move(self._ladder.dearest(self._room - beyond, start=self._rung + 1), "out of memory")

    def _measure(self) -> None:
        """Counts a micro-batch that went well; at the end of a window, compares its peak with the estimate."""
        if not self._windows:
            return
        self._until -= 1
        if self._until > 0:
            return
        if not self._warm:
            self._warm = True
        else:
            self._windows -= 1
            expected = self._ladder.expected(self._rung)
            assert expected is not None
            beyond = self._meter.peak() - expected
            rung = self._ladder.dearest(self._room - beyond, start=self._failed + 1)
            if rung == self._rung:
                self._windows = 0
                return
            self._move(rung, f"{self._meter.peak() / GIB:.2f} GiB reserved, {expected / GIB:.2f} GiB expected")
        self._until = WINDOW
        self._meter.reset()

    def begin_again(self) -> None:
        """Something else used the memory, such as an evaluation: what was measured so far does not count."""
        if self._windows and self._warm:
            self._until = WINDOW
            self._meter.reset()

    def _move(self, rung: int, why: str) -> None:
        self._rung = rung
        self._keeping.set(self._ladder.rungs[rung])
        self.moves.append(f"{why}; now each layer keeps: {write_levels(self.levels)}")
        if self._warm:
            self._until = WINDOW
        self._meter.reset()


def expected_bytes(
    model: Any, *, tokens: int, sequences: int, labeled: float, kernels: bool, streamed: int = 0
) -> Callable[[Sequence[str]], int] | None:
    """What `estimate_memory` expects the training of `model` to reserve, by its levels; None for an unknown kind.

    tokens, sequences   of a micro-batch; labeled: share of tokens with a label
    kernels             whether fastprice_kernels are under the model, without dropout
    streamed            layers whose weights come from the host
    """
    try:
        shape = read_shape(model.config)
    except BaseModelError:
        return None
    adapters = getattr(model, "peft_config", {}).values()
    rank = max((int(getattr(adapter, "r", 1)) for adapter in adapters), default=1)
    packed = any(parameter.dtype == torch.uint8 for parameter in model.parameters())
    method = "full" if not adapters else "qlora" if packed else "lora"

    def expected(levels: Sequence[str]) -> int:
        estimate = estimate_memory(
            shape, method=method, rank=rank, tokens=tokens, sequences=sequences, recompute=levels,
            loss_head="completion", labeled=labeled, engine="fastprice" if kernels else "peft",
            streaming=streamed,
        )  # fmt: skip
        return estimate.peak_bytes - CUDA_CONTEXT

    return expected


def _random_states() -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_states(states: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])
