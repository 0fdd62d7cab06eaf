"""The forwards that replace those of norms, alone and behind a residual addition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprice_kernels.ops import norms as ops
from fastprice_kernels.patching.installation import PATCH
from fastprice_kernels.patching.linear_layers import has_hooks

__all__ = ["NormPatch", "add_norm", "norm_forward"]


@dataclass
class NormPatch:
    """What the new forward of a norm reads.

    Attributes:
        kind: one of `ops.norms.NORMS`.
        eps: the name of the module's attribute.
        feeds_projections: whether only projections read the result, which cast it to the autocast dtype in any case.
        on_output: called with each result and a function that computes it again from what is saved anyway;
            selective recomputation uses it. None: results are saved.
    """

    kind: str
    eps: str
    feeds_projections: bool = False
    on_output: Callable[[Tensor, Callable[[], Tensor]], None] | None = None


def norm_forward(self: Any, x: Tensor) -> Tensor:
    """Of a norm."""
    patch: NormPatch = self.__dict__[PATCH]
    arguments = _arguments(self, patch, x)
    y = ops.norm(x, **arguments)
    _announce(patch, x, y, arguments)
    return y


def add_norm(norm: Any, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x + residual` (or x), and what the module `norm` makes of it: in one kernel where the norm runs on ours."""
    patch = norm.__dict__.get(PATCH)
    if not isinstance(patch, NormPatch) or has_hooks(norm) or (residual is not None and x.dtype != residual.dtype):
        total = x if residual is None else x + residual
        return total, norm(total)
    arguments = _arguments(norm, patch, x)
    total, y = ops.add_norm(x, residual, **arguments)
    _announce(patch, total, y, arguments)
    return total, y


def _arguments(norm: Any, patch: NormPatch, x: Tensor) -> dict[str, Any]:
    dtype = ops.norm_dtype(x.dtype, norm.weight.dtype, patch.kind)
    if patch.feeds_projections and dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    bias = getattr(norm, "bias", None)
    return {"weight": norm.weight, "eps": getattr(norm, patch.eps), "kind": patch.kind, "bias": bias, "dtype": dtype}


def _announce(patch: NormPatch, x: Tensor, y: Tensor, arguments: dict[str, Any]) -> None:
    if patch.on_output is None:
        return
    source, version = x.detach(), x._version

    def again() -> Tensor:
        if source._version != version:
            raise RuntimeError("the input of a norm was modified in place; use recompute='none'")
        with torch.no_grad():
            return ops.norm(source, **arguments)

    patch.on_output(y, again)
