"""The products of the projections that share an input: frozen weight and LoRA adapter, in both directions.

    t = s x A^T        y = x W^T + t B^T (+ bias)
    u = s dY B         dX = dY W + u A        dA = u^T x        dB = dY^T t

The factor s is part of the products of rank r (`alpha`), so that A and B are cast as they are (adapter_casts.py) and no
gradient has to be scaled. On CUDA the gradients of fp32 adapters come in fp32 out of 16-bit products.

There are two forms. *Separate*: y = x W^T, then y += t B^T, which reads and writes y once more. *Augmented*: W is
dequantized into the first K columns of an (N, K + R') buffer whose other columns hold B, and x is copied beside t, so
that one product each way computes both: [x | t] [W | B]^T = y and dY [W | B] = [dY W | dY B]. R' is R rounded up to 16
for alignment; the columns of a neighboring projection are 0. A 16-bit W would have to be copied as well.

Frozen weights may be *resident*: dequantized once and joined, (all N, K), as they never change. On CUDA the projections
of one input are then one product forward; on a CPU, whose libraries may add up in another order for another N, each is
computed by itself.

Operations: 2 T N K each way for the frozen product, 2 T r (N + K) for the adapter forward and twice that backward. By
arithmetic the augmented form saves 3 to 5 % on an H200; on one CPU core it costs 5 to 19 %, measured
(docs/explanation/kernels.md). It is off until a GPU has measured it.

Shapes: T tokens, K input width, N output width, r rank, R the ranks of all projections of one x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastprice_kernels.ops.adapter_casts import AdapterCasts, cast_adapters
from fastprice_kernels.ops.nf4_dequantize import dequantize_nf4

__all__ = ["LORA_A", "LORA_B", "PARTS", "Projection", "ProjectionGroup", "flatten", "unflatten"]

_ALIGN = 16  # elements: 32 bytes in 16 bits; Triton specializes on row strides that are multiples of 16


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen linear layer and its adapter.

    Attributes:
        weight: (N, K) in the dtype of x; or, with `quant_state`, bitsandbytes' packed NF4 of it.
        lora_a, lora_b: (r, K) and (N, r), of any floating dtype: they are cast to that of x, and their gradients have
            their own. None for a layer without an adapter.
        scale: s, alpha / r in most recipes.
        bias: (N,), or None. It gets a gradient if it requires one.
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
        """r, or 0 without an adapter."""
        return 0 if self.lora_a is None else int(self.lora_a.shape[0])


# `autograd.Function.apply` finds tensors only among its own arguments, not inside a `Projection`.
PARTS = 6
LORA_A, LORA_B, BIAS = 1, 2, 4  # the positions of the parts that may require a gradient


def flatten(projections: Sequence[Projection]) -> list[Any]:
    """PARTS arguments for each projection, in the order of its attributes."""
    return [part for p in projections for part in (p.weight, p.lora_a, p.lora_b, p.scale, p.bias, p.quant_state)]


def unflatten(flat: Sequence[Any]) -> list[Projection]:
    """The projections that `flatten` took apart."""
    return [Projection(*flat[i : i + PARTS]) for i in range(0, len(flat), PARTS)]


class ProjectionGroup:
    """The projections of one input: the products of both directions, without autograd.

    It holds what is the same at every call, so one that is used again computes it once: casts of the adapters, checks
    of the shapes, resident weights.

    Attributes:
        width: K.
        slices: the part of R that belongs to each projection.
        rank: R.
        flat: the projections as `flatten` takes them apart.
        resident: the frozen weights dequantized and joined, (all N, K), or None.
    """

    def __init__(self, projections: Sequence[Projection]) -> None:
        self.projections = tuple(projections)
        self.width = projections[0].shape[1]
        ranks = [p.rank for p in projections]
        ends = list(accumulate(ranks))
        self.slices = [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]
        self.rank = ends[-1]
        self.flat = flatten(projections)
        self.resident: Tensor | None = None
        rows = [p.shape[0] for p in projections]
        self.rows = [slice(end - n, end) for end, n in zip(accumulate(rows), rows, strict=True)]
        scales = {p.scale for p in projections if p.rank}
        self._scale = scales.pop() if len(scales) == 1 else None  # the one of all adapters
        self._checked: set[Any] = set()
        self._casts: dict[torch.dtype, AdapterCasts] = {}

    def check(self, x: Tensor, names: Sequence[str], *, width: int | None = None) -> None:
        """Raises ValueError for parts that do not fit each other or x (..., K); each kind of x is checked once.

        `width`: of the input, where it is not x.
        """
        kind = (x.shape[-1] if width is None else width, x.dtype, x.device, torch.is_autocast_enabled(x.device.type))
        if kind not in self._checked:
            for p, name in zip(self.projections, names, strict=True):
                _check(x, kind[0], p, name)
            self._checked.add(kind)

    def spare(self, augmented: bool) -> int:
        """R', the columns of a buffer behind the first K in the augmented form; 0 in the separate one."""
        return -(-self.rank // _ALIGN) * _ALIGN if augmented else 0

    def adapters(self, dtype: torch.dtype, *, in_backward: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        """A stacked, (R, K), and each B, (N, r), in `dtype`.

        `in_backward`: the adapters are known to be those of the forward. Without it, call it where gradient mode is
        that of the caller.
        """
        casts = self._casts.get(dtype)
        if in_backward and casts is not None:
            return casts.a, casts.b
        a, b = [p.lora_a for p in self.projections], [p.lora_b for p in self.projections]
        if not self.rank:
            return None, b
        if not _can_keep(self.flat):
            return cast_adapters(a, b, dtype)
        if casts is None:
            casts = self._casts[dtype] = AdapterCasts(a, b, dtype)
        casts.refresh()
        return casts.a, casts.b

    def weight(self, i: int, dtype: torch.dtype, b: Sequence[Tensor | None], augmented: bool) -> Tensor:
        """W (N, K) of projection i; in the augmented form [W | 0 B 0], (N, K + R')."""
        p = self.projections[i]
        if not augmented:
            if self.resident is not None and self.resident.dtype == dtype:
                return self.resident[self.rows[i]]
            if p.quant_state is None:
                return p.weight.to(dtype)
            if dtype != torch.float64:
                return dequantize_nf4(p.weight, p.quant_state, dtype=dtype)
        n, k = p.shape
        wide = torch.empty(n, k + self.spare(augmented), dtype=dtype, device=p.weight.device)
        if p.quant_state is None:
            wide[:, :k] = p.weight
        elif dtype == torch.float64:  # only tests compute in float64
            wide[:, :k] = dequantize_nf4(p.weight, p.quant_state, dtype=torch.float32)
        else:
            dequantize_nf4(p.weight, p.quant_state, out=wide[:, :k], dtype=dtype)
        if augmented:
            wide[:, k:] = 0
            own = b[i]
            if own is not None:
                wide[:, k:][:, self.slices[i]] = own
        return wide

    def weights(self, dtype: torch.dtype, b: Sequence[Tensor | None], augmented: bool = False) -> list[Tensor]:
        """`weight` of every projection."""
        return [self.weight(i, dtype, b, augmented) for i in range(len(self.projections))]

    def input_buffer(self, rows: int, like: Tensor, augmented: bool) -> Tensor:
        """An uninitialized (T, K + R'): x written into its first K columns is used by `forward` without a copy."""
        return like.new_empty(rows, self.width + self.spare(augmented))

    def inner(self, x: Tensor, a: Tensor | None) -> Tensor:
        """t (T, R)."""
        if a is None:
            return x.new_empty(x.shape[0], 0)
        if self._scale is not None:
            return _scaled_product(x, a.t(), self._scale)
        t = x @ a.t()
        for p, at in zip(self.projections, self.slices, strict=True):
            t[:, at] *= p.scale
        return t

    def forward(
        self,
        x: Tensor,
        a: Tensor | None,
        b: Sequence[Tensor | None],
        augmented: bool = False,
        *,
        wide: Tensor | None = None,
        weights: Sequence[Tensor] = (),
        keep: bool = False,
    ) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
        """Each y (T, N); x (T, K) and t (T, R) to be saved for the backward; the weights, if they are to be kept.

        Args:
            a, b: as `adapters` returns them.
            wide: in the augmented form, a buffer from `input_buffer` that already holds x.
            weights: in the separate form, those of an earlier call.
            keep: return the weights that are dequantized here; otherwise each is freed before the next one is.
        """
        k, t = self.width, self.inner(x, a)
        if augmented:
            if wide is None:
                wide = self.input_buffer(x.shape[0], x, augmented)
                wide[:, :k] = x
            wide[:, k:] = 0
            wide[:, k : k + self.rank] = t
            source, x, t = wide, wide[:, :k], wide[:, k : k + self.rank]
        else:
            source = x
        kept: list[Tensor] = []
        ys = self._joined_products(x) if not augmented and _joins(x) else None
        if ys is None:
            ys = []
            for i, p in enumerate(self.projections):
                weight = weights[i] if weights else self.weight(i, x.dtype, b, augmented)
                bias = None if p.bias is None else p.bias.to(x.dtype)
                ys.append(torch.nn.functional.linear(source, weight, bias))
                kept += [weight] if keep else []
                del weight
        if a is not None and not augmented:
            for i, at in enumerate(self.slices):
                own = b[i]
                if own is not None:
                    ys[i] = _plus_product(ys[i], t if len(ys) == 1 else t[:, at], own.t())
        return ys, x, t, kept

    def _joined_products(self, x: Tensor) -> list[Tensor] | None:
        """Each y without its adapter, by one product with the resident weights; None without such weights or a bias."""
        if self.resident is None or self.resident.dtype != x.dtype or len(self.rows) == 1:
            return None
        if any(p.bias is not None for p in self.projections):
            return None
        y = x @ self.resident.t()
        # Tensors of their own, not views: a view from inside a Function cannot be changed in place, as RoPE does.
        return [
            x.new_empty(0).set_(y.untyped_storage(), rows.start, (y.shape[0], rows.stop - rows.start), y.stride())
            for rows in self.rows
        ]

    def input_gradient(
        self,
        dys: Sequence[Tensor],
        a: Tensor | None,
        b: Sequence[Tensor | None],
        augmented: bool = False,
        weights: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """dX (T, K) and u (T, R). `weights`: those that `forward` returned, where they were saved."""
        sums: Tensor | None = None
        for i, dy in enumerate(dys):
            weight = weights[i] if weights else self.weight(i, dy.dtype, b, augmented)
            sums = dy @ weight if sums is None else sums.addmm_(dy, weight)
            del weight  # before the next one is dequantized
        assert sums is not None
        if a is None:
            return sums, sums.new_empty(sums.shape[0], 0)
        if augmented:
            u = sums[:, self.width : self.width + self.rank].clone()
            for p, at in zip(self.projections, self.slices, strict=True):
                u[:, at] *= p.scale
            return torch.addmm(sums[:, : self.width], u, a), u
        u = self.adapter_inner(dys, b)
        return sums.addmm_(u, a), u

    def adapter_inner(self, dys: Sequence[Tensor], b: Sequence[Tensor | None]) -> Tensor:
        """u (T, R) alone, for an input that requires no gradient."""
        if not self.rank:
            return dys[0].new_empty(dys[0].shape[0], 0)
        used = [(dy, own, p.scale) for dy, own, p in zip(dys, b, self.projections, strict=True) if own is not None]
        if len(used) == 1 or torch.compiler.is_compiling():
            parts = [_scaled_product(*each) for each in used]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        u = dys[0].new_empty(dys[0].shape[0], self.rank)
        for part, (dy, own, scale) in zip(u.split([own.shape[1] for _, own, _ in used], 1), used, strict=True):
            part.addmm_(dy, own, beta=0, alpha=scale)
        return u

    def parameter_gradients(
        self, dys: Sequence[Tensor], u: Tensor, x: Tensor, t: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradient of each part of each projection, in the order of `flatten`; None where it is not wanted."""
        gradients: list[Tensor | None] = [None] * len(wanted)
        first_a = next((p.lora_a for p in self.projections if p.lora_a is not None), None)
        da = product_as(u.t(), x, first_a.dtype) if any(wanted[LORA_A::PARTS]) and first_a is not None else None
        alone = len(self.projections) == 1
        for i, (p, dy, at) in enumerate(zip(self.projections, dys, self.slices, strict=True)):
            first = PARTS * i
            if wanted[first + LORA_A] and p.lora_a is not None and da is not None:
                gradients[first + LORA_A] = da if alone else da[at].to(p.lora_a.dtype)
            if wanted[first + LORA_B] and p.lora_b is not None:
                gradients[first + LORA_B] = product_as(dy.t(), t if alone else t[:, at], p.lora_b.dtype)
            if wanted[first + BIAS] and p.bias is not None:
                gradients[first + BIAS] = dy.sum(0, dtype=p.bias.dtype)
        return gradients


def product_as(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`. On CUDA an fp32 result of 16-bit factors is not rounded to 16 bits on the way."""
    if a.dtype == dtype:
        return a @ b
    if dtype == torch.float32 and a.dtype != torch.float64 and _gives_fp32(a):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def _gives_fp32(a: Tensor) -> bool:
    return a.is_cuda  # `out_dtype` exists on CUDA only


def _joins(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling()


def _can_keep(flat: Sequence[Any]) -> bool:
    """Whether casts can be kept from one call to the next: not by a compiler, of fake tensors, or in inference mode."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    adapters = [part for i, part in enumerate(flat) if i % PARTS in (LORA_A, LORA_B) and part is not None]
    return all(type(each) in (Tensor, torch.nn.Parameter) and not each.is_inference() for each in adapters)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b, rounded once."""
    if scale == 1.0:
        return a @ b
    if torch.compiler.is_compiling():  # which may multiply what beta=0 leaves out
        return (a @ b) * scale
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _check(x: Tensor, width: int, p: Projection, name: str) -> None:
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


def _plus_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a b, in place; under torch.compile out of place.

    Compiled by PyTorch 2.11, a Function whose forward changes one of its results in place has zeros for all gradients
    (2.13 is right); the compiler makes the operation out of place in any case.
    """
    return torch.addmm(y, a, b) if torch.compiler.is_compiling() else y.addmm_(a, b)
