"""Registers the operators under `torch.ops.fastprice`, and calls them at little cost.

They are defined directly on the dispatcher: a call of a `torch.library.custom_op` costs 30 to 96 us in Python, a call
of these 4 to 7 (one CPU core), and a model makes two calls for each MLP and seven for each layer's weights. Nothing
but a compiler, a dispatch mode or a tensor subclass needs the dispatcher: without them the implementation is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["define_op", "on_own_device"]

_LIBRARY = torch.library.Library("fastprice", "FRAGMENT")


def define_op(
    schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Defines the operator of `schema`, such as "name(Tensor x) -> Tensor", and returns a function that computes it.

    `cpu` and `cuda` compute it; `fake` gives empty results of the right shapes and dtypes, for torch.compile. The first
    argument is a tensor on the device of all others. The operator has no gradient: inputs that require one are for an
    `autograd.Function` around it.

    The function's attribute `direct` has the implementations, for CUDA under True and for the CPU under False.
    """
    name = schema.partition("(")[0]
    on_device = on_own_device(cuda)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, on_device, "CUDA")
    torch.library.register_fake(f"fastprice::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.fastprice, name).default
    direct = {True: on_device, False: cpu}

    def call(first: Tensor, *others: Any) -> Any:
        if torch.compiler.is_compiling() or type(first) is not Tensor or torch._C._len_torch_dispatch_stack():
            return operator(first, *others)
        return direct[first.is_cuda](first, *others)

    call.direct = direct  # type: ignore[attr-defined]
    return call


def on_own_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """`launch` under the device of its first argument, a CUDA tensor: Triton launches on the current device, whatever
    the arguments."""

    def guarded(first: Tensor, *others: Any) -> Any:
        if first.get_device() == torch.cuda.current_device():
            return launch(first, *others)
        with torch.cuda.device(first.device):
            return launch(first, *others)

    return guarded
