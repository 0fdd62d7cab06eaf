"""Linear layers of PEFT and bitsandbytes as `Projection`s, without importing these libraries.

A layer is read at each call, because adapters are added, disabled and merged and change their dropout while a model
exists. `LayerRead` remembers what was read and compares, by identity, all that it depended on, so that a call where
nothing changed costs a few dictionary look-ups and returns the same object. What the kernels do not support is returned
as a reason, in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from fastprice_kernels.ops.lora import Projection

__all__ = ["Layer", "LayerRead", "compatible", "has_hooks", "is_candidate", "read_layer"]

_FOUR_BIT = (("bitsandbytes", "Linear4bit"), ("bitsandbytes", "LinearNF4"))
_LORA_LINEAR = ("Linear", "Linear4bit")


@dataclass(frozen=True)
class Layer:
    """What a linear layer computes; `dtype` is the compute dtype of a 4-bit layer that has a fixed one, or None."""

    projection: Projection
    dtype: torch.dtype | None


def is_candidate(module: nn.Module) -> bool:
    """Whether `module` is a LoRA layer of PEFT or a 4-bit layer of bitsandbytes."""
    return _is_lora(module) or _kind(module) in _FOUR_BIT


def read_layer(module: nn.Module) -> Layer | str | None:
    """What `module` computes now; a reason why the kernels cannot; None where its adapter is disabled or merged."""
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
    if has_hooks(a, b, layer.base_layer):
        return "hooks on an adapter or a base layer"
    return _read_base(layer.base_layer, a.weight, b.weight, float(layer.scaling[name]))


class LayerRead:
    """`read_layer` of one module, repeated only where something that it depends on is another object than before."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._seen: tuple[Any, ...] = ()
        self._result: Layer | str | None = None

    def __call__(self) -> Layer | str | None:
        """What `module` computes now; the same object as long as nothing changed."""
        try:
            now = _dependencies(self.module)
        except (AttributeError, KeyError, ValueError):  # not the one kind of layer that is fast to compare
            return read_layer(self.module)
        if len(now) != len(self._seen) or not all(map(is_, now, self._seen)):
            self._result, self._seen = read_layer(self.module), now
        return self._result


def _dependencies(module: Any) -> tuple[Any, ...]:
    """All that `read_layer` reads of a layer with at most one active adapter; numbers and strings as the objects that
    the layer holds."""
    own = module.__dict__
    parts = own["_modules"]
    if "base_layer" not in parts:
        return _base_dependencies(module)
    active = module._active_adapter
    (name,) = (active,) if isinstance(active, str) else active
    a, b = parts["lora_A"]._modules[name], parts["lora_B"]._modules[name]
    dropout, base = parts["lora_dropout"]._modules[name], parts["base_layer"]
    return (
        name,
        module._disable_adapters,
        bool(module.merged_adapters),
        own["fan_in_fan_out"],
        own["scaling"][name],
        own["lora_variant"].get(name),
        *(a, a._parameters["weight"], a._parameters["bias"], b, b._parameters["weight"], b._parameters["bias"]),
        *(dropout, dropout.training, dropout.__dict__.get("p")),
        has_hooks(a, b, base),
        *_base_dependencies(base),
    )


def _base_dependencies(base: Any) -> tuple[Any, ...]:
    weight = base._parameters["weight"]
    settings = base.__dict__
    if type(weight) is nn.Parameter:
        return (base, weight, weight.requires_grad, base._parameters["bias"])
    # Attributes of a bitsandbytes weight go through its `__torch_function__`, those in its `__dict__` do not.
    state = weight.__dict__["quant_state"]
    return (
        *(base, weight, base._parameters["bias"], state),
        *((None, None) if state is None else (state.quant_type, vars(state).get("packing_format_for_cpu"))),
        *(settings.get("compute_dtype"), settings.get("compute_type_is_set")),
    )


def compatible(reads: Sequence[Layer | str | None]) -> list[Layer] | None:
    """The layers, if the kernels can run all of them and they have one compute dtype; else None."""
    layers = [layer for layer in reads if isinstance(layer, Layer)]
    if len(layers) < len(reads) or len({(layer.dtype, layer.projection.quant_state is None) for layer in layers}) > 1:
        return None
    return layers


def has_hooks(*modules: nn.Module) -> bool:
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
            return "4-bit weights that are not quantized yet"
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
