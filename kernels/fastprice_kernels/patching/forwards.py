"""What runs in place of a stock forward, and what it finds beside it: `Patch`, in the `__dict__` of its module.

Written to and taken out by install.py.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastprice_kernels.ops.lora import Projection, lora_mlp, lora_projections
from fastprice_kernels.patching.cpu_faults import is_at_risk
from fastprice_kernels.patching.last_layer import PATCH
from fastprice_kernels.patching.layers import Layer, hooked, read, together

__all__ = [
    "InstallReport",
    "Installation",
    "Options",
    "Patch",
    "layers_for",
    "linear_forward",
    "mlp",
    "mlp_forward",
    "run",
    "shared_forward",
]

_DECODE_ROWS = 16


@dataclass(frozen=True)
class InstallReport:
    """What `install` did: `replaced` maps a module's name to the kernel it runs now, `kept` to why it stays stock."""

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{count} x {kernel}" for kernel, count in Counter(self.replaced.values()).items()]
        lines += [f"{count} x stock: {reason}" for reason, count in Counter(self.kept.values()).items()]
        return "\n".join(lines) or "nothing to replace"


@dataclass(frozen=True)
class Options:
    """The options of `install`."""

    loss_head: bool = False
    last_layer: bool = False
    keep_dense: bool = False
    augmented: bool = False


@dataclass
class Installation:
    """What `uninstall` takes back."""

    options: Options
    report: InstallReport = field(default_factory=InstallReport)
    # Module, attribute, what it held of its own before, ours.
    attributes: list[tuple[nn.Module, str, Any, Any]] = field(default_factory=list)
    spared: list[nn.Module] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    unsloth: tuple[str, ...] = ()  # names replaced in Unsloth's modules


@dataclass
class _Pending:
    """Results of one x that wait to be picked up by the modules that share it. It holds x, whose identity counts."""

    x: Tensor
    key: tuple[Any, ...]
    results: dict[int, Tensor]


@dataclass
class Patch:
    """Beside the replaced forward of linear layers and MLPs: the installation, the layer around that may be recomputed,
    the modules that share x with it, and an MLP's activation."""

    installation: Installation
    around: nn.Module | None
    siblings: tuple[nn.Module, ...] = ()
    activation: str = "silu"
    pending: _Pending | None = None

    @property
    def arguments(self) -> dict[str, bool]:
        options, around = self.installation.options, self.around
        recomputes = around is not None and around.training and bool(getattr(around, "gradient_checkpointing", False))
        return {"keep_dense": options.keep_dense and recomputes, "augmented": options.augmented}


def _stock(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


def layers_for(patch: Patch, x: Tensor, reads: Sequence[Layer | str | None]) -> list[Layer] | None:
    """The layers if the kernels are to run them on x; None sends the call to the stock path, after one warning."""
    layers = together(reads)
    if layers is None:
        for reason in reads:
            if isinstance(reason, str) and reason not in patch.installation.warned:
                patch.installation.warned.add(reason)
                warnings.warn(f"fastprice_kernels goes back to the stock path: {reason}", stacklevel=4)
        return None
    decodes = not torch.is_grad_enabled() and x.numel() <= _DECODE_ROWS * x.shape[-1]
    states = [layer.projection.quant_state for layer in layers]
    if not decodes or states[0] is None or (not x.is_cuda and any(map(is_at_risk, states))):
        return layers
    return None


def run(function: Callable[..., Any], x: Tensor, layers: Sequence[Layer], **options: Any) -> tuple[Tensor, ...]:
    """`function(x, projections)` in the dtype that 4-bit layers compute in, its results in that of x."""
    projections = [layer.projection for layer in layers]
    if projections[0].quant_state is None:
        return function(x, projections, **options)  # type: ignore[no-any-return]
    with torch.autocast(x.device.type, enabled=False):
        results = function(x.to(layers[0].dtype or x.dtype), projections, **options)
    return tuple(result.to(x.dtype) for result in results)


def mlp(x: Tensor, projections: Sequence[Projection], **options: Any) -> tuple[Tensor]:
    return (lora_mlp(x, *projections, **options),)


def linear_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    patch: Patch = self.__dict__[PATCH]
    layers = None if args or kwargs else layers_for(patch, x, [read(self)])
    if layers is None:
        return _stock(self, x, *args, **kwargs)
    return run(lora_projections, x, layers, **patch.arguments)[0]


def shared_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    patch: Patch = self.__dict__[PATCH]
    me = patch.siblings.index(self)
    # Compiled code makes a graph break of every question about a version counter; inference tensors have none.
    version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
    key = (version, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
    pending = patch.pending
    if pending is not None and pending.x is x and pending.key == key and me in pending.results:
        y = pending.results.pop(me)
        patch.pending = pending if pending.results else None
        return y
    patch.pending = None
    layers = None if args or kwargs else layers_for(patch, x, [read(sibling) for sibling in patch.siblings])
    if layers is None:
        return linear_forward(self, x, *args, **kwargs)
    y, *others = run(lora_projections, x, layers[me:] + layers[:me], **patch.arguments)
    patch.pending = _Pending(x, key, {(me + 1 + i) % len(layers): other for i, other in enumerate(others)})
    return y


def mlp_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    patch: Patch = self.__dict__[PATCH]
    parts = [self.gate_proj, self.up_proj, self.down_proj]
    reads: list[Layer | str | None] = ["hooks on the layers of an MLP"] if hooked(*parts) else [read(p) for p in parts]
    layers = None if args or kwargs else layers_for(patch, x, reads)
    if layers is None:
        return _stock(self, x, *args, **kwargs)
    return run(mlp, x, layers, activation=patch.activation, **patch.arguments)[0]
