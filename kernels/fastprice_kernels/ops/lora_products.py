"""The products of the projections that share an input: frozen weight and LoRA adapter, in both directions.

    t = x A^T          y = x W^T + s t B^T (+ bias)
    u = s dY B         dX = dY W + u A        dA = u^T x        dB = s dY^T t

They have two forms. *Separate*: y = x W^T, then y += t (sB)^T, which reads and writes y once more. *Augmented*: W is
dequantized into the first K columns of an (N, K + R') buffer whose other columns hold sB, and x is copied beside t, so
that one product each way computes both: [x | t] [W | sB]^T = y and dY [W | sB] = [dY W | u]. R' is R rounded up to 16
for alignment; the columns of a neighboring projection are 0. A 16-bit W would have to be copied as well.

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
    """The projections of one input: the products of both directions, in one dtype, without autograd.

    Attributes:
        a: the A of all projections, stacked: (R, K).
        scaled_b: s B of each projection, (N, r).
        slices: the part of R that belongs to each projection.
        spare: R', the columns of a buffer behind the first K, in the augmented form.
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

    def input_buffer(self, rows: int, like: Tensor) -> Tensor:
        """An uninitialized (T, K + R'): x written into its first K columns is used by `forward` without a copy."""
        return like.new_empty(rows, self.width + self.spare)

    def forward(self, x: Tensor, wide: Tensor | None = None) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
        """Each y (T, N); x (T, K) and t (T, R) to be saved for the backward; the weights, which may be saved too.

        `wide`: a buffer from `input_buffer` that already holds x.
        """
        k = self.width
        if self.augmented:
            if wide is None:
                wide = self.input_buffer(x.shape[0], x)
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

    def input_gradient(self, dys: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """dX (T, K) and u (T, R). `weights`: those that `forward` returned, where they were saved."""
        sums: Tensor | None = None
        for i, dy in enumerate(dys):
            weight = weights[i] if weights else self.weight(i)
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
        """u (T, R) alone, for an input that requires no gradient."""
        parts = [dy @ b for dy, b in zip(dys, self.scaled_b, strict=True) if b is not None]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0] if parts else dys[0].new_empty(dys[0].shape[0], 0)

    def parameter_gradients(
        self, dys: Sequence[Tensor], u: Tensor, x: Tensor, t: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradient of each part of each projection, in the order of `flatten`; None where it is not wanted."""
        gradients: list[Tensor | None] = [None] * len(wanted)
        da = u.T @ x if any(wanted[LORA_A::PARTS]) else None
        for i, (p, dy, at) in enumerate(zip(self.projections, dys, self.slices, strict=True)):
            first = PARTS * i
            if wanted[first + LORA_A] and p.lora_a is not None and da is not None:
                gradients[first + LORA_A] = da[at].to(p.lora_a.dtype)
            if wanted[first + LORA_B] and p.lora_b is not None:
                gradients[first + LORA_B] = (dy.T @ t[:, at]).to(p.lora_b.dtype).mul_(p.scale)
            if wanted[first + BIAS] and p.bias is not None:
                gradients[first + BIAS] = dy.sum(0, dtype=p.bias.dtype)
        return gradients

    @property
    def _a(self) -> Tensor:
        assert self.a is not None
        return self.a


def _plus_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a b, in place; under torch.compile out of place.

    Compiled by PyTorch 2.11, a Function whose forward changes one of its results in place has zeros for all gradients
    (2.13 is right); the compiler makes the operation out of place in any case.
    """
    return torch.addmm(y, a, b) if torch.compiler.is_compiling() else y.addmm_(a, b)
