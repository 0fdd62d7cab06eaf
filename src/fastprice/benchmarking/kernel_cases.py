"""The kernels beside their peers, on the shapes of real models; LoRA layers are in lora_kernel_cases.py.

Peers that patch others when they are imported (Unsloth) run in a process of their own: with `unsloth=True` the cases
compare with Unsloth alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    dtype_name,
    seeded_generator,
)
from fastprice.benchmarking.lora_kernel_cases import linear_cases, mlp_cases
from fastprice.benchmarking.norm_kernel_cases import norm_cases, rotary_cases
from fastprice.benchmarking.peer_kernels import liger_loss, trl_chunked_loss, unsloth_kernel
from fastprice.benchmarking.random_models import random_nf4_weight
from fastprice.benchmarking.workload import NF4_BYTES, dequantize_shapes, linear_shapes, shape_of
from fastprice.prompts.template import IGNORE
from fastprice_kernels.ops.completion_cross_entropy import completion_cross_entropy
from fastprice_kernels.ops.nf4_dequantize import dequantize_nf4
from fastprice_kernels.ops.nf4_matmul_small import nf4_matmul_small

__all__ = ["kernel_cases"]

_SMALL_ROWS = (1, 4, 16)  # of x, for nf4_matmul_small
_LOSS_WAYS = (OURS, "full logits", "trl chunked", "liger", "torch.compile, full logits")

Cases = Iterator[KernelCase]


def kernel_cases(families: Sequence[str], settings: KernelSettings) -> Cases:
    """The cases of `families`, in order; each allocates its tensors only when it is made."""
    makers: dict[str, Callable[[KernelSettings], Cases]] = {
        "dequantize": _dequantize_cases,
        "lora_linear": linear_cases,
        "lora_mlp": mlp_cases,
        "loss_head": _loss_cases,
        "norm": norm_cases,
        "rotary": rotary_cases,
        "small_matmul": _small_cases,
    }
    for family in families:
        yield from makers[family](settings)


def _dequantize_cases(settings: KernelSettings) -> Cases:
    shapes: Sequence[tuple[tuple[int, int], str]]
    if settings.device.type == "cpu":
        shapes = [((256, 512), "float32"), ((384, 128), "float32")]
    elif settings.model == "nano":
        shapes = dequantize_shapes()[:3]
    else:
        shapes = dequantize_shapes()
    for shape, name in shapes:
        dtype = getattr(torch, name)
        if dtype == torch.bfloat16 and settings.dtype != torch.bfloat16 and settings.device.type == "cuda":
            dtype = torch.float16  # a card that does not compute in bf16
        name = f"{shape[0]}x{shape[1]} {dtype_name(dtype)}"
        ways = (OURS, "unsloth" if settings.unsloth else "bitsandbytes")
        yield KernelCase("dequantize", name, ways, partial(_dequantize, shape, dtype, settings))


def _dequantize(shape: tuple[int, int], dtype: torch.dtype, settings: KernelSettings) -> Comparison:
    import bitsandbytes.functional as functional

    packed, state = random_nf4_weight(shape, dtype, settings.device, seeded_generator(settings.device))
    functions: dict[str, Callable[[], Any]] = {OURS: lambda: dequantize_nf4(packed, state)}
    absent: dict[str, str] = {}
    if settings.unsloth:
        try:
            fast_dequantize = unsloth_kernel("fast_dequantize")
            functions["unsloth"] = lambda: fast_dequantize(packed, state)
        except ImportError as error:
            absent["unsloth"] = str(error)
    else:
        functions["bitsandbytes"] = lambda: functional.dequantize_4bit(packed, state)
    elements = shape[0] * shape[1]
    return Comparison(
        functions=functions,
        reference=lambda: functional.dequantize_4bit(packed, state),
        tolerance=0.0,
        bytes_moved=elements * (NF4_BYTES + dtype.itemsize),
        flops=0.0,
        absent=absent,
    )


def _loss_cases(settings: KernelSettings) -> Cases:
    if not settings.unsloth:
        for share in (0.02, 1.0):
            name = f"{settings.model}, {settings.tokens} tokens, {share:.0%} labeled"
            yield KernelCase("loss_head", name, _LOSS_WAYS, partial(_loss_head, share, settings))


def _loss_head(share: float, settings: KernelSettings) -> Comparison:
    """Loss and the gradient of the hidden states, with labels at `share` of the positions."""
    shape, device, dtype, tokens = shape_of(settings.model), settings.device, settings.dtype, settings.tokens
    generator = seeded_generator(device)
    hidden = torch.randn(1, tokens, shape.width, device=device, dtype=dtype, generator=generator, requires_grad=True)
    weight = torch.randn(shape.vocabulary, shape.width, device=device, dtype=dtype, generator=generator) * 0.02
    labels = torch.randint(0, shape.vocabulary, (1, tokens), device=device, generator=generator)
    # Position 0 is never predicted; at least one other carries a label.
    kept = torch.randperm(tokens - 1, device=device, generator=generator)[: max(1, round(share * tokens))] + 1
    labels = torch.full_like(labels, IGNORE).index_copy_(1, kept, labels[:, kept])
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE)[0]

    def run(loss: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def both() -> tuple[Tensor, Tensor]:
            value = loss(hidden)
            return value.reshape(1), torch.autograd.grad(value, hidden)[0]

        return both

    def full_logits(hidden: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden[0], weight).float(), shifted, ignore_index=IGNORE)

    functions: dict[str, Callable[[], Any]] = {
        OURS: run(lambda hidden: completion_cross_entropy(hidden, weight, labels)),
        "full logits": run(full_logits),
    }
    absent: dict[str, str] = {}
    try:
        chunked = trl_chunked_loss()
        functions["trl chunked"] = run(lambda hidden: chunked(hidden, weight, 256, labels=labels)[0])
    except ImportError as error:
        absent["trl chunked"] = str(error)
    if device.type == "cuda":
        try:
            liger = liger_loss(IGNORE)
            functions["liger"] = run(lambda hidden: liger(weight, hidden[0], shifted))
        except ImportError as error:
            absent["liger"] = str(error)
        functions["torch.compile, full logits"] = run(torch.compile(full_logits))
    else:
        absent["liger"] = "needs a CUDA device"
        absent["torch.compile, full logits"] = "not run on a CPU: compiling takes longer than all other cases"
    labeled = int((shifted != IGNORE).sum())
    return Comparison(
        functions=functions,
        reference=run(full_logits) if dtype == torch.float32 else _loss_in_fp32(hidden, weight, shifted),
        tolerance=2 * ROUNDING[dtype],
        bytes_moved=2.0 * (weight.numel() + labeled * shape.width) * dtype.itemsize,
        flops=4.0 * labeled * weight.numel(),
        absent=absent,
    )


def _loss_in_fp32(hidden: Tensor, weight: Tensor, shifted: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same in fp32, a few hundred positions at a time: full logits in fp32 may not fit."""

    def both() -> tuple[Tensor, Tensor]:
        rows = (shifted != IGNORE).nonzero()[:, 0]
        wide = weight.float()
        total = torch.zeros((), device=weight.device)
        gradient = torch.zeros_like(hidden)
        for chunk in rows.split(256):
            leaf = hidden.detach()[0, chunk].float().requires_grad_()
            loss = F.cross_entropy(F.linear(leaf, wide), shifted[chunk], reduction="sum") / len(rows)
            gradient[0, chunk] = torch.autograd.grad(loss, leaf)[0].to(hidden.dtype)
            total += loss.detach()
        return total.reshape(1), gradient

    return both


def _small_cases(settings: KernelSettings) -> Cases:
    if not settings.unsloth:
        for rows in _SMALL_ROWS:
            n, k = linear_shapes(shape_of(settings.model))["down_proj"]
            name = f"{rows} rows, {n}x{k} {dtype_name(settings.dtype)}"
            yield KernelCase("small_matmul", name, (OURS, "bitsandbytes"), partial(_small_matmul, rows, settings))


def _small_matmul(rows: int, settings: KernelSettings) -> Comparison:
    import bitsandbytes

    shape = linear_shapes(shape_of(settings.model))["down_proj"]
    device, dtype = settings.device, settings.dtype
    packed, state = random_nf4_weight(shape, dtype, device, seeded_generator(device))
    x = torch.randn(rows, shape[1], device=device, dtype=dtype, generator=seeded_generator(device))
    dense = bitsandbytes.functional.dequantize_4bit(packed, state)
    # "auto" would leave the work to bitsandbytes where this kernel has not been shown to be faster.
    backend = "triton" if device.type == "cuda" else "auto"
    return Comparison(
        functions={
            OURS: lambda: nf4_matmul_small(x, packed, state, backend=backend),
            "bitsandbytes": lambda: bitsandbytes.matmul_4bit(x, packed, state),
        },
        reference=lambda: F.linear(x.float(), dense.float()),
        tolerance=2 * ROUNDING[dtype],
        bytes_moved=shape[0] * shape[1] * NF4_BYTES + rows * sum(shape) * dtype.itemsize,
        flops=2.0 * rows * shape[0] * shape[1],
    )
