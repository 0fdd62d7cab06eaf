"""Attention layers whose rotary embedding runs as one kernel, in place.

A layer's own code runs, with one name in it bound to another function: its forward is copied with
`apply_rotary_pos_emb` replaced among its globals. Whatever else a family does (norms of heads, caches, windows, caps)
stays as it is written, and no module of the library is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor

from fastprice_kernels.ops.rotary import rotate_
from fastprice_kernels.patching.structure import ROTARY, rotary_form

__all__ = ["attention_forward", "unsupported_attention"]


def unsupported_attention(kind: Any) -> str | None:
    """The reason why the rotary embedding of an attention class cannot be replaced; None if it can."""
    forward = kind.__dict__.get("forward")
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return "its forward is not a plain function"
    stock = forward.__globals__.get(ROTARY)
    if ROTARY not in forward.__code__.co_names or stock is None:
        return f"its code calls no {ROTARY}"
    return None if rotary_form(stock) else f"its {ROTARY} computes none of the known forms"


@functools.cache
def attention_forward(kind: Any) -> Callable[..., Any]:
    """The forward of an attention class that `unsupported_attention` has no objection to, on our kernel."""
    stock: Any = kind.__dict__["forward"]
    form = rotary_form(stock.__globals__[ROTARY])
    assert form is not None

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim == 2:  # heads behind tokens
            q, k = rotate_(q.transpose(1, 2), k.transpose(1, 2), cos, sin, form)
            return q.transpose(1, 2), k.transpose(1, 2)
        return rotate_(q, k, cos, sin, form)

    names = {**stock.__globals__, ROTARY: apply_rotary_pos_emb}
    del names["__name__"]  # by which torch.compile would look the names up in the library's module
    forward = FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__)
    forward.__kwdefaults__ = stock.__kwdefaults__
    return forward
