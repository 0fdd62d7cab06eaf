"""Linear layers with a frozen weight and a LoRA adapter, one at a time or several on one input, and the gated MLP.

A projection computes y = x W^T + s (x A^T) B^T (+ bias) with W frozen, NF4 or 16-bit (Hu et al. 2021, LoRA; Dettmers et
al. 2023, QLoRA); lora_products.py has the products of both directions and their costs. For the backward a projection
saves x and t = s x A^T; W is dequantized when it is needed and freed at once. The backward is written by hand so that
nothing of width N is saved, which is Unsloth's idea. Projections of one x (q, k and v; gate and up) share x A^T and two
products of the backward, with their A stacked to (R, K). The MLP is in lora_mlp.py.

Not supported, and refused: a gradient of W, gradients of gradients, a second backward through one graph of `lora_mlp`.

Shapes: T tokens, K input width, N output width, r rank, R the ranks of all projections of one x.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprice_kernels.ops.lora_products import LORA_A, LORA_B, PARTS, Projection, ProjectionGroup, unflatten

__all__ = [
    "Projection",
    "ProjectionGroup",
    "apply_projections",
    "compute_input",
    "in_backward",
    "lora_linear",
    "lora_projections",
    "lora_qkv",
    "plain_arithmetic",
    "prepare",
    "save",
    "saved",
]

_NOTHING = nullcontext()


def plain_arithmetic(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: the dtype is decided before, and in a backward autocast would cast what the forward did not."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


def in_backward() -> bool:
    """Whether a backward runs, of which recomputation is a part."""
    # torch.utils.checkpoint reads the same; there is no public function.
    return not torch.compiler.is_compiling() and bool(torch._C._current_graph_task_id() != -1)


def save(ctx: Any, flat: Sequence[Any], *tensors: Tensor) -> None:
    """Saves the projections and `tensors` for the backward.

    Adapters go through `save_for_backward`, which detects an optimizer step in between. Frozen weights do not: hooks
    that offload saved tensors to the host would offload them too, and offloaded weights may get another storage.
    """
    adapters = [i for i, part in enumerate(flat) if i % PARTS in (LORA_A, LORA_B) and part is not None]
    ctx.save_for_backward(*(flat[i] for i in adapters), *tensors)
    ctx.adapters, ctx.frozen = adapters, [None if i in adapters else part for i, part in enumerate(flat)]


def saved(ctx: Any) -> tuple[list[Any], Sequence[Tensor]]:
    """What `save` saved."""
    flat, found = list(ctx.frozen), ctx.saved_tensors
    for i, part in zip(ctx.adapters, found, strict=False):
        flat[i] = part
    return flat, found[len(ctx.adapters) :]


class _Projections(torch.autograd.Function):
    """From x (T, K) and the flattened projections, each y (T, N); `group`: of them, or None under a compiler."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: ProjectionGroup | None, keep_dense: bool, augmented: bool, *flat: Any
    ) -> tuple[Tensor, ...]:
        used = ProjectionGroup(unflatten(flat)) if group is None else group
        augmented = augmented and used.rank > 0
        with plain_arithmetic(x):
            a, b = used.adapters(x.dtype, in_backward=True)
            ys, x, t, weights = used.forward(x, a, b, augmented, keep=keep_dense and used.resident is None)
        save(ctx, flat, x, t, *weights)
        ctx.group, ctx.augmented = group, augmented
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        flat, (x, t, *weights) = saved(ctx)
        group = ProjectionGroup(unflatten(flat)) if ctx.group is None else ctx.group
        with plain_arithmetic(x):
            a, b = group.adapters(x.dtype, in_backward=True)
            dx = None
            if ctx.needs_input_grad[0]:
                dx, u = group.input_gradient(dys, a, b, ctx.augmented, weights)
            else:
                u = group.adapter_inner(dys, b)
            gradients = group.parameter_gradients(dys, u, x, t, ctx.needs_input_grad[4:])
        return dx, None, None, None, *gradients


def apply_projections(
    x: Tensor, group: ProjectionGroup, *, keep_dense: bool = False, augmented: bool = False
) -> tuple[Tensor, ...]:
    """`lora_projections` of an x (..., K) in the dtype of the products."""
    names = ["the projection"] if len(group.projections) == 1 else [f"projection {i}" for i in range(len(group.rows))]
    group.check(x, names)
    kept = prepare(x, group)
    ys = _Projections.apply(x.reshape(-1, x.shape[-1]), group if kept else None, keep_dense, augmented, *group.flat)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def prepare(x: Tensor, *groups: ProjectionGroup) -> bool:
    """Casts the adapters, where gradient mode is still that of the caller; False under a compiler, which traces it."""
    if torch.compiler.is_compiling():
        return False
    backward = in_backward()
    for group in groups:
        group.adapters(x.dtype, in_backward=backward)
    return True


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    *,
    bias: Tensor | None = None,
    quant_state: Any = None,
    keep_dense: bool = False,
    augmented: bool = False,
) -> Tensor:
    """`x W^T + scale (x A^T) B^T + bias`, x (..., K), result (..., N) in the dtype of x.

    Args:
        weight, lora_a, lora_b, scale, bias, quant_state: see `Projection`.
        keep_dense: save the dequantized W for the backward. Under activation checkpointing, where it exists from the
            recomputation of a layer to its backward, that costs one layer's weights, and a step dequantizes twice
            instead of three times; without checkpointing it costs the weights of all layers.
        augmented: the augmented form of the products (see lora_products.py).

    Under autocast everything is cast to the autocast dtype, as `torch.nn.Linear` does.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a weight that requires a gradient.
    """
    projection = Projection(weight, lora_a, lora_b, scale, bias, quant_state)
    return lora_projections(x, [projection], keep_dense=keep_dense, augmented=augmented)[0]


def lora_qkv(
    x: Tensor, q: Projection, k: Projection, v: Projection, *, keep_dense: bool = False, augmented: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections of an attention layer's input, with one product x A^T for all three.

    x (..., K); the results (..., N_q), (..., N_k), (..., N_v). Options and errors as for `lora_linear`.
    """
    return lora_projections(x, [q, k, v], keep_dense=keep_dense, augmented=augmented)  # type: ignore[return-value]


def lora_projections(
    x: Tensor, projections: Sequence[Projection], *, keep_dense: bool = False, augmented: bool = False
) -> tuple[Tensor, ...]:
    """Any number of projections of one x (..., K). Options and errors as for `lora_linear`."""
    return apply_projections(compute_input(x), ProjectionGroup(projections), keep_dense=keep_dense, augmented=augmented)


def compute_input(x: Tensor) -> Tensor:
    """x in the dtype in which `torch.nn.Linear` would multiply it."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x
