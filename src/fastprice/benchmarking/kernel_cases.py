"""The kernels' work beside that of their peers, on the shapes of real models.

Every kernel is fetched when its case is made: one that is not there is a row that says so. Peers that patch others when
imported (Unsloth) come in a process of their own: `cases(..., unsloth=True)` compares with Unsloth alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprice.benchmarking.cases import DEQUANTIZE_SHAPES, NF4_BYTES, shape_of
from fastprice.benchmarking.comparison import OURS, Comparison
from fastprice.benchmarking.kernel_parts import BANDS, dtype_name, generator_on, ours, with_unsloth
from fastprice.benchmarking.lora_cases import lora_cases, mlp_cases
from fastprice.benchmarking.models import random_nf4_weight
from fastprice.prompts.template import IGNORE

__all__ = ["FAMILIES", "cases"]

FAMILIES = ("dequantize", "lora_linear", "lora_mlp", "loss_head", "small_matmul")
_ROWS = (1, 4, 16)  # of nf4_matmul_small


def cases(
    families: Sequence[str], model: str, tokens: int, device: torch.device, dtype: torch.dtype, *, unsloth: bool
) -> Iterator[Callable[[], Comparison]]:
    """Makers of the comparisons, in order of importance; each allocates only when it is called.

    model: whose layers the LoRA, head and small products are taken from; "nano" takes small dequantizations too.
    tokens: rows of x in the LoRA and head cases.
    """
    makers = {
        "dequantize": _dequantize_cases,
        "lora_linear": lora_cases,
        "lora_mlp": mlp_cases,
        "loss_head": _head_cases,
        "small_matmul": _small_cases,
    }
    for family in families:
        yield from makers[family](model, tokens, device, dtype, unsloth)


def _dequantize_cases(
    model: str, tokens: int, device: torch.device, dtype: torch.dtype, unsloth: bool
) -> Iterator[Callable[[], Comparison]]:
    if device.type == "cpu":
        shapes = [((256, 512), "float32"), ((384, 128), "float32")]
    elif model == "nano":
        shapes = DEQUANTIZE_SHAPES[:3]
    else:
        shapes = DEQUANTIZE_SHAPES
    for shape, name in shapes:
        kind = getattr(torch, name)
        if kind == torch.bfloat16 and dtype != torch.bfloat16 and device.type == "cuda":
            kind = torch.float16  # a card that does not compute in bf16
        yield lambda shape=shape, kind=kind: _dequantize(shape, kind, device, unsloth)  # type: ignore[misc]


def _dequantize(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, unsloth: bool) -> Comparison:
    import bitsandbytes.functional as functional

    packed, state = random_nf4_weight(shape, dtype, device, generator_on(device))
    kernel = ours("ops.nf4_dequantize", "dequantize_nf4")
    functions: dict[str, Callable[[], Any]] = {OURS: lambda: kernel(packed, state)}
    absent: dict[str, str] = {}
    if unsloth:
        with_unsloth(functions, absent, "fast_dequantize", lambda fast: lambda: fast(packed, state))
    else:
        functions["bitsandbytes"] = lambda: functional.dequantize_4bit(packed, state)
    elements = shape[0] * shape[1]
    return Comparison(
        family="dequantize",
        case=f"{shape[0]}x{shape[1]} {dtype_name(dtype)}",
        functions=functions,
        reference=lambda: functional.dequantize_4bit(packed, state),
        tolerance=0.0,
        bytes_moved=elements * (NF4_BYTES + dtype.itemsize),
        flops=0.0,
        absent=absent,
    )


def _head_cases(
    model: str, tokens: int, device: torch.device, dtype: torch.dtype, unsloth: bool
) -> Iterator[Callable[[], Comparison]]:
    if not unsloth:
        for share in (0.02, 1.0):
            yield lambda share=share: _loss_head(model, tokens, share, device, dtype)  # type: ignore[misc]


def _loss_head(model: str, tokens: int, share: float, device: torch.device, dtype: torch.dtype) -> Comparison:
    """Loss and the gradient of the hidden states, from `share` of the positions labeled."""
    shape = shape_of(model)
    generator = generator_on(device)
    hidden = torch.randn(1, tokens, shape.hidden, device=device, dtype=dtype, generator=generator, requires_grad=True)
    weight = torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=dtype, generator=generator) * 0.02
    labels = torch.randint(0, shape.vocabulary, (1, tokens), device=device, generator=generator)
    # Position 0 is never predicted; at least one other carries a label.
    kept = torch.randperm(tokens - 1, device=device, generator=generator)[: max(1, round(share * tokens))] + 1
    labels = torch.full_like(labels, IGNORE).index_copy_(1, kept, labels[:, kept])
    kernel = ours("ops.completion_cross_entropy", "completion_cross_entropy")
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE)[0]

    def run(loss: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def both() -> tuple[Tensor, Tensor]:
            value = loss(hidden)
            return value.reshape(1), torch.autograd.grad(value, hidden)[0]

        return both

    def full(hidden: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden[0], weight).float(), shifted, ignore_index=IGNORE)

    functions: dict[str, Callable[[], Any]] = {
        OURS: run(lambda hidden: kernel(hidden, weight, labels)),
        "full logits": run(full),
    }
    absent: dict[str, str] = {}
    try:
        from trl.trainer.sft_trainer import _chunked_cross_entropy_loss

        functions["trl chunked"] = run(
            lambda hidden: _chunked_cross_entropy_loss(hidden, weight, 256, labels=labels)[0]
        )
    except ImportError as error:
        absent["trl chunked"] = str(error)
    if device.type == "cuda":
        try:
            liger_module = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
            liger = liger_module.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)
            functions["liger"] = run(lambda hidden: liger(weight, hidden[0], shifted))
        except ImportError as error:
            absent["liger"] = str(error)
        compiled = torch.compile(full)
        functions["torch.compile, full logits"] = run(compiled)
    else:
        absent["liger"] = "needs a CUDA device"
        absent["torch.compile, full logits"] = "left out on a CPU: compiling takes longer than all the rest"
    labeled = int((shifted != IGNORE).sum())
    return Comparison(
        family="loss_head",
        case=f"{model}, {tokens} tokens, {share:.0%} labeled",
        functions=functions,
        reference=run(full) if dtype == torch.float32 else _head_truth(hidden, weight, shifted),
        tolerance=2 * BANDS[dtype],
        bytes_moved=2.0 * (weight.numel() + labeled * shape.hidden) * dtype.itemsize,
        flops=4.0 * labeled * weight.numel(),
        absent=absent,
    )


def _head_truth(hidden: Tensor, weight: Tensor, shifted: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
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


def _small_cases(
    model: str, tokens: int, device: torch.device, dtype: torch.dtype, unsloth: bool
) -> Iterator[Callable[[], Comparison]]:
    if not unsloth:
        shape = shape_of(model).linear_layers()["down_proj"]
        for rows in _ROWS:
            yield lambda rows=rows: _small_matmul(rows, shape, device, dtype)  # type: ignore[misc]


def _small_matmul(rows: int, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Comparison:
    import bitsandbytes

    packed, state = random_nf4_weight(shape, dtype, device, generator_on(device))
    x = torch.randn(rows, shape[1], device=device, dtype=dtype, generator=generator_on(device))
    dense = bitsandbytes.functional.dequantize_4bit(packed, state)
    kernel = ours("ops.nf4_matmul_small", "nf4_matmul_small")
    # "auto" would hand the work to bitsandbytes where this kernel has not been shown to be faster.
    backend = "triton" if device.type == "cuda" else "auto"
    return Comparison(
        family="small_matmul",
        case=f"{rows} rows, {shape[0]}x{shape[1]} {dtype_name(dtype)}",
        functions={
            OURS: lambda: kernel(x, packed, state, backend=backend),
            "bitsandbytes": lambda: bitsandbytes.matmul_4bit(x, packed, state),
        },
        reference=lambda: F.linear(x.float(), dense.float()),
        tolerance=2 * BANDS[dtype],
        bytes_moved=shape[0] * shape[1] * NF4_BYTES + rows * sum(shape) * dtype.itemsize,
        flops=2.0 * rows * shape[0] * shape[1],
    )
