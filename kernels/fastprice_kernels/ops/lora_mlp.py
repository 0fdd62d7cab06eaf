"""The gated MLP `down(act(gate(x)) * up(x))` of three projections with LoRA adapters: SwiGLU or GeGLU.

It saves x, both products of rank r and the two inputs e and g of its activation, and its backward writes h, de and dg
over dh, e and g (gated_activations.py). With `recompute` it saves neither e nor g, 4 I bytes a token in 16 bits (57 kB
for Llama-3.1-8B, half of all that a layer saves): the backward computes them again, from the weights that it
dequantizes for the gradient of x anyway, both of which it then holds at once. That is two of the MLP's three forward
products, for Llama-3.1-8B 27 % of a layer's frozen products (forward and gradient of x).

With `tile` it does both directions for so many rows at a time, so that e, g, h and their gradients exist for one tile
only; weights are dequantized once a direction. Everything of rank r, x, y and dx have all rows. Gradients that need h
or de are added up over the tiles in the dtype of the adapters. One tile computes the bits of no tile.

Shapes: T tokens, K input width, N output width, I the MLP's width, R the ranks of gate and up, r that of down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprice_kernels.ops.gated_activations import ACTIVATIONS, glu_backward_, glu_forward
from fastprice_kernels.ops.lora import compute_input, plain_arithmetic, prepare, save, saved
from fastprice_kernels.ops.lora_products import PARTS, Projection, ProjectionGroup, unflatten

__all__ = ["apply_mlp", "lora_mlp"]

_OPTIONS = 6  # arguments of the functions before the flattened projections


def _groups(groups: Any, flat: Sequence[Any]) -> tuple[ProjectionGroup, ProjectionGroup]:
    """Those of gate and up, and of down; under a compiler, where none are given, made from the flattened ones."""
    if groups is not None:
        return groups  # type: ignore[no-any-return]
    return ProjectionGroup(unflatten(flat[: 2 * PARTS])), ProjectionGroup(unflatten(flat[2 * PARTS :]))


class _MLP(torch.autograd.Function):
    """From x (T, K) and the flattened gate, up and down, y (T, N)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: Any, activation: str, keep_dense: bool, augmented: bool, tile: None, *flat: Any
    ) -> Tensor:
        inner, outer = _groups(groups, flat)
        inner_wide, outer_wide = (augmented and group.rank > 0 for group in (inner, outer))
        with plain_arithmetic(x):
            a, b = inner.adapters(x.dtype, in_backward=True)
            keep = keep_dense and inner.resident is None and outer.resident is None
            (e, g), x, t, weights = inner.forward(x, a, b, inner_wide, keep=keep)
            a, b = outer.adapters(x.dtype, in_backward=True)
            wide = outer.input_buffer(e.shape[0], e, outer_wide)
            h = glu_forward(e, g, activation, out=wide[:, : e.shape[1]] if outer_wide else wide)
            (y,), _, t_down, weights_down = outer.forward(h, a, b, outer_wide, wide=wide, keep=keep)
            if outer_wide:
                t_down = t_down.clone()  # a view would keep the whole buffer of h alive
        save(ctx, flat, x, t, e, g, t_down, *weights, *weights_down)
        ctx.groups, ctx.activation, ctx.augmented = groups, activation, (inner_wide, outer_wide)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        flat, (x, t, e, g, t_down, *weights) = saved(ctx)
        inner, outer = _groups(ctx.groups, flat)
        inner_wide, outer_wide = ctx.augmented
        with plain_arithmetic(x):
            a, b = outer.adapters(x.dtype, in_backward=True)
            dh, u_down = outer.input_gradient([dy], a, b, outer_wide, weights[2:])
            h, de, dg = glu_backward_(dh, e, g, ctx.activation)
            wanted = ctx.needs_input_grad[_OPTIONS:]
            down_gradients = outer.parameter_gradients([dy], u_down, h, t_down, wanted[2 * PARTS :])
            del dh, h
            a, b = inner.adapters(x.dtype, in_backward=True)
            dx = None
            if ctx.needs_input_grad[0]:
                dx, u = inner.input_gradient([de, dg], a, b, inner_wide, weights[:2])
            else:
                u = inner.adapter_inner([de, dg], b)
            gradients = inner.parameter_gradients([de, dg], u, x, t, wanted[: 2 * PARTS])
        return dx, *[None] * (_OPTIONS - 1), *gradients, *down_gradients


class _RecomputedMLP(torch.autograd.Function):
    """The same, computed for `tile` rows at a time; e and g are not saved."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: Any, activation: str, keep_dense: bool, augmented: bool, tile: int, *flat: Any
    ) -> Tensor:
        inner, outer = _groups(groups, flat)
        ts, ts_down, ys = [], [], []
        with plain_arithmetic(x):
            a, b = inner.adapters(x.dtype, in_backward=True)
            a_down, b_down = outer.adapters(x.dtype, in_backward=True)
            whole = x.shape[0] <= tile
            weights = [] if whole else inner.weights(x.dtype, b)
            weights_down = [] if whole else outer.weights(x.dtype, b_down)
            for rows in _tiles(x.shape[0], tile):
                (e, g), _, t, _ = inner.forward(x[rows], a, b, weights=weights)
                h = glu_forward(e, g, activation)
                del e, g
                (y,), _, t_down, _ = outer.forward(h, a_down, b_down, weights=weights_down)
                del h
                ts.append(t)
                ts_down.append(t_down)
                ys.append(y)
        save(ctx, flat, x, _rejoin(ts), _rejoin(ts_down))
        ctx.groups, ctx.activation, ctx.tile = groups, activation, tile
        return _rejoin(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        flat, (x, t, t_down) = saved(ctx)
        inner, outer = _groups(ctx.groups, flat)
        wanted = ctx.needs_input_grad[_OPTIONS:]
        sums: list[Tensor | None] = [None] * len(wanted)
        dxs = []
        with plain_arithmetic(x):
            a, b = inner.adapters(x.dtype, in_backward=True)
            a_down, b_down = outer.adapters(x.dtype, in_backward=True)
            weights = inner.weights(x.dtype, b)  # for e and g, and for dx
            weights_down = [] if x.shape[0] <= ctx.tile else outer.weights(x.dtype, b_down)
            for rows in _tiles(x.shape[0], ctx.tile):
                x_rows, dy_rows = x[rows], dy[rows]
                (e, g), _, _, _ = inner.forward(x_rows, a, b, weights=weights)
                dh, u_down = outer.input_gradient([dy_rows], a_down, b_down, weights=weights_down)
                h, de, dg = glu_backward_(dh, e, g, ctx.activation)
                down = outer.parameter_gradients([dy_rows], u_down, h, t_down[rows], wanted[2 * PARTS :])
                del dh, h
                if ctx.needs_input_grad[0]:
                    dx, u = inner.input_gradient([de, dg], a, b, weights=weights)
                    dxs.append(dx)
                else:
                    u = inner.adapter_inner([de, dg], b)
                both = inner.parameter_gradients([de, dg], u, x_rows, t[rows], wanted[: 2 * PARTS])
                del e, g, de, dg
                sums = [
                    part if total is None else total if part is None else total.add_(part)
                    for total, part in zip(sums, [*both, *down], strict=True)
                ]
        return _rejoin(dxs) if dxs else None, *[None] * (_OPTIONS - 1), *sums


def _tiles(rows: int, tile: int) -> Iterator[slice]:
    """Of `tile` rows; the last one may be shorter, and without rows there is one."""
    return (slice(first, min(first + tile, rows)) for first in range(0, max(rows, 1), tile))


def _rejoin(tiles: list[Tensor]) -> Tensor:
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles)


def apply_mlp(
    x: Tensor,
    groups: tuple[ProjectionGroup, ProjectionGroup],
    *,
    activation: str = "silu",
    keep_dense: bool = False,
    augmented: bool = False,
    recompute: bool = False,
    tile: int | None = None,
) -> Tensor:
    """`lora_mlp` of an x (..., K) in the dtype of the products; `groups`: gate and up, and down."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if tile is not None and tile < 1:
        raise ValueError(f"tiles of {tile} rows; give at least 1")
    inner, outer = groups
    inner.check(x, ("gate", "up"))
    (gate, up), (down,) = inner.projections, outer.projections
    if up.shape[0] != gate.shape[0] or down.shape[1] != gate.shape[0]:
        raise ValueError(f"gate gives {gate.shape[0]} columns, up gives {up.shape[0]} and down takes {down.shape[1]}")
    outer.check(x, ("down",), width=outer.width)
    kept = prepare(x, *groups)
    function: Any = _MLP
    if recompute or tile is not None:
        function, tile = _RecomputedMLP, tile or max(x.shape[:-1].numel(), 1)
    flat = (*inner.flat, *outer.flat)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = function.apply(rows, groups if kept else None, activation, keep_dense, augmented, tile, *flat)
    return y.view(*x.shape[:-1], y.shape[-1])


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str = "silu",
    keep_dense: bool = False,
    augmented: bool = False,
    recompute: bool = False,
    tile: int | None = None,
) -> Tensor:
    """`down(act(gate(x)) * up(x))`, x (..., K), result (..., N of down): SwiGLU or GeGLU.

    Args:
        activation: "silu", "gelu" (exact) or "gelu_tanh".
        recompute: do not save the results of gate and up but compute them again in the backward; the same bits.
        tile: compute so many rows at a time, in both directions; implies `recompute`.

    `recompute` and `tile` take the separate form of the products and save no dense weights. Other options and errors as
    for `lora_linear`.
    """
    groups = ProjectionGroup([gate, up]), ProjectionGroup([down])
    return apply_mlp(
        compute_input(x), groups, activation=activation, keep_dense=keep_dense, augmented=augmented,
        recompute=recompute, tile=tile,
    )  # fmt: skip
