"""The frozen weights of one decoder layer as one flat buffer on the host, so that one copy moves them to the GPU.

Offloaded are the packed NF4 weights and their block statistics, 0.516 bytes a weight. Norms, biases, adapters and the
code tables (273 numbers a linear layer) stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprice.errors import ConfigError
from fastprice.offload.device_transfers import DeviceTransfers

__all__ = ["HostLayer", "frozen_linears"]

_ALIGNMENT = 256  # bytes: that of CUDA's allocator, and more than any kernel's vector loads need


def frozen_linears(layer: nn.Module) -> Iterator[Any]:
    """The 4-bit linear layers of bitsandbytes in `layer`, also those inside PEFT's LoRA layers."""
    import bitsandbytes

    for module in layer.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            yield module


@dataclass(frozen=True)
class _BufferPart:
    """A tensor's part of the flat buffer, and the function that assigns another tensor to its module."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    assign: Callable[[Tensor], None]


class HostLayer:
    """One layer's offloaded bytes: `buffer` (flat, uint8) on the host, and which part of it each tensor takes.

    name   of the layer, for error messages

    Raises ConfigError if `layer` has no 4-bit weights, or has them in another layout than NF4's.
    """

    def __init__(self, layer: nn.Module, transfers: DeviceTransfers, name: str = "the layer") -> None:
        tensors = [pair for linear in frozen_linears(layer) for pair in _tensors_of(linear, name)]
        if not tensors:
            raise ConfigError(f"offload: {name} has no 4-bit weights; only a frozen NF4 base (qlora) can be offloaded")
        self._parts: list[_BufferPart] = []
        size = 0
        for tensor, assign in tensors:
            self._parts.append(_BufferPart(size, tensor.shape, tensor.dtype, assign))
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.buffer = transfers.allocate_host(size)
        self.buffer.zero_()  # the gaps too, so that the whole buffer has one checksum
        for (tensor, _), part in zip(tensors, self._parts, strict=True):
            self._view(self.buffer, part).copy_(tensor)
        self.bind(self.buffer)

    @property
    def size(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.numel()

    def bind(self, buffer: Tensor) -> None:
        """Makes the layer's tensors views of a buffer that holds, or will hold, the bytes of this layer."""
        for part in self._parts:
            part.assign(self._view(buffer, part))

    @staticmethod
    def _view(buffer: Tensor, part: _BufferPart) -> Tensor:
        size = part.shape.numel() * part.dtype.itemsize
        return buffer[part.start : part.start + size].view(part.dtype).view(part.shape)


def _tensors_of(linear: Any, name: str) -> Iterator[tuple[Tensor, Callable[[Tensor], None]]]:
    """Each tensor of a 4-bit layer that is offloaded, with the function that assigns another in its place."""
    weight = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        problem = "not quantized yet" if state is None else "repacked for inference on this CPU"
        raise ConfigError(f"offload: 4-bit weights of {name} are {problem}; offload the model as it was loaded")
    if weight.requires_grad:
        raise ConfigError(
            f"offload: a 4-bit weight of {name} requires a gradient; freeze the base before it is offloaded"
        )

    def assign_weight(tensor: Tensor) -> None:
        weight.data = tensor

    def assign_statistics(owner: Any) -> Callable[[Tensor], None]:
        return lambda tensor: setattr(owner, "absmax", tensor)

    yield weight.data, assign_weight
    yield state.absmax, assign_statistics(state)
    if state.nested:
        yield state.state2.absmax, assign_statistics(state.state2)
