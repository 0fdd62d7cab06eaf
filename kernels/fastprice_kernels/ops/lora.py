"""Linear layers with a frozen weight and a LoRA adapter, one at a time or several on one input, and the gated MLP.

A projection computes y = x W^T + s (x A^T) B^T (+ bias) with W frozen, NF4 or 16-bit (Hu et al. 2021, LoRA; Dettmers et
al. 2023, QLoRA); lora_products.py has the products of both directions and their costs. For the backward a projection
saves x and t = x A^T; W is dequantized when it is needed and freed at once. The backward is written by hand so that
nothing of width N is saved, which is Unsloth's idea.

Projections of one x (q, k and v; gate and up) share x A^T and two products of the backward, with their A stacked to
(R, K). The MLP saves x, both t and the two inputs e and g of its activation, and its backward writes h, de and dg over
dh, e and g (gated_activations.py).

Not supported, and refused: a gradient of W, gradients of gradients, a second backward through one graph of `lora_mlp`.

Shapes: T tokens, K input width, N output width, r rank, R the ranks of all projections of one x, I the MLP's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprice_kernels.ops.gated_activations import ACTIVATIONS, glu_backward_, glu_forward
from fastprice_kernels.ops.lora_products import LORA_A, LORA_B, PARTS, Projection, ProjectionGroup, flatten, unflatten

__all__ = ["Projection", "lora_linear", "lora_mlp", "lora_projections", "lora_qkv"]


def _plain_arithmetic(x: Tensor) -> Any:
    """Autocast off: the dtype is decided before, and in a backward autocast would cast what the forward did not."""
    return torch.autocast(x.device.type, enabled=False)


def _save(ctx: Any, flat: Sequence[Any], *tensors: Tensor) -> None:
    """Saves the projections and `tensors` for the backward.

    Adapters go through `save_for_backward`, which detects an optimizer step in between. Frozen weights do not: hooks
    that offload saved tensors to the host would offload them too, and offloaded weights may get another storage.
    """
    adapters = [i for i, part in enumerate(flat) if i % PARTS in (LORA_A, LORA_B) and part is not None]
    ctx.save_for_backward(*(flat[i] for i in adapters), *tensors)
    ctx.adapters, ctx.frozen = adapters, [None if i in adapters else part for i, part in enumerate(flat)]


def _saved(ctx: Any) -> tuple[list[Any], Sequence[Tensor]]:
    flat, saved = list(ctx.frozen), ctx.saved_tensors
    for i, part in zip(ctx.adapters, saved, strict=False):
        flat[i] = part
    return flat, saved[len(ctx.adapters) :]


class _Projections(torch.autograd.Function):
    """From x (T, K) and the flattened projections, each y (T, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep_dense: bool, augmented: bool, *flat: Any) -> tuple[Tensor, ...]:
        with _plain_arithmetic(x):
            ys, x, t, weights = ProjectionGroup(unflatten(flat), x.dtype, augmented).forward(x)
        _save(ctx, flat, x, t, *(weights if keep_dense else ()))
        ctx.augmented = augmented
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        flat, (x, t, *weights) = _saved(ctx)
        with _plain_arithmetic(x):
            group = ProjectionGroup(unflatten(flat), x.dtype, ctx.augmented)
            dx = None
            if ctx.needs_input_grad[0]:
                dx, u = group.input_gradient(dys, weights)
            else:
                u = group.adapter_inner(dys)
            gradients = group.parameter_gradients(dys, u, x, t, ctx.needs_input_grad[3:])
        return dx, None, None, *gradients


class _MLP(torch.autograd.Function):
    """From x (T, K) and the flattened gate, up and down, y (T, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, keep_dense: bool, augmented: bool, *flat: Any) -> Tensor:
        with _plain_arithmetic(x):
            inner = ProjectionGroup(unflatten(flat[: 2 * PARTS]), x.dtype, augmented)
            outer = ProjectionGroup(unflatten(flat[2 * PARTS :]), x.dtype, augmented)
            (e, g), x, t, weights = inner.forward(x)
            wide = outer.input_buffer(e.shape[0], e)
            h = glu_forward(e, g, activation, out=wide[:, : e.shape[1]])
            (y,), _, t_down, weights_down = outer.forward(h, wide)
            if outer.augmented:
                t_down = t_down.clone()  # a view would keep the whole buffer of h alive
        _save(ctx, flat, x, t, e, g, t_down, *((*weights, *weights_down) if keep_dense else ()))
        ctx.activation, ctx.augmented = activation, augmented
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        flat, (x, t, e, g, t_down, *weights) = _saved(ctx)
        with _plain_arithmetic(x):
            inner = ProjectionGroup(unflatten(flat[: 2 * PARTS]), x.dtype, ctx.augmented)
            outer = ProjectionGroup(unflatten(flat[2 * PARTS :]), x.dtype, ctx.augmented)
            dh, u_down = outer.input_gradient([dy], weights[2:])
            h, de, dg = glu_backward_(dh, e, g, ctx.activation)
            wanted = ctx.needs_input_grad[4:]
            down_gradients = outer.parameter_gradients([dy], u_down, h, t_down, wanted[2 * PARTS :])
            del dh, h
            dx = None
            if ctx.needs_input_grad[0]:
                dx, u = inner.input_gradient([de, dg], weights[:2])
            else:
                u = inner.adapter_inner([de, dg])
            gradients = inner.parameter_gradients([de, dg], u, x, t, wanted[: 2 * PARTS])
        return dx, None, None, None, *gradients, *down_gradients


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
        augmented: the augmented form of the products (see the module's docstring).

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
    x = _compute_input(x)
    for name, projection in enumerate(projections):
        _check(x, projection, f"projection {name}" if len(projections) > 1 else "the projection")
    flat = flatten(projections)
    ys = _Projections.apply(x.reshape(-1, x.shape[-1]), keep_dense, augmented, *flat)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str = "silu",
    keep_dense: bool = False,
    augmented: bool = False,
) -> Tensor:
    """`down(act(gate(x)) * up(x))`, x (..., K), result (..., N of down): SwiGLU or GeGLU.

    Args:
        activation: "silu", "gelu" (exact) or "gelu_tanh".

    Other options and errors as for `lora_linear`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    x = _compute_input(x)
    _check(x, gate, "gate")
    _check(x, up, "up")
    if up.shape[0] != gate.shape[0] or down.shape[1] != gate.shape[0]:
        raise ValueError(f"gate gives {gate.shape[0]} columns, up gives {up.shape[0]} and down takes {down.shape[1]}")
    _check(x, down, "down", width=down.shape[1])
    flat = flatten([gate, up, down])
    y: Tensor = _MLP.apply(x.reshape(-1, x.shape[-1]), activation, keep_dense, augmented, *flat)
    return y.view(*x.shape[:-1], y.shape[-1])


def _compute_input(x: Tensor) -> Tensor:
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _check(x: Tensor, p: Projection, name: str, width: int | None = None) -> None:
    width = x.shape[-1] if width is None else width
    n, k = p.shape
    if k != width:
        raise ValueError(f"{name}: the input is {width} wide, the weight is ({n}, {k})")
    if p.weight.requires_grad:
        raise ValueError(f"{name}: the weight requires a gradient, only frozen weights are supported")
    autocast = torch.is_autocast_enabled(x.device.type)
    if p.quant_state is None and p.weight.dtype != x.dtype and not (autocast and p.weight.is_floating_point()):
        raise ValueError(f"{name}: the weight is {p.weight.dtype}, the input {x.dtype}")
    if (p.lora_a is None) != (p.lora_b is None):
        raise ValueError(f"{name}: lora_{'b' if p.lora_a is None else 'a'} is given without the other")
    if p.lora_a is not None and p.lora_b is not None:
        rank = p.rank
        if tuple(p.lora_a.shape) != (rank, k) or tuple(p.lora_b.shape) != (n, rank):
            shapes = f"lora_a {tuple(p.lora_a.shape)} and lora_b {tuple(p.lora_b.shape)}"
            raise ValueError(f"{name}: {shapes} do not fit a weight ({n}, {k})")
    if p.bias is not None and tuple(p.bias.shape) != (n,):
        raise ValueError(f"{name}: bias {tuple(p.bias.shape)} does not fit a weight ({n}, {k})")
    for part in (p.weight, p.lora_a, p.lora_b, p.bias):
        if part is not None and part.device != x.device:
            raise ValueError(f"{name}: a part is on {part.device}, the input on {x.device}")
