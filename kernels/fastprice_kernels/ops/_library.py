"""Registers the operators under `torch.ops.fastprice`.

They are defined directly on the dispatcher: a call of a `torch.library.custom_op` costs 30 to 96 us in Python, a call
of these 4 to 7 (one CPU core), and a model makes two calls for each MLP and seven for each layer's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["define_op"]

_LIBRARY = torch.library.Library("fastprice", "FRAGMENT")


def define_op(
    schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Defines the operator of `schema`, such as "name(Tensor x) -> Tensor", and returns it.

    `cpu` and `cuda` compute it; `fake` gives empty results of the right shapes and dtypes, for torch.compile. The first
    argument is a tensor on the device of all others.
    """
    name = schema.partition("(")[0]

    def on_device(first: Tensor, *others: Any) -> Any:
        with torch.cuda.device(first.device):  # Triton launches on the current device, whatever its arguments
            return cuda(first, *others)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, on_device, "CUDA")
    torch.library.register_fake(f"fastprice::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.fastprice, name).default
    return operator
