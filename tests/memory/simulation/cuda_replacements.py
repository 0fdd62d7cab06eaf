"""Replacements for code that runs only on a CUDA device, which allocate and save what that code does (see step.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastprice.memory.activation_offload import ActivationOffload
from fastprice.models.packed_attention import packed_attention

__all__ = ["UncountedOffload", "flash_attention", "give_quant_states", "linear4bit"]


class UncountedOffload(ActivationOffload):
    """Copies on the host take no device memory: only their shapes are recorded."""

    def _copy_to_host(self, offloaded: Any) -> None:
        offloaded.on_host = (offloaded.on_device.shape, offloaded.on_device.dtype)

    def _copy_to_device(self, offloaded: Any) -> None:
        if offloaded.on_device is None:
            shape, dtype = offloaded.on_host
            offloaded.on_device = torch.empty(shape, dtype=dtype)


class _FlashAttention(torch.autograd.Function):
    """Flash Attention 2's memory: saves q, k, v, output and logsumexp; backward accumulates dq in fp32, and dk and dv
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


def flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: q (B, H, T, D), k and v (B, G, T, D) -> (B, T, H, D).

    Soft-capped scores (Gemma 2) have no flash kernel with a backward; they run through fastprice's own attention.
    """
    if options.get("softcap") is not None and module.training:
        return packed_attention(module, query, key, value, attention_mask, **options)
    return _FlashAttention.apply(*(side.transpose(1, 2) for side in (query, key, value))), None


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
    """bitsandbytes' `Linear4bit` with double quantization as `MatMul4Bit` runs it on CUDA, on the meta device: packed
    bytes and statistics, dequantized into a temporary in forward and again in backward."""
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

    # The kernels know the class by its name.
    _Linear4bit.__module__, _Linear4bit.__qualname__ = "bitsandbytes.nn.modules", "Linear4bit"
    quantized = _Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta"
    )
    count = layer.weight.numel()
    packed = nn.Parameter(torch.empty(count // 2, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
    packed.compress_statistics, packed.quant_type = True, "nf4"  # type: ignore[attr-defined]
    quantized.weight = packed
    quantized.bias = layer.bias
    blocks = -(-count // 64)
    for name, size, dtype in (
        ("absmax", blocks, torch.uint8),
        ("nested_absmax", -(-blocks // 256), torch.float32),
        ("code", 16, torch.float32),
        ("nested_code", 256, torch.float32),
        ("offset", 1, torch.float32),
    ):
        quantized.register_buffer(name, torch.empty(size, dtype=dtype, device="meta"))
    return quantized


def give_quant_states(model: nn.Module) -> None:
    """Gives each `linear4bit` of the model the quant state that the kernels read, of its own buffers."""
    for module in model.modules():
        if "nested_absmax" in module._buffers:
            layer: Any = module
            layer.weight.quant_state = SimpleNamespace(
                quant_type="nf4", blocksize=64, dtype=torch.bfloat16, shape=(layer.out_features, layer.in_features),
                absmax=layer.absmax, code=layer.code, offset=layer.offset,
                state2=SimpleNamespace(code=layer.nested_code, absmax=layer.nested_absmax, blocksize=256),
            )  # fmt: skip
