"""Frozen weights that stay dequantized where memory is free: they never change, so their layers never dequantize.

A layer of Llama-3.1-8B takes 436 MB in 16 bits beside its 113 MB of NF4, which stays (`uninstall` frees the copy and
nothing else). For each step it saves two or three dequantizations, and q, k and v, and gate and up, are one product
each forward. Numbers do not change: the same bits are multiplied. The frozen weights of such a layer must not be
overwritten in place while the kernels are installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprice_kernels.ops.lora import Projection
from fastprice_kernels.ops.nf4_dequantize import dequantize_nf4
from fastprice_kernels.patching.installation import PATCH, InstallReport, Patch
from fastprice_kernels.patching.linear_layers import Layer, read_layer
from fastprice_kernels.patching.structure import decoder_layers

__all__ = ["Resident", "make_resident"]


class Resident(NamedTuple):
    """The joined weights (all N, K) of projections that share an input, and the packed ones they were made from."""

    weights: Tensor
    sources: tuple[Tensor, ...]

    def fits(self, projections: Sequence[Projection]) -> bool:
        """Whether these projections have the weights it was made from."""
        return len(projections) == len(self.sources) and all(
            p.weight is source for p, source in zip(projections, self.sources, strict=True)
        )


def make_resident(model: Any, report: InstallReport, count: int) -> None:
    """Dequantizes the 4-bit weights of the last `count` decoder layers that run on the kernels.

    `report.dense` gets the layers, `report.skipped` those that are left out.
    """
    get_base = getattr(model, "get_base_model", None)
    names = {module: name for name, module in model.named_modules()}
    for layer in decoder_layers(model if get_base is None else get_base())[-count:]:
        name = names[layer]
        if layer._forward_pre_hooks:
            report.skipped[f"{name}, dense weights"] = "dense weights of a layer with hooks, which may move its weights"
            continue
        patches = {id(patch): patch for m in layer.modules() if isinstance(patch := m.__dict__.get(PATCH), Patch)}
        made = sum(_join(patch) for patch in patches.values())
        if made:
            report.dense[name] = made
        else:
            report.skipped[f"{name}, dense weights"] = "dense weights of a layer without 4-bit weights on the kernels"


def _join(patch: Patch) -> int:
    """Fills `patch.resident`; returns the bytes."""
    made = 0
    for stack in patch.stacks:
        layers = [read for read in map(read_layer, stack) if isinstance(read, Layer)]
        projections = [layer.projection for layer in layers]
        if not layers or len(layers) < len(stack) or any(p.quant_state is None for p in projections):
            continue
        dtype = layers[0].dtype or projections[0].quant_state.dtype
        rows = [p.shape[0] for p in projections]
        joined = torch.empty(sum(rows), projections[0].shape[1], dtype=dtype, device=projections[0].weight.device)
        for p, out in zip(projections, joined.split(rows), strict=True):
            dequantize_nf4(p.weight, p.quant_state, out=out, dtype=dtype)
        patch.resident[stack] = Resident(joined, tuple(p.weight for p in projections))
        made += joined.nbytes
    return made
