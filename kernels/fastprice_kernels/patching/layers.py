"""What the modules of a model compute, told without importing the libraries they come from.

A linear layer is read as a `Projection`, or as the reason why the kernels cannot run it; an MLP's code is run on
symbols and its activation on numbers, so that a module counts as gated because it is, and not by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastprice_kernels.ops.gated_activations import ACTIVATIONS
from fastprice_kernels.ops.lora import Projection
from fastprice_kernels.reference.lora import activation as reference_activation

__all__ = ["Layer", "Symbol", "activation_of", "hooked", "is_candidate", "is_gated", "read", "together"]

_FOUR_BIT = (("bitsandbytes", "Linear4bit"), ("bitsandbytes", "LinearNF4"))
_LORA_LINEAR = ("Linear", "Linear4bit")


@dataclass(frozen=True)
class Layer:
    """What a linear module computes; `dtype` is the compute dtype that a 4-bit layer insists on, if it does."""

    projection: Projection
    dtype: torch.dtype | None


def is_candidate(module: nn.Module) -> bool:
    """Whether there is something for the kernels to do: a LoRA layer of PEFT's, or a 4-bit layer of bitsandbytes'."""
    return _is_lora(module) or _kind(module) in _FOUR_BIT


def read(module: nn.Module) -> Layer | str | None:
    """What `module` computes now; or why the kernels cannot; or None where its stock path is the right one.

    Adapters are added, switched off, merged and given another dropout while a model lives: ask at every call.
    """
    if not _is_lora(module):
        return _read_base(module, None, None, 1.0)
    layer: Any = module
    kind = type(module).__qualname__
    if kind not in _LORA_LINEAR or layer.fan_in_fan_out:
        return f"a LoRA layer of kind {kind}"
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return _read_base(layer.base_layer, None, None, 1.0)
    if len(active) > 1:
        return "several adapters active at once"
    (name,) = active
    if name in layer.lora_variant:
        return f"a variant of LoRA ({type(layer.lora_variant[name]).__name__})"
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if not all(type(part) is nn.Linear and part.bias is None for part in (a, b)):
        return "an adapter with a bias or of another kind"
    if getattr(dropout, "p", 0.0) > 0 and dropout.training:
        return f"LoRA dropout of {dropout.p}"
    if hooked(a, b, layer.base_layer):
        return "hooks on an adapter or a base layer"
    return _read_base(layer.base_layer, a.weight, b.weight, float(layer.scaling[name]))


def together(reads: Sequence[Layer | str | None]) -> list[Layer] | None:
    """The layers, if all can run and agree on a compute dtype."""
    layers = [layer for layer in reads if isinstance(layer, Layer)]
    if len(layers) < len(reads) or len({(layer.dtype, layer.projection.quant_state is None) for layer in layers}) > 1:
        return None
    return layers


def hooked(*modules: nn.Module) -> bool:
    """Whether any of the modules has a hook, which would not run if its forward were not called."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def _kind(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__.partition(".")[0], type(module).__qualname__


def _is_lora(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.tuners.lora.") and hasattr(module, "base_layer")


def _read_base(module: nn.Module, a: Tensor | None, b: Tensor | None, scale: float) -> Layer | str:
    base: Any = module
    if _kind(module) in _FOUR_BIT:
        state = getattr(base.weight, "quant_state", None)
        if state is None:
            return "4-bit weights that are not quantised yet"
        if state.quant_type != "nf4" or base.weight.dtype != torch.uint8:
            return f"{state.quant_type} weights stored as {base.weight.dtype}"
        if getattr(state, "packing_format_for_cpu", False):
            return "4-bit weights that bitsandbytes repacked for inference on this CPU"
        dtype = base.compute_dtype if base.compute_type_is_set else None
        return Layer(Projection(base.weight, a, b, scale, base.bias, state), dtype)
    if type(base) is not nn.Linear:
        return f"a base layer of class {type(base).__name__}"
    if base.weight.requires_grad:
        return "a base weight that trains"
    return Layer(Projection(base.weight, a, b, scale, base.bias), None)


class Symbol:
    """Stands for a tensor while a module's code is run to see what it computes; + and * commute."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __mul__(self, other: Symbol) -> Symbol:
        return Symbol("*", frozenset([self, other]))

    def __add__(self, other: Symbol) -> Symbol:
        return Symbol("+", frozenset([self, other]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Symbol) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)


def is_gated(kind: type[nn.Module]) -> bool:
    """Whether `kind.forward` is `down_proj(act_fn(gate_proj(x)) * up_proj(x))`."""

    def part(name: str) -> Any:
        return lambda x: Symbol(name, x)

    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    x = Symbol("x")
    want = Symbol("down_proj", Symbol("act_fn", Symbol("gate_proj", x)) * Symbol("up_proj", x))
    try:
        return bool(kind.forward(SimpleNamespace(**{name: part(name) for name in names}), x) == want)
    except (AttributeError, TypeError):  # it does something else with its parts
        return False


def activation_of(module: nn.Module) -> str | None:
    """Which of `ACTIVATIONS` the module's `act_fn` is, told by its values; None if it is another."""
    act = getattr(module, "act_fn", None)
    if not callable(act) or (isinstance(act, nn.Module) and next(act.parameters(), None) is not None):
        return None
    z = torch.linspace(-60, 60, 6001, dtype=torch.float64)
    with torch.no_grad():
        values = act(z)
    # The exact gelu and the one by tanh differ by 5e-4 at most, fp64 code from itself by 1e-15.
    return next((kind for kind in ACTIVATIONS if (values - reference_activation(z, kind)).abs().max() < 1e-7), None)
