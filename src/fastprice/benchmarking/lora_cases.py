"""LoRA layers: a linear layer and the gated MLP, forward and backward, beside PEFT's and Unsloth's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprice.benchmarking.cases import NF4_BYTES, shape_of
from fastprice.benchmarking.comparison import OURS, Comparison
from fastprice.benchmarking.kernel_parts import BANDS, generator_on, ours, with_unsloth
from fastprice.benchmarking.models import random_nf4_weight

__all__ = ["lora_cases", "mlp_cases"]


def lora_cases(
    model: str, tokens: int, device: torch.device, dtype: torch.dtype, unsloth: bool
) -> Iterator[Callable[[], Comparison]]:
    layers = shape_of(model).linear_layers()
    for layer in ("down_proj", "q_proj"):
        for backward in (False, True):
            if unsloth and backward:
                continue  # its backward lives in whole layers; the training steps compare those
            yield lambda layer=layer, backward=backward: _lora_linear(  # type: ignore[misc]
                f"{model} {layer}", layers[layer], tokens, device, dtype, backward, unsloth
            )


def _lora_linear(
    name: str,
    shape: tuple[int, int],
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool,
    unsloth: bool,
    rank: int = 16,
) -> Comparison:
    part = _lora_layer(shape, rank, dtype, device)
    x, dy = _inputs(tokens, shape[1], shape[0], dtype, device)
    linear = ours("ops.lora", "lora_linear")

    def own(augmented: bool) -> Callable[[Tensor], Tensor]:
        return lambda x: linear(x, part.packed, part.a, part.b, 2.0, quant_state=part.state, augmented=augmented)

    def truth(x: Tensor) -> Tensor:
        reference = ours("reference.lora", "lora_linear")
        return reference(x.float(), part.dense.float(), part.a, part.b, 2.0)  # type: ignore[no-any-return]

    functions: dict[str, Callable[[], Any]] = {
        OURS: _run(own(False), x, [part.a, part.b], dy, backward),
        "fastprice augmented": _run(own(True), x, [part.a, part.b], dy, backward),
    }
    absent: dict[str, str] = {}
    if unsloth:
        a, b = part.a.detach().to(dtype), part.b.detach().to(dtype)
        flat = x.detach()
        with_unsloth(
            functions,
            absent,
            "matmul_lora",
            lambda product: lambda: product(flat, part.packed.t(), part.state, a, b, 2.0),
        )
    else:
        stock, adapter = _peft_linear(part, shape, rank, dtype)
        functions["peft"] = _run(stock, x, adapter, dy, backward)
    n, k = shape
    products = 2.0 * tokens * n * k + 2.0 * tokens * rank * (n + k)
    flops = products + (2.0 * tokens * n * k + 4.0 * tokens * rank * (n + k) if backward else 0.0)
    passes = 3 if backward else 1
    return Comparison(
        family="lora_linear",
        case=f"{name} {n}x{k}, {tokens} tokens, r={rank}, {'forward and backward' if backward else 'forward'}",
        functions=functions,
        reference=_run(truth, x, [part.a, part.b], dy, backward),
        tolerance=2 * BANDS[dtype],
        bytes_moved=passes * (n * k * NF4_BYTES + tokens * (n + k) * dtype.itemsize),
        flops=flops,
        absent=absent,
    )


def mlp_cases(
    model: str, tokens: int, device: torch.device, dtype: torch.dtype, unsloth: bool
) -> Iterator[Callable[[], Comparison]]:
    if not unsloth:
        for backward in (True, False):
            yield lambda backward=backward: _lora_mlp(model, tokens, device, dtype, backward)  # type: ignore[misc]


def _lora_mlp(
    model: str, tokens: int, device: torch.device, dtype: torch.dtype, backward: bool, rank: int = 16
) -> Comparison:
    shapes = shape_of(model).linear_layers()
    names = ("gate_proj", "up_proj", "down_proj")
    parts = [_lora_layer(shapes[name], rank, dtype, device) for name in names]
    width = shape_of(model).hidden
    x, dy = _inputs(tokens, width, width, dtype, device)
    trained = [each for part in parts for each in (part.a, part.b)]
    mlp, projection = ours("ops.lora", "lora_mlp"), ours("ops.lora", "Projection")

    def own(x: Tensor) -> Tensor:
        three = [projection(part.packed, part.a, part.b, 2.0, None, part.state) for part in parts]
        return mlp(x, *three)  # type: ignore[no-any-return]

    def truth(x: Tensor) -> Tensor:
        reference = ours("reference.lora", "lora_mlp")
        return reference(x.float(), *[(p.dense.float(), p.a, p.b, 2.0) for p in parts], "silu")  # type: ignore[no-any-return]

    stock = [_peft_linear(part, shapes[name], rank, dtype) for part, name in zip(parts, names, strict=True)]

    def peft(x: Tensor) -> Tensor:
        gate, up, down = (layer for layer, _ in stock)
        return down(F.silu(gate(x)) * up(x))

    adapter = [parameter for _, pair in stock for parameter in pair]
    weights = sum(n * k for n, k in (shapes[name] for name in names))
    around = sum(n + k for n, k in (shapes[name] for name in names))
    flops = 2.0 * tokens * weights + 2.0 * tokens * rank * around
    return Comparison(
        family="lora_mlp",
        case=f"{model}, {tokens} tokens, r={rank}, {'forward and backward' if backward else 'forward'}",
        functions={
            OURS: _run(own, x, trained, dy, backward),
            "peft": _run(peft, x, adapter, dy, backward),
        },
        reference=_run(truth, x, trained, dy, backward),
        tolerance=3 * BANDS[dtype],
        bytes_moved=(3 if backward else 1) * (weights * NF4_BYTES + tokens * around * dtype.itemsize),
        flops=flops + (2.0 * tokens * weights + 4.0 * tokens * rank * around if backward else 0.0),
    )


def _lora_layer(shape: tuple[int, int], rank: int, dtype: torch.dtype, device: torch.device) -> SimpleNamespace:
    """A frozen weight, packed and dense, with an adapter in fp32, as training keeps it."""
    import bitsandbytes.functional as functional

    generator = generator_on(device)
    packed, state = random_nf4_weight(shape, dtype, device, generator)
    n, k = shape
    a = torch.randn(rank, k, device=device, generator=generator) / math.sqrt(k)
    b = torch.randn(n, rank, device=device, generator=generator) / math.sqrt(rank)
    return SimpleNamespace(
        packed=packed,
        state=state,
        dense=functional.dequantize_4bit(packed, state),
        a=a.requires_grad_(),
        b=b.requires_grad_(),
    )


def _inputs(tokens: int, width: int, out: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = generator_on(device)
    x = torch.randn(tokens, width, device=device, dtype=dtype, generator=generator, requires_grad=True)
    return x, torch.randn(tokens, out, device=device, dtype=dtype, generator=generator)


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
    part: SimpleNamespace, shape: tuple[int, int], rank: int, dtype: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """PEFT's own LoRA layer over bitsandbytes' own linear layer, under autocast, and its A and B."""
    import bitsandbytes
    from peft import LoraConfig, inject_adapter_in_model

    n, k = shape
    linear = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    linear.weight = bitsandbytes.nn.Params4bit(
        part.packed, requires_grad=False, quant_state=part.state, quant_type="nf4", module=linear, bnb_quantized=True
    )
    linear.quant_state = part.state
    linear.support_avx512bf16_for_cpu = False
    holder: Any = torch.nn.ModuleDict({"proj": linear})
    holder.is_loaded_in_4bit = True  # what PEFT goes by
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["proj"]), holder)
    layer = holder["proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(part.a)
        b.copy_(part.b)
    device = part.packed.device.type

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            return layer(x)  # type: ignore[no-any-return]

    return forward, [a, b]
