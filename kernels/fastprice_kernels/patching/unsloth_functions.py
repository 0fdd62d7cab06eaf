"""Replaces Unsloth's functions by ours, in every module that imported them by name and on the layers of a model.

Written for Unsloth 2026.10.7. `fast_dequantize` is looked up in the importing modules at each call. The fused LoRA
functions are attached to attention layers and MLPs when a model gets its adapters, and are later found again by
comparison with the names in the modules (for FSDP): so one function of ours goes to both places. It reads from the
layer it is called on whether the kernels are installed there, and otherwise, or where they do not support the layer,
runs Unsloth's own. `matmul_lora` is not replaced: it computes the separate form of lora_products.py with the
dequantization that is replaced. The loss and the last layer are replaced on the model itself (unsloth_layers.py).

The replacement holds for the whole process, from the first model that uses it to the last one. Unsloth is never
imported here, only found among the loaded modules.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastprice_kernels.ops.nf4_dequantize import dequantize_nf4
from fastprice_kernels.patching.forwards import layers_for, run_mlp, run_projections
from fastprice_kernels.patching.installation import PATCH, Patch
from fastprice_kernels.patching.linear_layers import Layer
from fastprice_kernels.patching.structure import MLP, OUTPUT, QKV

__all__ = ["CORE", "Fused", "find_fused", "is_unsloth", "patch", "unpatch"]

_UTILS, _LORA = "unsloth.kernels.utils", "unsloth.kernels.fast_lora"


@dataclass
class _Function:
    """A function of Unsloth.

    Attributes:
        home: the module that defines it.
        parameters: their names.
        replace: makes our function from Unsloth's.
        users: models with kernels, while which it is replaced.
        stock, ours: Unsloth's function and ours, while it is replaced.
        modules: those whose name was replaced.
    """

    home: str
    parameters: tuple[str, ...]
    replace: Callable[[Any], Any]
    users: int = 0
    stock: Any = None
    ours: Any = None
    modules: list[Any] = field(default_factory=list)


class Fused(NamedTuple):
    """One of Unsloth's functions on a module: the attribute, its new value, and the layers that `kernel` then runs."""

    attribute: str
    ours: Any
    layers: Sequence[str]
    kernel: str


def is_unsloth(model: Any) -> bool:
    """Whether modules of the model run Unsloth's code: its forwards are on their classes, or its fused functions are
    attached to them."""
    return any(
        "apply_qkv" in module.__dict__
        or any(_comes_from_unsloth(forward) for forward in (type(module).forward, module.__dict__.get("forward")))
        for module in model.modules()
    )


def _comes_from_unsloth(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("unsloth.")


def patch(names: Sequence[str]) -> list[str]:
    """Replaces these functions for the whole process, all or none, and returns where; `unpatch` undoes one call.

    Raises:
        RuntimeError: Unsloth is not loaded, or a function is missing or has other parameters.
    """
    reasons = [each for each in (_mismatch(name) for name in names if not _FUNCTIONS[name].users) if each]
    if reasons:
        version = getattr(sys.modules.get("unsloth"), "__version__", "of unknown version")
        raise RuntimeError(f"Unsloth {version}: {'; '.join(reasons)}; nothing was replaced")
    for name in names:
        function = _FUNCTIONS[name]
        if not function.users:
            function.stock = getattr(sys.modules[function.home], name)
            function.ours = function.replace(function.stock)
            for _, module in sorted(sys.modules.items()):
                if _is_theirs(module) and vars(module).get(name) is function.stock:
                    function.modules.append(module)
                    setattr(module, name, function.ours)
        function.users += 1
    return [f"{module.__name__}.{name}" for name in names for module in _FUNCTIONS[name].modules]


def unpatch(names: Sequence[str]) -> None:
    """Undoes one `patch`; the last one restores Unsloth's function everywhere, also in modules loaded since."""
    for name in names:
        function = _FUNCTIONS[name]
        function.users = max(function.users - 1, 0)  # a deep copy of a model may be uninstalled as well
        if not function.users and function.ours is not None:
            for module in [each for each in sys.modules.values() if _is_theirs(each)]:
                if vars(module).get(name) is function.ours:
                    setattr(module, name, function.stock)
            function.stock = function.ours = None
            function.modules.clear()


def find_fused(module: nn.Module) -> list[Fused]:
    """Unsloth's `patch`ed functions that are attached to `module`."""
    found = []
    for attribute, name, layers, kernel in (
        ("apply_qkv", "apply_lora_qkv", QKV, "lora_qkv"),
        ("apply_o", "apply_lora_o", (OUTPUT,), "lora_linear"),
    ):
        function = _FUNCTIONS[name]
        if function.users and module.__dict__.get(attribute) in (function.stock, function.ours):
            found.append(Fused(attribute, function.ours, layers, kernel))
    # A tiled MLP has the fused function under another name.
    for attribute in ("forward", "_unsloth_forward"):
        bound = getattr(module.__dict__.get(attribute), "__func__", None)
        for name in _ACTIVATIONS:
            function = _FUNCTIONS[name]
            if function.users and getattr(bound, "func", bound) in (function.stock, function.ours):
                ours = function.ours if not isinstance(bound, partial) else partial(function.ours, **bound.keywords)
                found.append(Fused(attribute, MethodType(ours, module), MLP, "lora_mlp"))
    return found


def _is_theirs(module: Any) -> bool:
    """Unsloth, unsloth_zoo, and the modules that Unsloth writes for models it compiles."""
    return getattr(module, "__name__", "").startswith("unsloth") and hasattr(module, "__dict__")


def _mismatch(name: str) -> str | None:
    """How the loaded Unsloth differs from the one this was written for, in the function `name`; None if it does not."""
    function = _FUNCTIONS[name]
    home = sys.modules.get(function.home)
    if home is None:
        return f"{function.home} is not loaded; import unsloth before the model is made"
    stock = getattr(home, name, None)
    if not callable(stock):
        return f"{function.home}.{name} does not exist"
    found = inspect.signature(stock).parameters
    wanted = list(function.parameters)
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in found.values()):
        fits = set(found) >= set(wanted)
    else:
        fits = list(found) == wanted
    return None if fits else f"{function.home}.{name} takes {list(found)}, {wanted} was expected"


def _dequantize(stock: Any) -> Any:
    def fast_dequantize(
        W: Tensor, quant_state: Any = None, out: Tensor | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        is_bitsandbytes = type(quant_state).__module__.startswith("bitsandbytes.")
        if out is not None or not is_bitsandbytes or quant_state.quant_type != "nf4":
            result: Tensor = stock(W, quant_state, out=out, use_global_buffer=use_global_buffer)
            return result
        dense = dequantize_nf4(W, quant_state, dtype=quant_state.dtype)
        # A packed weight is one column; for its transpose, one row, the transpose of the weight is returned.
        return dense.t() if W.shape[0] == 1 else dense

    return fast_dequantize


def _qkv(stock: Any) -> Any:
    def apply_lora_qkv(self: Any, X: Tensor, inplace: bool = True) -> Any:
        results = _try(self, X, QKV)
        return stock(self, X, inplace) if results is None else results

    return apply_lora_qkv


def _output(stock: Any) -> Any:
    def apply_lora_o(self: Any, X: Tensor) -> Any:
        results = _try(self, X, (OUTPUT,))
        return stock(self, X) if results is None else results[0]

    return apply_lora_o


def _mlp(activation: str) -> Callable[[Any], Any]:
    def replace(stock: Any) -> Any:
        def apply_lora_mlp(self: Any, X: Tensor, *inplace: Any, **named: Any) -> Any:
            found = _layers(self, X, MLP)
            return stock(self, X, *inplace, **named) if found is None else run_mlp(*found, activation=activation)

        return apply_lora_mlp

    return replace


def _layers(self: Any, x: Tensor, names: Sequence[str]) -> tuple[Patch, Tensor, Sequence[Layer]] | None:
    """What the kernels run for these layers of `self`, or None where Unsloth's own function has to run."""
    patch = self.__dict__.get(PATCH)
    layers = None if patch is None else layers_for(patch, x, [getattr(self, name) for name in names])
    return None if layers is None else (patch, x, layers)


def _try(self: Any, x: Tensor, names: Sequence[str]) -> tuple[Tensor, ...] | None:
    """The kernels' results on layers of `self` that share x, or None."""
    found = _layers(self, x, names)
    return None if found is None else tuple(run_projections(*found))


_ACTIVATIONS = {
    "apply_lora_mlp_swiglu": "silu",
    "apply_lora_mlp_geglu_exact": "gelu",
    "apply_lora_mlp_geglu_approx": "gelu_tanh",
}
_FUNCTIONS = {
    "fast_dequantize": _Function(_UTILS, ("W", "quant_state", "out", "use_global_buffer"), _dequantize),
    "apply_lora_qkv": _Function(_LORA, ("self", "X", "inplace"), _qkv),
    "apply_lora_o": _Function(_LORA, ("self", "X"), _output),
    "apply_lora_mlp_swiglu": _Function(_LORA, ("self", "X", "inplace"), _mlp("silu")),
    "apply_lora_mlp_geglu_exact": _Function(_LORA, ("self", "X", "inplace"), _mlp("gelu")),
    "apply_lora_mlp_geglu_approx": _Function(_LORA, ("self", "X"), _mlp("gelu_tanh")),
}
CORE = tuple(_FUNCTIONS)
