"""What streaming asks of a device, and nothing else: memory on both sides, copies that run beside the computation, and
events that order the two.

`CudaBoundary` is the real one. `PretendBoundary` stands in where there is no CUDA device, and is stricter than any: a
slot is filled with 0xFF (whose statistics decode to NaN) the moment it is given up, and the new bytes are there only
once somebody has waited for them. Whoever reads a slot outside its time therefore computes NaN.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Boundary", "CudaBoundary", "PretendBoundary", "boundary_for"]

POISON = 0xFF


class Boundary(Protocol):
    """Memory and copies between host and device. An event is whatever the boundary makes it."""

    device: torch.device

    def host(self, size: int) -> Tensor:
        """`size` bytes (uint8) of host memory that `copy` can read while the device computes."""

    def slot(self, size: int) -> Tensor:
        """`size` bytes (uint8) of device memory."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Queues a copy to start once the event `after` has come (None: at once); returns the event of its end."""

    def mark(self) -> Any:
        """The event that comes when all computation queued so far is done."""

    def wait(self, event: Any) -> None:
        """Computation queued from now on starts once `event` has come."""

    def settle(self) -> None:
        """Returns when every queued copy is done or given up, so that slots can be freed."""


def boundary_for(device: torch.device) -> Boundary:
    """The boundary of `device`: CUDA's, or the pretend one."""
    return CudaBoundary(device) if device.type == "cuda" else PretendBoundary()


class CudaBoundary:
    """Copies on a stream of their own, out of page-locked memory.

    The memory is registered with CUDA rather than taken from PyTorch's pinned allocator, which rounds every block up
    to a power of two: 441 MB a layer would become 537.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def host(self, size: int) -> Tensor:
        flat = torch.empty(size, dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        failed = int(runtime.cudaHostRegister(flat.data_ptr(), size, 0))
        if failed:
            raise MemoryError(f"CUDA cannot lock {size:,} bytes of host memory (error {failed})")
        weakref.finalize(flat, runtime.cudaHostUnregister, flat.data_ptr())
        return flat

    def slot(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event | None) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            event: torch.cuda.Event = self._stream.record_event()
        return event

    def mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def settle(self) -> None:
        self._stream.synchronize()


@dataclass
class PretendBoundary:
    """A device that is ordinary memory. `copies` holds the bytes of every copy, `slots` every live slot."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    copies: list[int] = field(default_factory=list)
    slots: weakref.WeakSet[Tensor] = field(default_factory=weakref.WeakSet)

    def host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def slot(self, size: int) -> Tensor:
        made = torch.full((size,), POISON, dtype=torch.uint8)
        self.slots.add(made)
        return made

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Callable[[], None]:
        target.fill_(POISON)
        self.copies.append(source.numel())

        def arrive() -> None:
            target.copy_(source)

        return arrive

    def mark(self) -> Callable[[], None]:
        return lambda: None  # what ran before has run

    def wait(self, event: Callable[[], None]) -> None:
        event()

    def settle(self) -> None:
        pass
