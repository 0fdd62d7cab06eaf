"""Inputs of recomputed layers in pinned host memory.

Copies run on a CUDA stream of their own: out while the layer computes, and back while the layer after it runs its
backward pass. On a CPU both are plain copies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["ActivationOffload"]


class _OffloadedInput:
    """One layer's input: on the device, on the host, or both while a copy runs."""

    def __init__(self, on_device: Tensor, previous: _OffloadedInput | None) -> None:
        self.on_device: Tensor | None = on_device.detach()
        self.on_host: Any = None
        self.device = on_device.device
        self.requires_grad = on_device.requires_grad
        self.copied: Any = None  # the event after the last copy that was started
        # The input of the offloaded layer before. Weak, so that a forward pass whose loss is dropped frees its inputs.
        self.previous = None if previous is None else weakref.ref(previous)


class ActivationOffload:
    """The inputs of a model's layers at recompute level "offload".

    The newest input stays on the device until the next one is offloaded, or until its own backward pass, which comes
    first and so needs no copy back. `restore` starts the prefetch of the input before. At most two inputs are on the
    device, (B, T, h) each in the dtype of the residual stream; the others take as many bytes of pinned memory (which
    PyTorch allocates in powers of two).
    """

    def __init__(self) -> None:
        self._newest: weakref.ref[_OffloadedInput] | None = None
        self._copy_streams: dict[torch.device, Any] = {}

    def checkpoint(self, function: Callable[..., Any], x: Tensor, *others: Any, preserve_rng_state: bool = True) -> Any:
        """`function(x, *others)`, recomputed in the backward pass from the copy of x.

        The signature is that of transformers' checkpointing functions. `preserve_rng_state` as in
        `torch.utils.checkpoint.checkpoint`.
        """
        offloaded = self.offload(x)
        first = [x]

        def run(_: Tensor, *others: Any) -> Any:
            return function(first.pop() if first else self.restore(offloaded), *others)

        # checkpoint() finds the device whose generator state it must restore from a tensor argument.
        return checkpoint(run, x.new_empty(0), *others, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    def offload(self, x: Tensor) -> _OffloadedInput:
        """Starts copying x to the host."""
        newest = self._newest() if self._newest is not None else None
        offloaded = _OffloadedInput(x, newest)
        if newest is not None:
            self._release_device_copy(newest)
        self._copy_to_host(offloaded)
        self._newest = weakref.ref(offloaded)
        return offloaded

    def restore(self, offloaded: _OffloadedInput) -> Tensor:
        """The input on its device, as a leaf that requires a gradient if the original did."""
        x = self._await_device_copy(offloaded)
        previous = offloaded.previous() if offloaded.previous is not None else None
        if previous is not None:
            self._copy_to_device(previous)
        self._newest = offloaded.previous
        return x.detach().requires_grad_(offloaded.requires_grad)

    def _copy_to_host(self, offloaded: _OffloadedInput) -> None:
        assert offloaded.on_device is not None
        x = offloaded.on_device
        if not x.is_cuda:
            offloaded.on_host = x.clone()
            return
        host = offloaded.on_host = torch.empty_like(x, device="cpu", pin_memory=True)
        offloaded.copied = self._on_copy_stream(offloaded.device, lambda: host.copy_(x, non_blocking=True))

    def _release_device_copy(self, offloaded: _OffloadedInput) -> None:
        if offloaded.on_device is not None and offloaded.copied is not None:
            torch.cuda.current_stream(offloaded.device).wait_event(offloaded.copied)
        offloaded.on_device = None

    def _copy_to_device(self, offloaded: _OffloadedInput) -> None:
        if offloaded.on_device is not None:
            return
        assert offloaded.on_host is not None
        if offloaded.device.type != "cuda":
            offloaded.on_device = offloaded.on_host
            return
        # Allocated on the computing stream, which also frees it, so that the allocator needs no record_stream.
        host = offloaded.on_host
        x = torch.empty_like(host, device=offloaded.device, pin_memory=False)
        offloaded.on_device = x
        offloaded.copied = self._on_copy_stream(offloaded.device, lambda: x.copy_(host, non_blocking=True))

    def _await_device_copy(self, offloaded: _OffloadedInput) -> Tensor:
        self._copy_to_device(offloaded)
        assert offloaded.on_device is not None
        if offloaded.copied is not None:
            torch.cuda.current_stream(offloaded.device).wait_event(offloaded.copied)
        x, offloaded.on_device, offloaded.on_host = offloaded.on_device, None, None
        return x

    def _on_copy_stream(self, device: torch.device, copy: Callable[[], Any]) -> Any:
        """Runs `copy` on the copy stream, after all work queued on the current one; returns the event after it."""
        if device not in self._copy_streams:
            self._copy_streams[device] = torch.cuda.Stream(device)
        stream = self._copy_streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            copy()
            return stream.record_event()
