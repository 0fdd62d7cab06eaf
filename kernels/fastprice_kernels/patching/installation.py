"""The state of an installation: options, report, what `uninstall` restores, and what a replaced forward reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = [
    "INSTALLATION",
    "PATCH",
    "RECOMPUTE_MLP",
    "InstallReport",
    "Installation",
    "Options",
    "Patch",
    "Pending",
    "Volatile",
]

RECOMPUTE_MLP = "recompute_mlp"  # the key in the `__dict__` of a decoder layer
INSTALLATION = "_fastprice_installation"  # the key of an `Installation` in the `__dict__` of a model
PATCH = "_fastprice_patch"  # the key of a `Patch` (or `LossPatch`) in the `__dict__` of a module with a new forward


@dataclass(frozen=True)
class InstallReport:
    """The result of `install`.

    Attributes:
        replaced: from the name of a module to the kernel that it runs.
        skipped: from the name of a module to the reason why it runs its stock forward.
        dense: from the name of a decoder layer whose frozen weights are resident in 16 bits to their bytes.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    dense: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{count} x {kernel}" for kernel, count in Counter(self.replaced.values()).items()]
        lines += [f"{count} x stock: {reason}" for reason, count in Counter(self.skipped.values()).items()]
        if self.dense:
            lines.append(f"{len(self.dense)} x dense weights: {sum(self.dense.values()) / 1e9:.3g} GB")
        return "\n".join(lines) or "nothing to replace"


@dataclass(frozen=True)
class Options:
    """The options of `install`."""

    loss_head: bool = False
    last_layer: bool = False
    keep_dense: bool = False
    augmented: bool = False
    free_loss_bytes: int = 0
    mlp_tile: int | None = None
    dense_layers: int = 0


@dataclass
class Installation:
    """What `uninstall` restores.

    Attributes:
        attributes: module, attribute, the module's own value of it before (or None), and ours.
        repackable: 4-bit layers that bitsandbytes was free to repack.
        warned: reasons that were already in a warning.
        unsloth: the names of Unsloth's functions that were replaced for this model.
    """

    options: Options
    report: InstallReport = field(default_factory=InstallReport)
    attributes: list[tuple[nn.Module, str, Any, Any]] = field(default_factory=list)
    repackable: list[nn.Module] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    unsloth: tuple[str, ...] = ()


class Volatile(dict[Any, Any]):
    """What is computed again where it is missing: a copy of a model, or one that was pickled, begins without it."""

    def __deepcopy__(self, memo: Any) -> Volatile:
        return Volatile()

    def __reduce__(self) -> tuple[Any, ...]:
        return Volatile, ()


@dataclass
class Pending:
    """Results for one input that the modules which share it have not used yet; it is recognized by identity."""

    x: Tensor
    key: tuple[Any, ...]
    results: dict[int, Tensor]


@dataclass
class Patch:
    """What the new forward of a linear layer or an MLP reads.

    Attributes:
        installation: of the model.
        layer: the module around it that activation checkpointing may recompute, or None.
        stacks: the linear layers that it runs; those of one tuple share an input.
        activation: of an MLP, one of `ACTIVATIONS`.
        pending: results for layers that share an input.
        reads: from a linear layer to its `LayerRead`.
        groups: from the ids of `Layer`s to them and their `ProjectionGroup`.
        resident: from a tuple of `stacks` to its `Resident`.
    """

    installation: Installation
    layer: nn.Module | None
    stacks: tuple[tuple[nn.Module, ...], ...] = ()
    activation: str = "silu"
    pending: Pending | None = None
    reads: Volatile = field(default_factory=Volatile)
    groups: Volatile = field(default_factory=Volatile)
    resident: Volatile = field(default_factory=Volatile)

    @property
    def arguments(self) -> dict[str, Any]:
        """The options of the LoRA functions at this call."""
        options, layer = self.installation.options, self.layer
        recomputes = layer is not None and layer.training and bool(getattr(layer, "gradient_checkpointing", False))
        return {"keep_dense": options.keep_dense and recomputes, "augmented": options.augmented}

    @property
    def mlp_arguments(self) -> dict[str, Any]:
        """The options of the MLP at this call; a memory plan sets `recompute_mlp` in the `__dict__` of a layer."""
        recompute = self.layer is not None and bool(self.layer.__dict__.get(RECOMPUTE_MLP, False))
        tile = self.installation.options.mlp_tile
        return {**self.arguments, "activation": self.activation, "recompute": recompute, "tile": tile}
