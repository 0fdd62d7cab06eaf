"""Linear layers with a frozen weight and a LoRA adapter, one at a time or several on one input, and the gated MLP.

T tokens, K input width, N output width, r rank, R the ranks of all projections of one input together, I the MLP's
width. A projection computes

    t = x A^T          y = x W^T + s t B^T (+ bias)
    u = s dY B         dX = dY W + u A        dA = u^T x        dB = s dY^T t

with W frozen, 4-bit (NF4) or 16-bit. Between forward and backward it keeps x, t and nothing else; W is dequantised when
it is needed and dropped at once. Projections that share x (q, k and v; gate and up) share x A^T, u A and u^T x, with
their A stacked to (R, K). Hu et al. 2021 (LoRA), Dettmers et al. 2023 (QLoRA); doing the backward by hand so that
nothing of width N is kept is Unsloth's idea. The MLP keeps x, both t and the two projections e and g that enter the
activation; its backward makes h, de and dg in the places of dh, e and g (see gated_activations.py).

Two forms of the products
-------------------------
*Separate*: y = x W^T, then y += t (sB)^T, which reads and writes y again; u = dY (sB) reads dY again.
*Augmented*: W is dequantised into the first K columns of an (N, K + R') buffer whose other columns hold sB, x lies in
the first K columns of a (T, K + R') buffer whose other columns hold t (R' is R rounded up to 16, so that rows stay
aligned; a projection's columns that belong to its neighbours are 0), and then

    [x | t] [W | sB]^T = y        dY [W | sB] = [dY W | u]

so that one product each way does both, and several projections of one x add up in the same buffer. What it costs is
copying x into the wider buffer where the kernel before cannot write there (here: everywhere but the MLP's h), the zero
columns, and the 16-bit rounding of sB, which the separate form has too.

Arithmetic for a layer of Llama-3.1-8B, 4,096 tokens, r = 16 everywhere, bf16, on an H200 (4.3 TB/s, 790 TFLOP/s):
the frozen products are 1.79 TFLOP = 2.26 ms each way.

    extra work, forward       bytes     time      | backward            bytes     time
    separate: y again         705 MB    0.164 ms  | dY again            352 MB    0.082 ms
    augmented: copies of x    201 MB    0.047 ms  | none
               depth K + R'   11 GFLOP  0.014 ms  | depth K + R'        11 GFLOP  0.014 ms

so on paper the augmented form gives back 4.6 % of the forward and 3.0 % of the backward. For a 16-bit W it would have
to copy W, and loses. On one CPU core, where products bound everything, it takes 1.05 to 1.19 times as long forward and
1.12 to 1.16 times back (NF4 MLPs of 160 x 448 and 896 x 4,864, 512 tokens, fp32). It is a switch, `augmented`, off
until a GPU has decided.

Floor: 2 T N K operations each way for the frozen product, and 2 T r (N + K) for the adapter forward, twice that back.

Not supported, and refused rather than ignored: a gradient for W, a second backward through one graph of `lora_mlp`
(PyTorch raises: its saved values were overwritten), gradients of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprice_kernels.ops.gated_activations import ACTIVATIONS, glu_backward_, glu_forward
from fastprice_kernels.ops.nf4_dequantize import dequantize_nf4

__all__ = ["Projection", "lora_linear", "lora_mlp", "lora_projections", "lora_qkv"]

_ALIGN = 16  # elements: 32 bytes in 16 bits, and what Triton needs to know a row stride as a multiple of


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen linear layer and its adapter.

    Attributes:
        weight: (N, K) in the dtype of x; or, with `quant_state`, bitsandbytes' packed NF4 of it.
        lora_a, lora_b: (r, K) and (N, r), any floating dtype (they are cast to that of x, their gradients come back in
            their own); None for a layer without an adapter.
        scale: s, alpha / r in most recipes.
        bias: (N,), or None. It gets a gradient if it wants one.
        quant_state: a bitsandbytes `QuantState` of a nested or plain NF4 weight, or None.
    """

    weight: Tensor
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None
    quant_state: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        n, k = self.weight.shape if self.quant_state is None else self.quant_state.shape
        return int(n), int(k)

    @property
    def rank(self) -> int:
        return 0 if self.lora_a is None else int(self.lora_a.shape[0])


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
        keep_dense: keep the dequantised W for the backward. Only where the layer is recomputed under gradient
            checkpointing does that cost one layer's weights and not the whole model's: there it lives from the
            recomputation to the backward, and a step dequantises twice in place of three times.
        augmented: the augmented form of the products (see the module's docstring).

    Under autocast everything is cast to the autocast dtype, as `torch.nn.Linear` does.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a weight that wants a gradient.
    """
    projection = Projection(weight, lora_a, lora_b, scale, bias, quant_state)
    return lora_projections(x, [projection], keep_dense=keep_dense, augmented=augmented)[0]


def lora_qkv(
    x: Tensor, q: Projection, k: Projection, v: Projection, *, keep_dense: bool = False, augmented: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections of an attention layer's input, with one pass over x for their down-projections.

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
    flat = _flatten(projections)
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
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    x = _compute_input(x)
    _check(x, gate, "gate")
    _check(x, up, "up")
    if up.shape[0] != gate.shape[0] or down.shape[1] != gate.shape[0]:
        raise ValueError(f"gate gives {gate.shape[0]} columns, up gives {up.shape[0]} and down takes {down.shape[1]}")
    _check(x, down, "down", width=down.shape[1])
    flat = _flatten([gate, up, down])
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
        raise ValueError(f"{name}: the weight wants a gradient, only frozen weights are supported")
    autocast = torch.is_autocast_enabled(x.device.type)
    if p.quant_state is None and p.weight.dtype != x.dtype and not (autocast and p.weight.is_floating_point()):
        raise ValueError(f"{name}: the weight is {p.weight.dtype}, the input {x.dtype}")
    if (p.lora_a is None) != (p.lora_b is None):
        raise ValueError(f"{name}: lora_{'b' if p.lora_a is None else 'a'} comes without its other half")
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


# `autograd.Function.apply` sees tensors only as arguments of their own.
_PARTS = 6
_A, _B, _BIAS = 1, 2, 4  # where the parts that may want a gradient stand


def _flatten(projections: Sequence[Projection]) -> list[Any]:
    return [part for p in projections for part in (p.weight, p.lora_a, p.lora_b, p.scale, p.bias, p.quant_state)]


def _unflatten(flat: Sequence[Any]) -> list[Projection]:
    return [Projection(*flat[i : i + _PARTS]) for i in range(0, len(flat), _PARTS)]


class _Group:
    """The projections of one input: the products of both directions, in one dtype, without autograd.

    `a` is their A stacked, (R, K); `scaled_b` each one's s B, (N, r); `slices` each one's part of R.
    """

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype, augmented: bool) -> None:
        self.projections = projections
        self.dtype = dtype
        self.width = projections[0].shape[1]
        ends = list(accumulate(p.rank for p in projections))
        self.slices = [slice(end - p.rank, end) for p, end in zip(projections, ends, strict=True)]
        self.rank = ends[-1]
        self.augmented = augmented and self.rank > 0
        self.spare = -(-self.rank // _ALIGN) * _ALIGN if self.augmented else 0
        parts = [p.lora_a.to(dtype) for p in projections if p.lora_a is not None]
        self.a = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None
        self.scaled_b = [None if p.lora_b is None else (p.lora_b * p.scale).to(dtype) for p in projections]

    def weight(self, i: int) -> Tensor:
        """W (N, K) of projection i; in the augmented form [W | 0 sB 0], (N, K + R')."""
        p, scaled_b = self.projections[i], self.scaled_b[i]
        n, k = p.shape
        if p.quant_state is None and not self.augmented:
            return p.weight.to(self.dtype)
        wide = torch.empty(n, k + self.spare, dtype=self.dtype, device=p.weight.device)
        if p.quant_state is None:
            wide[:, :k] = p.weight
        elif self.dtype == torch.float64:  # only tests compute in float64
            wide[:, :k] = dequantize_nf4(p.weight, p.quant_state, dtype=torch.float32)
        else:
            dequantize_nf4(p.weight, p.quant_state, out=wide[:, :k], dtype=self.dtype)
        if self.spare:
            wide[:, k:] = 0
            if scaled_b is not None:
                wide[:, k:][:, self.slices[i]] = scaled_b
        return wide

    def room(self, rows: int, like: Tensor) -> Tensor:
        """An unset buffer for x, (T, K + R'): whoever writes x into its first K columns spares `forward` a copy."""
        return like.new_empty(rows, self.width + self.spare)

    def forward(self, x: Tensor, wide: Tensor | None = None) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
        """Every y (T, N); x (T, K) and t (T, R) as the backward wants them; the weights as it wants them.

        `wide`: a buffer from `room` that holds x already.
        """
        k = self.width
        if self.augmented:
            if wide is None:
                wide = self.room(x.shape[0], x)
                wide[:, :k] = x
            wide[:, k:] = 0
            wide[:, k : k + self.rank] = x @ self._a.T
            source, x, t = wide, wide[:, :k], wide[:, k : k + self.rank]
        else:
            source, t = x, x @ self._a.T if self.rank else x.new_empty(x.shape[0], 0)
        ys, weights = [], []
        for i, p in enumerate(self.projections):
            weights.append(self.weight(i))
            bias = None if p.bias is None else p.bias.to(self.dtype)
            ys.append(torch.nn.functional.linear(source, weights[i], bias))
            scaled_b = self.scaled_b[i]
            if scaled_b is not None and not self.augmented:
                ys[i] = _plus_product(ys[i], t[:, self.slices[i]], scaled_b.T)
        return ys, x, t, weights

    def input_gradient(self, dys: Sequence[Tensor], kept: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """dX (T, K) and u (T, R). `kept`: the weights that `forward` returned, if they are still there."""
        sums: Tensor | None = None
        for i, dy in enumerate(dys):
            weight = kept[i] if kept else self.weight(i)
            sums = dy @ weight if sums is None else sums.addmm_(dy, weight)
        assert sums is not None
        if not self.rank:
            return sums, sums.new_empty(sums.shape[0], 0)
        if self.augmented:
            u = sums[:, self.width : self.width + self.rank]
            return torch.addmm(sums[:, : self.width], u, self._a), u
        u = self.adapter_inner(dys)
        return sums.addmm_(u, self._a), u

    def adapter_inner(self, dys: Sequence[Tensor]) -> Tensor:
        """u (T, R) alone, for an input that wants no gradient."""
        parts = [dy @ b for dy, b in zip(dys, self.scaled_b, strict=True) if b is not None]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0] if parts else dys[0].new_empty(dys[0].shape[0], 0)

    def parameter_gradients(
        self, dys: Sequence[Tensor], u: Tensor, x: Tensor, t: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradient of every part of every projection, in the order of `_flatten`; None where it is not wanted."""
        gradients: list[Tensor | None] = [None] * len(wanted)
        da = u.T @ x if any(wanted[_A::_PARTS]) else None
        for i, (p, dy, at) in enumerate(zip(self.projections, dys, self.slices, strict=True)):
            first = _PARTS * i
            if wanted[first + _A] and p.lora_a is not None and da is not None:
                gradients[first + _A] = da[at].to(p.lora_a.dtype)
            if wanted[first + _B] and p.lora_b is not None:
                gradients[first + _B] = (dy.T @ t[:, at]).to(p.lora_b.dtype).mul_(p.scale)
            if wanted[first + _BIAS] and p.bias is not None:
                gradients[first + _BIAS] = dy.sum(0, dtype=p.bias.dtype)
        return gradients

    @property
    def _a(self) -> Tensor:
        assert self.a is not None
        return self.a


def _plus_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a b in the place of y; in a place of its own while compiling.

    Under torch.compile PyTorch 2.11 gives zeros for every gradient of a Function whose forward changes a result of its
    in place (2.13 does not); the compiler turns it into an operation out of place anyway.
    """
    return torch.addmm(y, a, b) if torch.compiler.is_compiling() else y.addmm_(a, b)


def _plain_arithmetic(x: Tensor) -> Any:
    """Autocast off: the dtype was settled before, and in a backward autocast would cast what the forward did not."""
    return torch.autocast(x.device.type, enabled=False)


def _save(ctx: Any, flat: Sequence[Any], *tensors: Tensor) -> None:
    """Keeps the projections and `tensors` for the backward.

    Adapters go through `save_for_backward`, which notices an optimiser step in between. Frozen weights do not: hooks
    that move saved tensors to the host would move them too, and whoever streams weights may exchange their storage.
    """
    adapters = [i for i, part in enumerate(flat) if i % _PARTS in (_A, _B) and part is not None]
    ctx.save_for_backward(*(flat[i] for i in adapters), *tensors)
    ctx.adapters, ctx.frozen = adapters, [None if i in adapters else part for i, part in enumerate(flat)]


def _saved(ctx: Any) -> tuple[list[Any], Sequence[Tensor]]:
    flat, saved = list(ctx.frozen), ctx.saved_tensors
    for i, part in zip(ctx.adapters, saved, strict=False):
        flat[i] = part
    return flat, saved[len(ctx.adapters) :]


class _Projections(torch.autograd.Function):
    """x (T, K) and the flattened projections; gives every y (T, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep_dense: bool, augmented: bool, *flat: Any) -> tuple[Tensor, ...]:
        with _plain_arithmetic(x):
            ys, x, t, weights = _Group(_unflatten(flat), x.dtype, augmented).forward(x)
        _save(ctx, flat, x, t, *(weights if keep_dense else ()))
        ctx.augmented = augmented
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        flat, (x, t, *kept) = _saved(ctx)
        with _plain_arithmetic(x):
            group = _Group(_unflatten(flat), x.dtype, ctx.augmented)
            dx = None
            if ctx.needs_input_grad[0]:
                dx, u = group.input_gradient(dys, kept)
            else:
                u = group.adapter_inner(dys)
            gradients = group.parameter_gradients(dys, u, x, t, ctx.needs_input_grad[3:])
        return dx, None, None, *gradients


class _MLP(torch.autograd.Function):
    """x (T, K) and the flattened gate, up and down; gives y (T, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, keep_dense: bool, augmented: bool, *flat: Any) -> Tensor:
        with _plain_arithmetic(x):
            inner = _Group(_unflatten(flat[: 2 * _PARTS]), x.dtype, augmented)
            outer = _Group(_unflatten(flat[2 * _PARTS :]), x.dtype, augmented)
            (e, g), x, t, weights = inner.forward(x)
            wide = outer.room(e.shape[0], e)
            h = glu_forward(e, g, activation, out=wide[:, : e.shape[1]])
            (y,), _, t_down, weights_down = outer.forward(h, wide)
            if outer.augmented:
                t_down = t_down.clone()  # else it would keep all of h's buffer alive
        _save(ctx, flat, x, t, e, g, t_down, *((*weights, *weights_down) if keep_dense else ()))
        ctx.activation, ctx.augmented = activation, augmented
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        flat, (x, t, e, g, t_down, *kept) = _saved(ctx)
        with _plain_arithmetic(x):
            inner = _Group(_unflatten(flat[: 2 * _PARTS]), x.dtype, ctx.augmented)
            outer = _Group(_unflatten(flat[2 * _PARTS :]), x.dtype, ctx.augmented)
            dh, u_down = outer.input_gradient([dy], kept[2:])
            h, de, dg = glu_backward_(dh, e, g, ctx.activation)
            wanted = ctx.needs_input_grad[4:]
            down_gradients = outer.parameter_gradients([dy], u_down, h, t_down, wanted[2 * _PARTS :])
            del dh, h
            dx = None
            if ctx.needs_input_grad[0]:
                dx, u = inner.input_gradient([de, dg], kept[:2])
            else:
                u = inner.adapter_inner([de, dg])
            gradients = inner.parameter_gradients([de, dg], u, x, t, wanted[: 2 * _PARTS])
        return dx, None, None, None, *gradients, *down_gradients
