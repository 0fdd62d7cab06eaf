"""Inputs of recomputed layers in pinned host memory: out while the layer computes, back before their turn."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["HostInputs"]


class _Input:
    """One layer's input: on the device, on the host, or both while a copy runs."""

    def __init__(self, device: Tensor, previous: _Input | None) -> None:
        self.device: Tensor | None = device.detach()
        self.host: Tensor | None = None
        self.place = device.device
        self.wanted = device.requires_grad
        self.copied: Any = None  # the event after the copy that was started last
        # The layer before. Weak: a forward pass whose loss is thrown away must not keep its inputs.
        self.previous = None if previous is None else weakref.ref(previous)


class HostInputs:
    """The inputs of a model's layers at level "host".

    The newest input stays on the device until the next one comes, or until its own turn: the backward pass begins with
    it, and no copy has to be waited for. Taking one starts the copy of the one before it. So two are on the device
    at most, (B, T, h) each, in the dtype of the residual stream; the others take as many bytes of pinned memory (which
    PyTorch hands out in powers of two).
    """

    def __init__(self) -> None:
        self._newest: weakref.ref[_Input] | None = None
        self._streams: dict[torch.device, Any] = {}

    def checkpoint(self, function: Callable[..., Any], x: Tensor, *others: Any, random: bool = True) -> Any:
        """`function(x, *others)`, computed again in the backward pass from x's copy; in the form that transformers
        calls a checkpointing function. `random`: whether it draws random numbers."""
        kept = self.put(x)
        first = [x]

        def run(_: Tensor, *others: Any) -> Any:
            return function(first.pop() if first else self.take(kept), *others)

        # checkpoint() reads off a tensor's device which random numbers to restore.
        return checkpoint(run, x.new_empty(0), *others, use_reentrant=False, preserve_rng_state=random)

    def put(self, x: Tensor) -> _Input:
        """Starts copying x to the host."""
        newest = self._newest() if self._newest is not None else None
        made = _Input(x, newest)
        if newest is not None:
            self._let_go(newest)
        self._copy_out(made)
        self._newest = weakref.ref(made)
        return made

    def take(self, kept: _Input) -> Tensor:
        """The input on its device, as a leaf that wants a gradient if the original did."""
        x = self._bring(kept)
        previous = kept.previous() if kept.previous is not None else None
        if previous is not None:
            self._copy_in(previous)
        self._newest = kept.previous
        return x.detach().requires_grad_(kept.wanted)

    def _copy_out(self, kept: _Input) -> None:
        assert kept.device is not None
        x = kept.device
        if not x.is_cuda:
            kept.host = x.clone()
            return
        host = kept.host = torch.empty_like(x, device="cpu", pin_memory=True)
        kept.copied = self._on_side(kept.place, lambda: host.copy_(x, non_blocking=True))

    def _let_go(self, kept: _Input) -> None:
        """The device's copy is no longer needed once it is on the host."""
        if kept.device is not None and kept.copied is not None:
            torch.cuda.current_stream(kept.place).wait_event(kept.copied)
        kept.device = None

    def _copy_in(self, kept: _Input) -> None:
        if kept.device is not None:
            return
        assert kept.host is not None
        if kept.place.type != "cuda":
            kept.device = kept.host
            return
        # Made by the stream that computes, which also frees it: the allocator then needs to be told of no other.
        x, host = torch.empty_like(kept.host, device=kept.place, pin_memory=False), kept.host
        kept.device = x
        kept.copied = self._on_side(kept.place, lambda: x.copy_(host, non_blocking=True))

    def _bring(self, kept: _Input) -> Tensor:
        self._copy_in(kept)
        assert kept.device is not None
        if kept.copied is not None:
            torch.cuda.current_stream(kept.place).wait_event(kept.copied)
        x, kept.device, kept.host = kept.device, None, None
        return x

    def _on_side(self, device: torch.device, copy: Callable[[], Any]) -> Any:
        """Runs `copy` on the stream for copies, after all that is waiting on the current one; the event after it."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        side = self._streams[device]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            copy()
            return side.record_event()
