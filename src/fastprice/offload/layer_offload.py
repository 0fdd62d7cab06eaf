"""Layer offload: the frozen weights of decoder layers are on the host and prefetched just before they are needed.

Every offloaded layer has one device buffer for good: the k-th of them the buffer k modulo their number. Its tensors are
views of that buffer throughout, so whatever autograd saves between forward and backward (bitsandbytes holds the packed
weight and its statistics, our kernels likewise) never sees another address, and bringing a layer back is one copy.
Neighbors have different buffers, in both directions: while one layer computes, the next one (in backward the one
before) is copied into a buffer that is free. Nothing is copied back, as the weights do not change.

A layer is visited twice a micro-batch: once in forward, once in backward, where recomputation under activation
checkpointing is part of the same visit. The last layers of the forward pass are still in their buffers when backward
begins, and so are the first ones at the start of the next step: a step of m offloaded layers with b buffers costs
2 (m - b) copies. One visit for several micro-batches of an accumulated step was left out: every trainer would have to
run all of them through one layer before the next and hold all their inputs, and a larger micro-batch gives the same
ratio of computing to copying.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprice.errors import ConfigError, OffloadError
from fastprice.models.parts import decoder_layers
from fastprice.offload.device_transfers import DeviceTransfers, transfers_for
from fastprice.offload.host_embedding import HostEmbedding
from fastprice.offload.host_layer import HostLayer

__all__ = ["LayerOffload", "offload_layers", "spread_layers"]

_FORWARD, _BACKWARD = 1, -1


def spread_layers(layers: int, count: int) -> list[int]:
    """Which `count` of `layers` to offload: evenly apart, the first and the last resident as far as possible.

    A copy can overlap with the layers between one offloaded layer and the next; if the offloaded layers were one block,
    each copy would have one layer's time, and the bus would idle while the resident layers compute. Raises ConfigError
    for an impossible count.
    """
    if not 0 <= count <= layers:
        raise ConfigError(f"offload: {count} of {layers} layers cannot be offloaded; give 0 to {layers}")
    return [(2 * k + 1) * layers // (2 * count) for k in range(count)]


def offload_layers(
    model: Any,
    layers: int | Sequence[int],
    *,
    device_buffers: int = 2,
    transfers: DeviceTransfers | None = None,
    host_embedding: bool = False,
) -> LayerOffload:
    """Moves the frozen 4-bit weights of decoder layers to the host and prefetches them from there.

    Args:
        model: a transformers causal model with bitsandbytes' Linear4bit layers, with or without PEFT's adapters and
            `fastprice_kernels`.
        layers: how many (see `spread_layers`), or the indices of which.
        device_buffers: offloaded layers on the device at once; one computes, the others are prefetched.
        transfers: default: those of the model's device.
        host_embedding: hold the embedding's table on the host too and copy the rows that a batch looks up. Not for a
            table that is tied to lm_head.

    Returns:
        The LayerOffload, a context manager.

    Raises:
        ConfigError: layers that do not exist or have no frozen 4-bit weights, no device buffer, a tied embedding.
    """
    modules = decoder_layers(model)
    indices = spread_layers(len(modules), layers) if isinstance(layers, int) else sorted(set(layers))
    if any(not 0 <= index < len(modules) for index in indices):
        raise ConfigError(f"offload: the model has layers 0 to {len(modules) - 1}, not {indices}")
    transfers = transfers or transfers_for(next(model.parameters()).device)
    host_layers = {index: HostLayer(modules[index], transfers, f"layer {index}") for index in indices}
    return LayerOffload(
        model, host_layers, device_buffers=device_buffers, transfers=transfers, host_embedding=host_embedding
    )


@dataclass
class _DeviceBuffer:
    """position: the offloaded layer (its rank among them) whose bytes it holds or awaits; arrival: the event of a copy
    that nobody waited for yet; free: the event after its last reader."""

    bytes: Tensor
    position: int | None = None
    arrival: Any = None
    free: Any = None


class LayerOffload:
    """The offloaded layers of one model, until `close`; made by `offload_layers` or while loading (nf4_loading.py).

    layers      the indices of the offloaded decoder layers
    transfers   the memory and copies in use
    visits      how often each layer (by its index) was brought in

    `close`, also on leaving the context by an exception, removes the hooks and frees the device buffers.
    """

    def __init__(
        self,
        model: Any,
        host_layers: Mapping[int, HostLayer],
        *,
        device_buffers: int = 2,
        transfers: DeviceTransfers,
        host_embedding: bool = False,
    ) -> None:
        if device_buffers < 1:
            raise ConfigError(f"offload: {device_buffers} device buffers hold no layer; give at least 1")
        modules = decoder_layers(model)
        self.layers = sorted(host_layers)
        self.transfers = transfers
        self.visits: Counter[int] = Counter()
        self._host_layers = [host_layers[index] for index in self.layers]
        self._visited: int | None = None  # the layer whose visit has begun and not ended
        self._closed = False
        self._hooks: list[Any] = []
        self._buffers: list[_DeviceBuffer] = []
        self._embedding: HostEmbedding | None = None
        try:
            self._embedding = HostEmbedding(model, transfers) if host_embedding else None
            for first in range(min(device_buffers, len(self._host_layers))):
                largest = max(host.size for host in self._host_layers[first::device_buffers])
                self._buffers.append(_DeviceBuffer(transfers.allocate_device(largest)))
            for position, (index, host) in enumerate(zip(self.layers, self._host_layers, strict=True)):
                host.bind(self._buffer(position).bytes)
                self._register_hooks(modules[index], position)
        except BaseException:
            self.close()
            raise

    @property
    def device_bytes(self) -> int:
        """Bytes of the device buffers: the GPU memory of all offloaded layers."""
        return sum(buffer.bytes.numel() for buffer in self._buffers)

    @property
    def host_bytes(self) -> int:
        """Bytes of the offloaded layers on the host, without the embedding's."""
        return sum(host.size for host in self._host_layers)

    def close(self, *, to_device: bool = False) -> None:
        """Ends the offload and frees the device buffers; a second call does nothing.

        The weights stay on the host (which on a CPU is where the model computes). `to_device` moves them back to the
        device, where they must fit.
        """
        if self._closed:
            return
        self._closed = True
        for hook in self._hooks:
            hook.remove()
        self.transfers.synchronize()
        for host in self._host_layers:
            host.bind(host.buffer.to(self.transfers.device) if to_device else host.buffer)
        if self._embedding is not None:
            self._embedding.close(to_device=to_device)
        self._buffers.clear()
        self._hooks.clear()

    def __enter__(self) -> LayerOffload:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _register_hooks(self, layer: nn.Module, position: int) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._begin_visit(position, _BACKWARD if _in_backward() else _FORWARD, cyclic=_is_inference(module))
            if not torch.is_grad_enabled():
                return None
            if args:
                return (_InputMarker.apply(args[0], self, position), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": _InputMarker.apply(kwargs["hidden_states"], self, position)}

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if _in_backward():  # a recomputation: the visit lasts until the layer's gradients are computed
                return None
            self._end_visit(position, _FORWARD, cyclic=_is_inference(module))
            if not torch.is_grad_enabled():
                return None
            if isinstance(output, Tensor):
                return _OutputMarker.apply(output, self, position)
            return (_OutputMarker.apply(output[0], self, position), *output[1:])

        self._hooks += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        ]

    def _buffer(self, position: int) -> _DeviceBuffer:
        return self._buffers[position % len(self._buffers)]

    def _begin_visit(self, position: int, direction: int, *, cyclic: bool = False) -> None:
        """Makes computation queued from now on wait for the layer's bytes, and prefetches the layers after it."""
        if self._closed:
            raise OffloadError("the model's layers are no longer offloaded: run forward and backward before close()")
        if self._visited == position and direction == _BACKWARD:  # the recomputation within a visit
            return
        if self._visited is not None:  # its forward raised, or its input requires no gradient: no marker ended it
            self._buffer(self._visited).free = self.transfers.record()
        self._visited = position
        self.visits[self.layers[position]] += 1
        buffer = self._buffer(position)
        self._copy_to_device(position)
        if buffer.arrival is not None:
            try:
                self.transfers.wait(buffer.arrival)
            except RuntimeError as error:
                raise self._failure(position, error) from error
            buffer.arrival = None
        self._prefetch(position, direction, cyclic)

    def _end_visit(self, position: int, direction: int, *, cyclic: bool = False) -> None:
        """Frees the layer's buffer for the next layer that uses it."""
        if self._visited == position:
            self._buffer(position).free = self.transfers.record()
            self._visited = None
            self._prefetch(position, direction, cyclic)

    def _prefetch(self, position: int, direction: int, cyclic: bool) -> None:
        """Queues for each buffer not in use the copy of its next layer; `cyclic`: the first layer follows the last."""
        count = len(self._host_layers)
        assigned = set() if self._visited is None else {self._visited % len(self._buffers)}
        for distance in range(1, 2 * len(self._buffers)):
            following = position + direction * distance
            if cyclic:
                following %= count
            if not 0 <= following < count:
                break
            if following % len(self._buffers) not in assigned:
                assigned.add(following % len(self._buffers))
                self._copy_to_device(following)

    def _copy_to_device(self, position: int) -> None:
        buffer = self._buffer(position)
        if buffer.position == position:
            return
        host = self._host_layers[position]
        buffer.position = buffer.arrival = None
        try:
            buffer.arrival = self.transfers.copy(buffer.bytes[: host.size], host.buffer, buffer.free)
        except RuntimeError as error:
            raise self._failure(position, error) from error
        buffer.position = position

    def _failure(self, position: int, error: Exception) -> OffloadError:
        self._buffer(position).position = None
        reason = " ".join(str(error).split()) or type(error).__name__
        return OffloadError(f"offload: layer {self.layers[position]} could not be copied to the GPU: {reason[:200]}")


class _Marker(torch.autograd.Function):
    """The identity on a layer's input or output, whose backward begins or ends the layer's visit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offload: LayerOffload, position: int) -> Tensor:
        ctx.offload, ctx.position = offload, position
        return x.view_as(x)


class _InputMarker(_Marker):
    """On a layer's input. Its backward runs when all gradients of the layer that need frozen weights are computed, as
    all of them flow into the input's."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ctx.offload._end_visit(ctx.position, _BACKWARD)
        return gradient, None, None


class _OutputMarker(_Marker):
    """On a layer's output. Its backward is the first of the layer to run."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ctx.offload._begin_visit(ctx.position, _BACKWARD)
        return gradient, None, None


def _in_backward() -> bool:
    # torch.utils.checkpoint reads the same; there is no public function.
    return bool(torch._C._current_graph_task_id() != -1)


def _is_inference(layer: nn.Module) -> bool:
    """Whether the pass is followed by another forward pass (prediction), and not by a backward pass."""
    return not layer.training and not torch.is_grad_enabled()
