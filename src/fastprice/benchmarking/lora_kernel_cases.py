"""LoRA layers, a linear layer and the gated MLP, forward and backward, beside PEFT's and Unsloth's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprice.benchmarking.kernel_comparison import (
    OURS,
    ROUNDING,
    Comparison,
    KernelCase,
    KernelSettings,
    seeded_generator,
)
from fastprice.benchmarking.peer_kernels import unsloth_kernel
from fastprice.benchmarking.random_models import random_nf4_weight
from fastprice.benchmarking.workload import NF4_BYTES, linear_shapes, shape_of
from fastprice_kernels.ops.lora import Projection, lora_linear
from fastprice_kernels.ops.lora_mlp import lora_mlp
from fastprice_kernels.reference import lora as reference

__all__ = ["linear_cases", "mlp_cases"]

_RANK = 16
_SCALE = 2.0  # of the adapters: alpha / rank


@dataclass(frozen=True)
class _Layer:
    """A frozen NF4 weight (N, K), packed and dequantized, with an adapter in fp32, as in training."""

    packed: Tensor
    state: Any
    dense: Tensor
    a: Tensor
    b: Tensor


def linear_cases(settings: KernelSettings) -> Iterator[KernelCase]:
    """The cases of single linear layers, as `kernel_cases.kernel_cases` gives them."""
    for name in ("down_proj", "q_proj"):
        for backward in (False, True):
            if settings.unsloth and backward:
                continue  # its backward is part of whole layers, which the training steps compare
            n, k = linear_shapes(shape_of(settings.model))[name]
            case = f"{settings.model} {name} {n}x{k}, {settings.tokens} tokens, r={_RANK}, {_passes(backward)}"
            ways = (OURS, "fastprice augmented", "unsloth" if settings.unsloth else "peft")
            yield KernelCase("lora_linear", case, ways, partial(_linear, name, backward, settings))


def mlp_cases(settings: KernelSettings) -> Iterator[KernelCase]:
    """The cases of the whole MLP, likewise."""
    if not settings.unsloth:
        for backward in (True, False):
            case = f"{settings.model}, {settings.tokens} tokens, r={_RANK}, {_passes(backward)}"
            yield KernelCase("lora_mlp", case, (OURS, "peft"), partial(_mlp, backward, settings))


def _linear(name: str, backward: bool, settings: KernelSettings) -> Comparison:
    n, k = linear_shapes(shape_of(settings.model))[name]
    tokens, dtype = settings.tokens, settings.dtype
    layer = _lora_layer((n, k), settings)
    x, dy = _inputs(k, n, settings)

    def ours(augmented: bool) -> Callable[[Tensor], Tensor]:
        return lambda x: lora_linear(
            x, layer.packed, layer.a, layer.b, _SCALE, quant_state=layer.state, augmented=augmented
        )

    def truth(x: Tensor) -> Tensor:
        return reference.lora_linear(x.float(), layer.dense.float(), layer.a, layer.b, _SCALE)

    functions: dict[str, Callable[[], Any]] = {
        OURS: _run(ours(False), x, [layer.a, layer.b], dy, backward),
        "fastprice augmented": _run(ours(True), x, [layer.a, layer.b], dy, backward),
    }
    absent: dict[str, str] = {}
    if settings.unsloth:
        a, b, flat = layer.a.detach().to(dtype), layer.b.detach().to(dtype), x.detach()
        try:
            matmul_lora = unsloth_kernel("matmul_lora")
            functions["unsloth"] = lambda: matmul_lora(flat, layer.packed.t(), layer.state, a, b, _SCALE)
        except ImportError as error:
            absent["unsloth"] = str(error)
    else:
        peft, adapter = _peft_linear(layer, (n, k), dtype)
        functions["peft"] = _run(peft, x, adapter, dy, backward)
    return Comparison(
        functions=functions,
        reference=_run(truth, x, [layer.a, layer.b], dy, backward),
        tolerance=2 * ROUNDING[dtype],
        bytes_moved=_bytes_moved(n * k, n + k, backward, settings),
        flops=_flops(n * k, n + k, backward, tokens),
        absent=absent,
    )


def _mlp(backward: bool, settings: KernelSettings) -> Comparison:
    shape = shape_of(settings.model)
    shapes = [linear_shapes(shape)[name] for name in ("gate_proj", "up_proj", "down_proj")]
    layers = [_lora_layer(each, settings) for each in shapes]
    x, dy = _inputs(shape.width, shape.width, settings)
    trained = [tensor for layer in layers for tensor in (layer.a, layer.b)]

    def ours(x: Tensor) -> Tensor:
        gate, up, down = (Projection(each.packed, each.a, each.b, _SCALE, None, each.state) for each in layers)
        return lora_mlp(x, gate, up, down)

    def truth(x: Tensor) -> Tensor:
        gate, up, down = ((each.dense.float(), each.a, each.b, _SCALE) for each in layers)
        return reference.lora_mlp(x.float(), gate, up, down, "silu")

    stock = [_peft_linear(layer, each, settings.dtype) for layer, each in zip(layers, shapes, strict=True)]

    def peft(x: Tensor) -> Tensor:
        gate, up, down = (layer for layer, _ in stock)
        return down(F.silu(gate(x)) * up(x))

    weights, widths = sum(n * k for n, k in shapes), sum(n + k for n, k in shapes)
    return Comparison(
        functions={
            OURS: _run(ours, x, trained, dy, backward),
            "peft": _run(peft, x, [parameter for _, pair in stock for parameter in pair], dy, backward),
        },
        reference=_run(truth, x, trained, dy, backward),
        tolerance=3 * ROUNDING[settings.dtype],
        bytes_moved=_bytes_moved(weights, widths, backward, settings),
        flops=_flops(weights, widths, backward, settings.tokens),
    )


def _passes(backward: bool) -> str:
    return "forward and backward" if backward else "forward"


def _bytes_moved(weights: int, widths: int, backward: bool, settings: KernelSettings) -> float:
    """Bytes of the packed weights and of all inputs and outputs, `widths` wide together, a pass; backward is two."""
    return (3 if backward else 1) * (weights * NF4_BYTES + settings.tokens * widths * settings.dtype.itemsize)


def _flops(weights: int, widths: int, backward: bool, tokens: int) -> float:
    forward = 2.0 * tokens * weights + 2.0 * tokens * _RANK * widths
    # The frozen weight has no gradient; an adapter's backward pass is twice its forward pass.
    return forward + (2.0 * tokens * weights + 4.0 * tokens * _RANK * widths if backward else 0.0)


def _lora_layer(shape: tuple[int, int], settings: KernelSettings) -> _Layer:
    import bitsandbytes.functional as functional

    generator = seeded_generator(settings.device)
    packed, state = random_nf4_weight(shape, settings.dtype, settings.device, generator)
    n, k = shape
    a = torch.randn(_RANK, k, device=settings.device, generator=generator) / math.sqrt(k)
    b = torch.randn(n, _RANK, device=settings.device, generator=generator) / math.sqrt(_RANK)
    return _Layer(
        packed=packed,
        state=state,
        dense=functional.dequantize_4bit(packed, state),
        a=a.requires_grad_(),
        b=b.requires_grad_(),
    )


def _inputs(inputs: int, outputs: int, settings: KernelSettings) -> tuple[Tensor, Tensor]:
    """x (tokens, inputs) and the gradient of y (tokens, outputs)."""
    device, dtype, generator = settings.device, settings.dtype, seeded_generator(settings.device)
    x = torch.randn(settings.tokens, inputs, device=device, dtype=dtype, generator=generator, requires_grad=True)
    return x, torch.randn(settings.tokens, outputs, device=device, dtype=dtype, generator=generator)


def _run(
    layer: Callable[[Tensor], Tensor], x: Tensor, trained: Sequence[Tensor], dy: Tensor, backward: bool
) -> Callable[[], Any]:
    """The forward pass alone, without a graph; or forward and backward: output and all gradients."""
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return forward

    def both() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *trained], dy.to(y.dtype))]

    return both


def _peft_linear(
    layer: _Layer, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """PEFT's own LoRA layer over bitsandbytes' own linear layer, under autocast, and its A and B."""
    import bitsandbytes
    from peft import LoraConfig, inject_adapter_in_model

    n, k = shape
    linear = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    linear.weight = bitsandbytes.nn.Params4bit(
        layer.packed, requires_grad=False, quant_state=layer.state, quant_type="nf4", module=linear, bnb_quantized=True
    )
    linear.quant_state = layer.state
    linear.support_avx512bf16_for_cpu = False
    holder: Any = torch.nn.ModuleDict({"proj": linear})
    holder.is_loaded_in_4bit = True  # by which PEFT chooses its 4-bit layer
    inject_adapter_in_model(LoraConfig(r=_RANK, lora_alpha=_SCALE * _RANK, target_modules=["proj"]), holder)
    adapted = holder["proj"]
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(layer.a)
        b.copy_(layer.b)
    device = layer.packed.device.type

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            return adapted(x)  # type: ignore[no-any-return]

    return forward, [a, b]
