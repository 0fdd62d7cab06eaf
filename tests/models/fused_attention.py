"""A CPU stand-in for the fused attention of packs on CUDA: it saves what `varlen_attn` saves, and takes part in the
choice of a backend like the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprice.models import attention_backends, packed_attention


class _VariableLength(torch.autograd.Function):
    """Saves q, k, v, the output, its log-sum-exp, the borders and the state of the random number generator."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *options: Any) -> Tensor:
        output = packed_attention._masked_attention(q, k, v, cu_seqlens, *options)
        log_sums, rng = output.new_zeros(q.shape[1], q.shape[2]), torch.zeros(2, dtype=torch.uint64)
        ctx.save_for_backward(q, k, v, output, log_sums, cu_seqlens, rng)
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, _, _, cu_seqlens, _ = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [each.detach().requires_grad_() for each in inputs]
            output = packed_attention._masked_attention(*leaves, cu_seqlens, *ctx.options)
            return *torch.autograd.grad(output, leaves, gradients), None, None, None


def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scaling: float | None, window: int | None
) -> Tensor:
    output: Tensor = _VariableLength.apply(q, k, v, cu_seqlens, scaling, window)
    return output


def forget_choices() -> None:
    for cached in (
        attention_backends.attention_choice,
        attention_backends._failure,
        attention_backends._warn_once,
    ):
        cached.cache_clear()


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention of packs on a CPU as on CUDA: no backend is chosen yet, xformers is not installed, varlen works."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_backends, "_may_have_kernels", lambda device, dtype: True)
        for module in (attention_backends, packed_attention):
            patch.setattr(module, "varlen_attention", _varlen_attention)
        forget_choices()
        yield
    forget_choices()
