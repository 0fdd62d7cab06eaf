"""The frozen weights of one decoder layer as one flat buffer on the host, so that a visit is one copy.

Streamed are the packed NF4 weights and their block statistics, 0.516 bytes a weight. Norms, biases, adapters and the
code tables (273 numbers a linear layer) stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprice.errors import ConfigError
from fastprice.models.parts import layers_of, plain_model
from fastprice.offload.transfers import Boundary

__all__ = ["HostLayer", "decoder_layers", "frozen_linears"]

_ALIGN = 256  # bytes: what CUDA's allocator aligns to, and more than any kernel's vector loads want


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a transformers causal model, with or without PEFT's wrapper; ConfigError if it has none."""
    layers: nn.ModuleList | None = layers_of(model)
    if layers is None:
        raise ConfigError(
            f"streaming: {type(plain_model(model)).__name__} does not keep its decoder layers in `layers`"
        )
    return layers


def frozen_linears(layer: nn.Module) -> Iterator[Any]:
    """The 4-bit linear layers of bitsandbytes in `layer`, also those inside PEFT's LoRA layers."""
    import bitsandbytes

    for module in layer.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            yield module


@dataclass(frozen=True)
class _Place:
    """A tensor's place in the flat buffer, and how the module is given another tensor in its stead."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    put: Callable[[Tensor], None]


class HostLayer:
    """One layer's streamed bytes: `flat` (uint8) on the host, and where each of the layer's tensors lies in it."""

    def __init__(self, layer: nn.Module, boundary: Boundary, name: str = "the layer") -> None:
        """Moves the 4-bit weights of `layer` to the host: afterwards its tensors are views of `flat`.

        Raises ConfigError where `layer` has no 4-bit weights, or has them in another layout than NF4's.
        """
        found = [pair for linear in frozen_linears(layer) for pair in _tensors_of(linear, name)]
        if not found:
            raise ConfigError(f"streaming: {name} has no 4-bit weights; only a frozen NF4 base (qlora) is streamed")
        self._places: list[_Place] = []
        size = 0
        for tensor, put in found:
            self._places.append(_Place(size, tensor.shape, tensor.dtype, put))
            size += -(-tensor.nbytes // _ALIGN) * _ALIGN
        self.flat = boundary.host(size)
        self.flat.zero_()  # the gaps too, so that the whole buffer has one checksum
        for (tensor, _), place in zip(found, self._places, strict=True):
            self._view(self.flat, place).copy_(tensor)
        self.show(self.flat)

    @property
    def size(self) -> int:
        """Bytes of one visit."""
        return self.flat.numel()

    def show(self, flat: Tensor) -> None:
        """Makes the layer's tensors views of `flat`, a buffer that holds, or will hold, the bytes of this layer."""
        for place in self._places:
            place.put(self._view(flat, place))

    @staticmethod
    def _view(flat: Tensor, place: _Place) -> Tensor:
        size = place.shape.numel() * place.dtype.itemsize
        return flat[place.start : place.start + size].view(place.dtype).view(place.shape)


def _tensors_of(linear: Any, name: str) -> Iterator[tuple[Tensor, Callable[[Tensor], None]]]:
    weight = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        what = "not quantized yet" if state is None else "repacked for inference on this CPU"
        raise ConfigError(f"streaming: 4-bit weights of {name} are {what}; stream the model as it was loaded")
    if weight.requires_grad:
        raise ConfigError(f"streaming: a 4-bit weight of {name} wants a gradient; only frozen weights are streamed")

    def put_weight(tensor: Tensor) -> None:
        weight.data = tensor

    def put_statistics(owner: Any) -> Callable[[Tensor], None]:
        return lambda tensor: setattr(owner, "absmax", tensor)

    yield weight.data, put_weight
    yield state.absmax, put_statistics(state)
    if state.nested:
        yield state.state2.absmax, put_statistics(state.state2)
