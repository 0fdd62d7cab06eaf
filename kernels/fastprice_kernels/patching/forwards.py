"""The forwards that replace stock ones on linear layers and gated MLPs.

Each reads its layers at the call and runs the stock forward where the kernels cannot compute exactly the same, after
one warning with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastprice_kernels.ops.lora import Projection, lora_projections
from fastprice_kernels.ops.lora_mlp import lora_mlp
from fastprice_kernels.patching.cpu_faults import is_at_risk
from fastprice_kernels.patching.installation import PATCH, Patch, Pending
from fastprice_kernels.patching.linear_layers import Layer, compatible, has_hooks, read_layer
from fastprice_kernels.patching.structure import MLP

__all__ = ["layers_for", "linear_forward", "mlp", "mlp_forward", "run", "shared_forward"]

_GENERATION_ROWS = 16  # up to as many rows bitsandbytes has a kernel of its own, without gradients


def _stock(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


def layers_for(patch: Patch, x: Tensor, reads: Sequence[Layer | str | None]) -> list[Layer] | None:
    """The layers if the kernels are to run them on x; None for the stock path, after one warning with the reason."""
    layers = compatible(reads)
    if layers is None:
        for reason in reads:
            if isinstance(reason, str) and reason not in patch.installation.warned:
                patch.installation.warned.add(reason)
                warnings.warn(f"fastprice_kernels runs the stock path: {reason}", stacklevel=4)
        return None
    generates = not torch.is_grad_enabled() and x.numel() <= _GENERATION_ROWS * x.shape[-1]
    states = [layer.projection.quant_state for layer in layers]
    if not generates or states[0] is None or (not x.is_cuda and any(map(is_at_risk, states))):
        return layers
    return None


def run(function: Callable[..., Any], x: Tensor, layers: Sequence[Layer], **options: Any) -> tuple[Tensor, ...]:
    """`function(x, projections)` in the compute dtype of 4-bit layers, its results in that of x."""
    projections = [layer.projection for layer in layers]
    if projections[0].quant_state is None:
        return function(x, projections, **options)  # type: ignore[no-any-return]
    with torch.autocast(x.device.type, enabled=False):
        results = function(x.to(layers[0].dtype or x.dtype), projections, **options)
    return tuple(result.to(x.dtype) for result in results)


def mlp(x: Tensor, projections: Sequence[Projection], **options: Any) -> tuple[Tensor]:
    """`lora_mlp` with the arguments and the result of `lora_projections`."""
    return (lora_mlp(x, *projections, **options),)


def linear_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of a linear layer."""
    patch: Patch = self.__dict__[PATCH]
    layers = None if args or kwargs else layers_for(patch, x, [read_layer(self)])
    if layers is None:
        return _stock(self, x, *args, **kwargs)
    return run(lora_projections, x, layers, **patch.arguments)[0]


def shared_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of a linear layer that shares its input with others: the first one called computes all, the others use that."""
    patch: Patch = self.__dict__[PATCH]
    me = patch.siblings.index(self)
    # Under torch.compile reading a version counter breaks the graph; inference tensors have none.
    version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
    key = (version, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
    pending = patch.pending
    if pending is not None and pending.x is x and pending.key == key and me in pending.results:
        y = pending.results.pop(me)
        patch.pending = pending if pending.results else None
        return y
    patch.pending = None
    layers = None if args or kwargs else layers_for(patch, x, [read_layer(sibling) for sibling in patch.siblings])
    if layers is None:
        return linear_forward(self, x, *args, **kwargs)
    y, *others = run(lora_projections, x, layers[me:] + layers[:me], **patch.arguments)
    patch.pending = Pending(x, key, {(me + 1 + i) % len(layers): other for i, other in enumerate(others)})
    return y


def mlp_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of a gated MLP."""
    patch: Patch = self.__dict__[PATCH]
    parts = [getattr(self, name) for name in MLP]
    reads: list[Layer | str | None]
    reads = ["hooks on the layers of an MLP"] if has_hooks(*parts) else [read_layer(part) for part in parts]
    layers = None if args or kwargs else layers_for(patch, x, reads)
    if layers is None:
        return _stock(self, x, *args, **kwargs)
    return run(mlp, x, layers, activation=patch.activation, **patch.arguments)[0]
