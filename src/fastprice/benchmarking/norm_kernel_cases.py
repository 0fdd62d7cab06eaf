"""Norms with the residual addition before them, and rotary embeddings, beside their peers, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
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
from fastprice.benchmarking.peer_kernels import liger_function
from fastprice.benchmarking.workload import shape_of
from fastprice_kernels import reference
from fastprice_kernels.ops.norms import add_norm
from fastprice_kernels.ops.rotary import rotate_

__all__ = ["norm_cases", "rotary_cases"]

_EPS = 1e-5
_WAYS = (OURS, "eager", "liger", "torch.compile")

Function = Callable[[], Any]
Way = Callable[[Tensor, Tensor], Any]  # the forward pass of two tensors


def norm_cases(settings: KernelSettings) -> Iterator[KernelCase]:
    if not settings.unsloth:
        name = f"{settings.model}, {settings.tokens} tokens {dtype_name(settings.dtype)}"
        yield KernelCase("norm", name, _WAYS, partial(_add_norm, settings))


def rotary_cases(settings: KernelSettings) -> Iterator[KernelCase]:
    if not settings.unsloth:
        name = f"{settings.model}, {settings.tokens} tokens {dtype_name(settings.dtype)}"
        yield KernelCase("rotary", name, _WAYS, partial(_rotary, settings))


def _add_norm(settings: KernelSettings) -> Comparison:
    """s = x + r and norm(s), and the gradient of x from those of both; x and r are (T, h)."""
    width, tokens, device, dtype = shape_of(settings.model).width, settings.tokens, settings.device, settings.dtype
    generator = seeded_generator(device)
    x, r, dtotal, dy = (torch.randn(tokens, width, device=device, dtype=dtype, generator=generator) for _ in range(4))
    weight = torch.rand(width, device=device, dtype=dtype, generator=generator) + 0.5
    x.requires_grad_()

    def eager(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """As transformers' LlamaRMSNorm writes it."""
        total = x + r
        wide = total.float()
        return total, weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)).to(dtype)

    def both(function: Way) -> Function:
        def run() -> tuple[Tensor, ...]:
            total, y = function(x, r)
            return total, y, torch.autograd.grad((total, y), x, (dtotal, dy))[0]

        return run

    def truth() -> tuple[Tensor, ...]:
        total = (x + r).detach().double().requires_grad_()
        y = reference.norm(total, weight.double(), _EPS, "rms")
        return total.detach(), y.detach(), torch.autograd.grad(y, total, dy.double())[0] + dtotal.double()

    def liger(rms_norm: Callable[..., Tensor]) -> Way:
        def way(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            total = x + r
            return total, rms_norm(total, weight, _EPS, 0.0, "llama", False)

        return way

    ways, absent = _ways(settings, lambda x, r: add_norm(x, r, weight, _EPS), eager, "liger_rms_norm", liger)
    functions = {name: both(way) for name, way in ways.items()}
    # Forward 2 read and 2 written, backward 3 read and 1 written.
    return _comparison(functions, truth, absent, settings, bytes_moved=8.0 * tokens * width * dtype.itemsize)


def _rotary(settings: KernelSettings) -> Comparison:
    """q and k rotated, and the gradients of both; q is (1, H, T, D), k (1, G, T, D), views of projections."""
    shape, tokens, device, dtype = shape_of(settings.model), settings.tokens, settings.device, settings.dtype
    generator = seeded_generator(device)

    def draw(heads: int) -> Tensor:
        flat = torch.randn(1, tokens, heads, shape.head_dim, device=device, dtype=dtype, generator=generator)
        return flat.transpose(1, 2)

    q, k, dq, dk = draw(shape.heads), draw(shape.key_heads), draw(shape.heads), draw(shape.key_heads)
    q.requires_grad_()
    k.requires_grad_()
    angles = torch.rand(1, tokens, shape.head_dim // 2, device=device, generator=generator) * 6
    cos, sin = (torch.cat([table, table], -1).to(dtype) for table in (angles.cos(), angles.sin()))

    def eager(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference.rotate(each, cos, sin, "half") for each in (q, k))

    def both(function: Way) -> Function:
        def run() -> tuple[Tensor, ...]:
            # Copies, which in-place ways may overwrite: as much work for all.
            results = function(q * 1, k * 1)
            return (*results, *torch.autograd.grad(results, (q, k), (dq.clone(), dk.clone())))

        return run

    def truth() -> tuple[Tensor, ...]:
        wide = [each.detach().double().requires_grad_() for each in (q, k)]
        results = [reference.rotate(each, cos.double(), sin.double(), "half") for each in wide]
        return (*results, *torch.autograd.grad(results, wide, (dq.double(), dk.double())))

    def liger(rope: Callable[..., Any]) -> Way:
        return lambda q, k: rope(q, k, cos, sin)

    ways, absent = _ways(settings, lambda q, k: rotate_(q, k, cos, sin), eager, "liger_rope", liger)
    functions = {name: both(way) for name, way in ways.items()}
    # Read and written once each way, and the copies.
    elements = tokens * (shape.query_width + shape.key_width)
    return _comparison(functions, truth, absent, settings, bytes_moved=8.0 * elements * dtype.itemsize)


def _ways(
    settings: KernelSettings, ours: Way, eager: Way, liger: str, call_liger: Callable[[Callable[..., Any]], Way]
) -> tuple[dict[str, Way], dict[str, str]]:
    """The ways that run here, and why the others do not; `call_liger` makes a way of Liger's function of that name."""
    ways = {OURS: ours, "eager": eager}
    if not _on_cuda(settings):
        reason = "not run on a CPU: compiling takes longer than all other cases"
        return ways, {"liger": "needs a CUDA device", "torch.compile": reason}
    ways["torch.compile"] = torch.compile(eager)
    try:
        ways["liger"] = call_liger(liger_function(liger))
    except ImportError as error:
        return ways, {"liger": str(error)}
    return ways, {}


def _on_cuda(settings: KernelSettings) -> bool:
    return settings.device.type == "cuda"


def _comparison(
    functions: dict[str, Function], truth: Function, absent: dict[str, str], settings: KernelSettings, *,
    bytes_moved: float,
) -> Comparison:  # fmt: skip
    return Comparison(
        functions=functions,
        reference=truth,
        tolerance=3 * ROUNDING[settings.dtype],
        bytes_moved=bytes_moved,
        flops=0.0,
        absent=absent,
    )
