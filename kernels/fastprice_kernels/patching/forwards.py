"""The forwards that replace stock ones on linear layers and gated MLPs.

Each reads its layers at the call and runs the stock forward where the kernels cannot compute exactly the same, after
one warning with the reason. As long as the layers are the same, so is their `ProjectionGroup`, which holds what need
not be computed again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprice_kernels.ops.lora import apply_projections, compute_input
from fastprice_kernels.ops.lora_mlp import apply_mlp
from fastprice_kernels.ops.lora_products import ProjectionGroup
from fastprice_kernels.patching.cpu_faults import is_at_risk
from fastprice_kernels.patching.installation import PATCH, Patch, Pending
from fastprice_kernels.patching.linear_layers import Layer, LayerRead, compatible, has_hooks, read_layer
from fastprice_kernels.patching.structure import MLP

__all__ = ["layers_for", "linear_forward", "mlp_forward", "run_mlp", "run_projections", "shared_forward"]

_GENERATION_ROWS = 16  # up to as many rows bitsandbytes has a kernel of its own, without gradients
_MOST_GROUPS = 8  # of one patch: more are left over from adapters that were replaced


def _stock(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


def _read(patch: Patch, module: nn.Module) -> Layer | str | None:
    if torch.compiler.is_compiling():
        return read_layer(module)
    read = patch.reads.get(module)
    if read is None:
        read = patch.reads[module] = LayerRead(module)
    return read()


def layers_for(patch: Patch, x: Tensor, modules: Sequence[nn.Module]) -> list[Layer] | None:
    """The layers if the kernels are to run them on x; None for the stock path, after one warning with the reason."""
    reads = [_read(patch, module) for module in modules]
    layers = compatible(reads)
    if layers is None:
        for reason in reads:
            if isinstance(reason, str):
                _warn(patch, reason)
        return None
    generates = not torch.is_grad_enabled() and x.numel() <= _GENERATION_ROWS * x.shape[-1]
    if not generates or layers[0].projection.quant_state is None:
        return layers
    return layers if not x.is_cuda and any(is_at_risk(layer.projection.quant_state) for layer in layers) else None


def _warn(patch: Patch, reason: str) -> None:
    if reason not in patch.installation.warned:
        patch.installation.warned.add(reason)
        warnings.warn(f"fastprice_kernels runs the stock path: {reason}", stacklevel=5)


def _group(patch: Patch, layers: Sequence[Layer]) -> ProjectionGroup:
    """That of the layers, the same one as long as they are the same."""
    projections = [layer.projection for layer in layers]
    if torch.compiler.is_compiling():
        return ProjectionGroup(projections)
    key = tuple(map(id, layers))
    found = patch.groups.get(key)
    if found is None:
        if len(patch.groups) >= _MOST_GROUPS:
            patch.groups.clear()
        found = patch.groups[key] = layers, ProjectionGroup(projections)
        for resident in patch.resident.values():
            if resident.fits(projections):
                found[1].resident = resident.weights
    return found[1]


def _run(function: Callable[[Tensor], Sequence[Tensor]], x: Tensor, layer: Layer) -> Sequence[Tensor]:
    """`function(x)` in the compute dtype of 4-bit layers, its results in that of x."""
    if layer.projection.quant_state is None:
        return function(compute_input(x))
    if layer.dtype is None or layer.dtype == x.dtype:
        return function(x)
    return [result.to(x.dtype) for result in function(x.to(layer.dtype))]


def run_projections(patch: Patch, x: Tensor, layers: Sequence[Layer]) -> Sequence[Tensor]:
    """Of layers that share x."""
    group = _group(patch, layers)
    return _run(lambda x: apply_projections(x, group, **patch.arguments), x, layers[0])


def run_mlp(patch: Patch, x: Tensor, layers: Sequence[Layer], **options: Any) -> Tensor:
    """Of gate, up and down; `options` in place of the patch's own."""
    groups = _group(patch, layers[:2]), _group(patch, layers[2:])
    return _run(lambda x: (apply_mlp(x, groups, **{**patch.mlp_arguments, **options}),), x, layers[0])[0]


def linear_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of a linear layer."""
    patch: Patch = self.__dict__[PATCH]
    layers = None if args or kwargs else layers_for(patch, x, (self,))
    if layers is None:
        return _stock(self, x, *args, **kwargs)
    return run_projections(patch, x, layers)[0]


def shared_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of a linear layer that shares its input with others: the first one called computes all, the others use that."""
    patch: Patch = self.__dict__[PATCH]
    (siblings,) = patch.stacks
    me = siblings.index(self)
    # Under torch.compile reading a version counter breaks the graph; inference tensors have none.
    version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
    key = (version, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
    pending = patch.pending
    if pending is not None and pending.x is x and pending.key == key and me in pending.results:
        y = pending.results.pop(me)
        patch.pending = pending if pending.results else None
        return y
    patch.pending = None
    layers = None if args or kwargs else layers_for(patch, x, siblings)
    if layers is None:
        return linear_forward(self, x, *args, **kwargs)
    results = dict(enumerate(run_projections(patch, x, layers)))
    y = results.pop(me)
    patch.pending = Pending(x, key, results)
    return y


def mlp_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of a gated MLP."""
    patch: Patch = self.__dict__[PATCH]
    parts = [self._modules[name] for name in MLP]
    if has_hooks(*parts):
        _warn(patch, "hooks on the layers of an MLP")
        layers = None
    else:
        layers = None if args or kwargs else layers_for(patch, x, parts)
    if layers is None:
        return _stock(self, x, *args, **kwargs)
    return run_mlp(patch, x, layers)
