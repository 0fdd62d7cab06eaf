"""The simulation's meter, and what stands in for code that runs only on a CUDA device (see simulate.py)."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from fastprice.memory.activation_offload import HostInputs
from fastprice.models.packed_attention import packed_attention

__all__ = ["HostStandIn", "Live", "attention", "linear4bit"]


class Live(TorchDispatchMode):
    """Bytes of all storages made while it is on, and their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.bytes -= size


class HostStandIn(HostInputs):
    """Copies on the host take nothing of the device: shapes in their place."""

    def _copy_out(self, kept: Any) -> None:
        kept.host = (kept.device.shape, kept.device.dtype)

    def _copy_in(self, kept: Any) -> None:
        if kept.device is None:
            shape, dtype = kept.host
            kept.device = torch.empty(shape, dtype=dtype)


class Flash(torch.autograd.Function):
    """Flash Attention 2's memory: saves q, k, v, output and logsumexp; its backward gathers dq in fp32, and dk and dv
    for every query head before they are summed over a group. q: (1, T, H, D); k, v: (1, T, G, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, rows = ctx.saved_tensors
        held = [torch.empty_like(rows), torch.empty_like(q, dtype=torch.float32)]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        if q.shape[2] != k.shape[2]:
            held += [torch.empty_like(q), torch.empty_like(q)]
        del held
        return dq, dk, dv


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: q (B, H, T, D), k and v (B, G, T, D) -> (B, T, H, D)."""

    if options.get("softcap") is not None and module.training:
        return packed_attention(module, query, key, value, attention_mask, **options)
    return Flash.apply(*(side.transpose(1, 2) for side in (query, key, value))), None


class _Matmul4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantized(gradient.dtype), None, None


def linear4bit(layer: nn.Linear) -> nn.Module:
    """A stand-in for bitsandbytes' `Linear4bit` with double quantization, on the meta device."""
    import bitsandbytes

    class _Linear4bit(bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = _Matmul4bit.apply(x.to(torch.bfloat16), self, self.bias)
            return output.to(x.dtype)

        def dequantized(self, dtype: torch.dtype) -> Tensor:
            absmax = self.absmax.to(torch.float32)
            absmax += self.offset
            weight = self.weight.new_empty((self.out_features, self.in_features), dtype=torch.bfloat16)
            cast: Tensor = weight.to(dtype)
            return cast

    made = _Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta")
    count = layer.weight.numel()
    packed = nn.Parameter(torch.empty(count // 2, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
    packed.compress_statistics, packed.quant_type = True, "nf4"  # type: ignore[attr-defined]
    made.weight = packed
    made.bias = layer.bias
    blocks = -(-count // 64)
    for name, size, dtype in (
        ("absmax", blocks, torch.uint8),
        ("nested_absmax", -(-blocks // 256), torch.float32),
        ("code", 16, torch.float32),
        ("nested_code", 256, torch.float32),
        ("offset", 1, torch.float32),
    ):
        made.register_buffer(name, torch.empty(size, dtype=dtype, device="meta"))
    return made
