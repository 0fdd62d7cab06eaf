"""Memory on host and device, copies that overlap with computation, and the events that order the two.

`CudaTransfers` is the real one. `SimulatedTransfers` replaces it where there is no CUDA device, and is stricter than
any: a device buffer is filled with 0xFF (whose statistics decode to NaN) as soon as a new copy into it is queued, and
the new bytes arrive only when somebody waits for them. Code that reads a buffer at the wrong time computes NaN.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CudaTransfers", "DeviceTransfers", "SimulatedTransfers", "transfers_for"]

POISON = 0xFF


class DeviceTransfers(Protocol):
    """Memory and copies between host and device. The type of an event is the implementation's own."""

    device: torch.device

    def allocate_host(self, size: int) -> Tensor:
        """`size` bytes (uint8) of host memory from which `copy` can read while the device computes."""

    def allocate_device(self, size: int) -> Tensor:
        """`size` bytes (uint8) of device memory."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Queues a copy that starts after the event `after` (None: at once); returns the event of its end."""

    def record(self) -> Any:
        """The event of the end of all computation queued so far."""

    def wait(self, event: Any) -> None:
        """Makes computation queued from now on start after `event`."""

    def synchronize(self) -> None:
        """Blocks until every queued copy has ended or is canceled, so that device buffers can be freed."""


def transfers_for(device: torch.device) -> DeviceTransfers:
    """CudaTransfers for a CUDA device, SimulatedTransfers for any other."""
    return CudaTransfers(device) if device.type == "cuda" else SimulatedTransfers()


class CudaTransfers:
    """Copies on a CUDA stream of their own, from page-locked memory.

    The memory is registered with CUDA rather than taken from PyTorch's pinned allocator, which rounds every block up
    to a power of two: 441 MB a layer would become 537.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copy_stream = torch.cuda.Stream(device)

    def allocate_host(self, size: int) -> Tensor:
        buffer = torch.empty(size, dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        failed = int(runtime.cudaHostRegister(buffer.data_ptr(), size, 0))
        if failed:
            raise MemoryError(f"CUDA cannot lock {size:,} bytes of host memory (error {failed})")
        weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
        return buffer

    def allocate_device(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event | None) -> torch.cuda.Event:
        with torch.cuda.stream(self._copy_stream):
            if after is not None:
                self._copy_stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            event: torch.cuda.Event = self._copy_stream.record_event()
        return event

    def record(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self) -> None:
        self._copy_stream.synchronize()


@dataclass
class SimulatedTransfers:
    """A device that is ordinary memory. `copied_bytes` lists the bytes of every copy, `device_buffers` every live
    device buffer."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    copied_bytes: list[int] = field(default_factory=list)
    device_buffers: weakref.WeakSet[Tensor] = field(default_factory=weakref.WeakSet)

    def allocate_host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def allocate_device(self, size: int) -> Tensor:
        buffer = torch.full((size,), POISON, dtype=torch.uint8)
        self.device_buffers.add(buffer)
        return buffer

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Callable[[], None]:
        target.fill_(POISON)
        self.copied_bytes.append(source.numel())

        def arrive() -> None:
            target.copy_(source)

        return arrive

    def record(self) -> Callable[[], None]:
        return lambda: None  # computation is synchronous

    def wait(self, event: Callable[[], None]) -> None:
        event()

    def synchronize(self) -> None:
        pass
