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
from torch import Tensor, nn

from fastprice_kernels.ops.lora import Projection
from fastprice_kernels.ops.nf4_dequantize import dequantize_nf4
from fastprice_kernels.patching.installation import INSTALLATION, PATCH, InstallReport, Patch
from fastprice_kernels.patching.linear_layers import Layer, read_layer
from fastprice_kernels.patching.structure import causal_model, decoder_layers

__all__ = ["Resident", "make_resident", "set_dense_layers"]


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
    """Dequantizes the 4-bit weights of the last `count` decoder layers that run on the kernels, and frees the copies of
    the others.

    `report.dense` gets the layers, `report.skipped` those that are left out.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = decoder_layers(causal_model(model))
    for layer in layers[: len(layers) - count]:
        if report.dense.pop(names[layer], None) is not None:
            for patch in _patches(layer):
                patch.resident.clear()
                patch.groups.clear()
    for layer in layers[len(layers) - count :]:
        name = names[layer]
        if name in report.dense:
            continue
        if layer._forward_pre_hooks:
            report.skipped[f"{name}, dense weights"] = "dense weights of a layer with hooks, which may move its weights"
            continue
        made = sum(_join(patch) for patch in _patches(layer))
        if made:
            report.dense[name] = made
        else:
            report.skipped[f"{name}, dense weights"] = "dense weights of a layer without 4-bit weights on the kernels"


def set_dense_layers(model: Any, count: int) -> int:
    """Changes how many decoder layers, the last ones, have dense weights; returns their bytes.

    Raises:
        RuntimeError: the kernels are not installed on the model.
    """
    made = model.__dict__.get(INSTALLATION)
    if made is None:
        raise RuntimeError("dense weights need the kernels: install() first")
    layers = decoder_layers(causal_model(model))
    make_resident(model, made.report, max(0, min(count, len(layers))))
    return sum(made.report.dense.values())


def _patches(layer: nn.Module) -> list[Patch]:
    found = {id(patch): patch for m in layer.modules() if isinstance(patch := m.__dict__.get(PATCH), Patch)}
    return list(found.values())


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
        patch.groups.clear()  # those of before dequantize
        made += joined.nbytes
    return made
