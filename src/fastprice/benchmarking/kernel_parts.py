"""What the kernel cases share: how to fetch kernels and Unsloth's functions, and how exact a result must be."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

__all__ = ["BANDS", "dtype_name", "generator_on", "ours", "with_unsloth"]

# Relative error of one product or sum in each dtype; cases with several allow as many times that.
BANDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}


def ours(module: str, name: str) -> Callable[..., Any]:
    """A function of fastprice_kernels, or one that raises what importing it raised."""
    try:
        found: Callable[..., Any] = getattr(import_module(f"fastprice_kernels.{module}"), name)
    except (ImportError, AttributeError) as error:
        reason = str(error)

        def missing(*_: Any, **__: Any) -> Any:
            raise ImportError(reason)

        return missing
    return found


def generator_on(device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(0)


def with_unsloth(
    functions: dict[str, Callable[[], Any]],
    absent: dict[str, str],
    name: str,
    make: Callable[[Callable[..., Any]], Callable[[], Any]],
) -> None:
    try:
        # Through the engine, which alone imports unsloth and keeps its compile cache out of the current folder.
        import_module("fastprice.models.unsloth_engine")
        functions["unsloth"] = make(getattr(import_module("unsloth.kernels.utils"), name))
    except Exception as error:  # whatever it raises on this machine, the row says so
        absent["unsloth"] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:300]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
