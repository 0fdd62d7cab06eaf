"""Puts `dequantize_nf4` in the place of Unsloth's `fast_dequantize`, in every module that imported it by name.

Written against Unsloth 2026.10.7, where `matmul_lora` and the fused layers of `unsloth.kernels.fast_lora` look
`fast_dequantize` up in their own module at each call. That version has a Triton kernel of its own for NF4, on CUDA
devices of capability 7.0 and up; older ones take three launches. `matmul_lora` stays: its products are `lora.py`'s
separate form, and it calls what is replaced here. Unsloth is never imported here, only found where it is loaded.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor

from fastprice_kernels.nf4 import dequantize_nf4

__all__ = ["is_unsloth", "patch", "unpatch"]

_NAME = "fast_dequantize"
_PARAMETERS = ["W", "quant_state", "out", "use_global_buffer"]
_HOME = "unsloth.kernels.utils"
_users = 0
_replaced: list[tuple[Any, Any]] = []  # module, its function before


def is_unsloth(model: Any) -> bool:
    """Whether Unsloth's fused layers are in the model: it hangs them on attention layers and MLPs."""
    return any(
        "apply_qkv" in module.__dict__
        or getattr(module.__dict__.get("forward"), "__module__", "").startswith("unsloth.")
        for module in model.modules()
    )


def patch() -> list[str]:
    """Replaces the function for the whole process and names the modules; a second call counts and changes nothing.

    Raises:
        RuntimeError: Unsloth is not loaded, or the function is gone or has another signature.
    """
    global _users
    if not _replaced:
        home = sys.modules.get(_HOME)
        if home is None:
            raise RuntimeError(f"{_HOME} is not loaded; import unsloth before the model is made")
        stock = getattr(home, _NAME, None)
        parameters = list(inspect.signature(stock).parameters) if callable(stock) else None
        if parameters != _PARAMETERS:
            version = getattr(sys.modules.get("unsloth"), "__version__", "of unknown version")
            found = "is gone" if parameters is None else f"takes {parameters}"
            raise RuntimeError(
                f"Unsloth {version}: {_HOME}.{_NAME} {found}, {_PARAMETERS} was expected; Unsloth's own kernels stay"
            )
        ours = _replacement(stock)
        for name, module in sorted(sys.modules.items()):
            if (name == "unsloth" or name.startswith(("unsloth.", "unsloth_zoo."))) and vars(module).get(
                _NAME
            ) is stock:
                _replaced.append((module, stock))
                setattr(module, _NAME, ours)
    _users += 1
    return [f"{module.__name__}.{_NAME}" for module, _ in _replaced]


def unpatch() -> None:
    """Takes one `patch` back; the last one restores Unsloth's function everywhere."""
    global _users
    _users -= 1
    if not _users:
        for module, stock in _replaced:
            setattr(module, _NAME, stock)
        _replaced.clear()


def _replacement(stock: Any) -> Any:
    def fast_dequantize(
        W: Tensor, quant_state: Any = None, out: Tensor | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        is_bitsandbytes = type(quant_state).__module__.startswith("bitsandbytes.")
        if out is not None or not is_bitsandbytes or quant_state.quant_type != "nf4":
            result: Tensor = stock(W, quant_state, out=out, use_global_buffer=use_global_buffer)
            return result
        dense = dequantize_nf4(W, quant_state, dtype=quant_state.dtype)
        # A packed weight is one column; its transpose, one row, asks for the transpose of the weight.
        return dense.t() if W.shape[0] == 1 else dense

    return fast_dequantize
