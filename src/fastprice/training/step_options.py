"""How a training step is computed: kernels under the model, recompute levels, CUDA graphs.

None of it changes what is learned. Each context manager here puts its part in place for the time of a training and
restores the model afterwards.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fastprice.errors import ConfigError, TrainingError
from fastprice.memory.activation_checkpointing import ActivationCheckpointing, checkpointable_layers
from fastprice.memory.dense_weights import DenseWeights
from fastprice.memory.loss_head_costs import LOSS_BYTES
from fastprice.memory.recompute_controller import (
    CandidateLevels,
    CudaMemoryMeter,
    MemoryMeter,
    RecomputeController,
    reserved_bytes_estimator,
)
from fastprice.memory.recompute_levels import parse_recompute_levels
from fastprice.models.parts import decoder_layers
from fastprice.models.peft_engine import compute_dtype
from fastprice.prompts.template import IGNORE
from fastprice.training.cuda_graphs import AUTO_MICRO_BATCHES, AUTO_PARAMETERS, parameter_count, unsupported_reason

if TYPE_CHECKING:
    from fastprice_kernels import InstallReport

__all__ = [
    "PackStatistics",
    "StepOptions",
    "controlled_recomputation",
    "count_checkpointable_layers",
    "installed_kernels",
    "uses_cuda_graphs",
    "uses_kernels",
]


@dataclass(frozen=True)
class StepOptions:
    """How steps are computed.

    kernels            "on", "off", or "auto": fastprice_kernels under the model on CUDA, the stock path elsewhere
    recompute          a recompute level, counts of levels (`fastprice.memory.recompute_levels`), or "auto": on CUDA as
                       little recomputation as fits the memory, on a CPU none. On CUDA a micro-batch that runs out of
                       memory runs again with more recomputation, whatever was set (`RecomputeController`)
    memory_budget      bytes of GPU memory that "auto" may use in all; None: what is free
    dense_layers       layers whose frozen 4-bit weights stay dequantized: a number, or "auto": as many as fit beside
                       a training that recomputes nothing, none on a CPU
    mlp_tile           tokens that an MLP on the kernels computes at a time; None: all
    offloaded_layers   layers whose frozen weights are on the host (`fastprice.offload`)
    meter              measures memory instead of the CUDA device
    """

    kernels: str = "auto"
    recompute: str = "auto"
    memory_budget: int | None = None
    dense_layers: int | str = "auto"
    mlp_tile: int | None = None
    offloaded_layers: int = 0
    meter: MemoryMeter | None = None


@dataclass(frozen=True)
class PackStatistics:
    """What the memory of a micro-batch depends on: tokens of the largest pack, mean number of texts in a pack, and the
    share of labeled tokens."""

    tokens: int
    sequences: int
    labeled: float

    @classmethod
    def of(cls, packs: Sequence[Mapping[str, Sequence[int]]]) -> PackStatistics:
        sizes = [len(pack["input_ids"]) for pack in packs]
        labels = sum(label != IGNORE for pack in packs for label in pack["labels"])
        texts = sum(len(pack["lengths"]) for pack in packs)
        return cls(max(sizes), max(1, round(texts / len(packs))), labels / sum(sizes))


def uses_kernels(kernels: str) -> bool:
    """Whether fastprice_kernels run under the model: `kernels` is "on", "off" or "auto" (on CUDA)."""
    return kernels == "on" or (kernels == "auto" and torch.cuda.is_available())


def uses_cuda_graphs(
    cuda_graphs: str,
    model: Any,
    *,
    kernels: bool,
    auxiliary: bool,
    recompute: str = "auto",
    micro_batches: int | None = None,
) -> bool:
    """Whether steps are to be captured: `cuda_graphs` is "on", "off" or "auto".

    "auto" captures where it is supported and pays: models of at most `AUTO_PARAMETERS`, since larger ones are bound by
    arithmetic; at least `AUTO_MICRO_BATCHES`, since recording and check cost about eight; adapters alone, since the
    check holds three more copies of the trainable weights.

    auxiliary      whether there are auxiliary losses
    recompute      the setting
    micro_batches  of the whole training; None: unknown, but many

    Raises ConfigError for an "on" that is unsupported.
    """
    if cuda_graphs == "off" or (cuda_graphs == "auto" and not _pays(model, recompute, micro_batches)):
        return False
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    reason = unsupported_reason(model, kernels=kernels, dtype=compute_dtype(), processes=processes)
    if auxiliary:
        reason = "a price head or a number loss reads hidden states beside the model's own loss"
    if reason is not None and cuda_graphs == "on":
        raise ConfigError(f"cuda_graphs: on, but {reason}; use cuda_graphs='auto' or 'off'")
    return reason is None


def _pays(model: Any, recompute: str, micro_batches: int | None) -> bool:
    """Whether "auto" wants a capture, supported or not. Inputs that are offloaded, which the user chose, forbid it."""
    trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)
    parameters = parameter_count(model)
    return (
        parameters <= AUTO_PARAMETERS
        and trainable <= parameters / 4
        and (micro_batches is None or micro_batches >= AUTO_MICRO_BATCHES)
        and "offload" not in recompute
    )


def count_checkpointable_layers(model: Any, recompute: str, *, cuda_graphs: bool) -> int | None:
    """How many layers can have recompute levels of their own; None if this model has no such layers.

    Raises ConfigError if `recompute` sets levels all the same, or one that a CUDA graph cannot capture.
    """
    try:
        layers = len(checkpointable_layers(model))
    except ConfigError:
        if recompute != "auto":
            raise
        return None
    if recompute != "auto" and cuda_graphs and "offload" in parse_recompute_levels(recompute, layers):
        raise ConfigError(
            "recompute: offloaded inputs cannot be part of a CUDA graph; use recompute='full', or cuda_graphs='off'"
        )
    return layers


@contextmanager
def controlled_recomputation(
    model: Any,
    layers: int | None,
    options: StepOptions,
    packs: PackStatistics,
    *,
    gradient_accumulation: int,
    kernels: bool,
    cuda_graphs: bool,
) -> Iterator[RecomputeController | None]:
    """Puts recompute levels in force on the `layers` of `model`; yields their controller where memory is measured."""
    levels = (
        None if options.recompute == "auto" or layers is None else parse_recompute_levels(options.recompute, layers)
    )
    fixed = None if isinstance(options.dense_layers, str) else options.dense_layers
    dense = dense_weights(model, fixed) if kernels and fixed != 0 and not options.offloaded_layers else None
    if layers is None or (options.meter is None and not torch.cuda.is_available()):
        if dense is not None and fixed:
            dense.fit(0)
        if levels is None:
            yield None
        else:
            with ActivationCheckpointing(model, levels):
                yield None
        return
    adapters = getattr(model, "peft_config", {}).values()
    dropout = any(getattr(adapter, "lora_dropout", 0.0) for adapter in adapters)
    estimate = reserved_bytes_estimator(
        model,
        tokens=packs.tokens,
        sequences=packs.sequences,
        labeled=packs.labeled,
        kernels=kernels and not dropout,
        offloaded_layers=options.offloaded_layers,
        mlp_tile=options.mlp_tile,
    )
    controller = RecomputeController(
        model,
        CandidateLevels(layers, estimate, offload=not cuda_graphs, initial=levels),
        CudaMemoryMeter(options.memory_budget) if options.meter is None else options.meter,
        warmup=gradient_accumulation,
        adapt=levels is None and not cuda_graphs,  # a captured step keeps its levels
        preserve_rng_state=not cuda_graphs,
        dense=dense,
    )
    try:
        yield controller
    finally:
        controller.remove()


def dense_weights(model: Any, fixed: int | None) -> DenseWeights | None:
    """The dense weights of a model with kernels, none of them made yet; None where it has no 4-bit layers.

    Raises ConfigError for a fixed number of more layers than there are.
    """
    from fastprice_kernels.patching.resident import set_dense_layers

    layers = decoder_layers(model)
    sizes = [sum(4 * p.numel() for p in layer.parameters() if p.dtype == torch.uint8) for layer in layers]
    if not layers or not max(sizes):
        return None
    if fixed is not None and fixed > len(layers):
        raise ConfigError(f"dense_layers: {fixed} of a model of {len(layers)} layers; give at most that, or 'auto'")
    return DenseWeights(len(layers), max(sizes), partial(set_dense_layers, model), fixed=fixed)


@contextmanager
def installed_kernels(
    model: Any, kernels: str, *, memory_budget: int | None = None, mlp_tile: int | None = None
) -> Iterator[InstallReport | None]:
    """Installs fastprice_kernels, their loss head included; yields the report, or None if nothing was installed.

    memory_budget, mlp_tile: as in `StepOptions`.

    An Unsloth of another shape than the kernels were written for keeps the stock path: with a warning for "auto";
    with "on" TrainingError is raised.
    """
    from fastprice_kernels.patching.install import install, uninstall

    if not uses_kernels(kernels):
        yield None
        return
    try:
        report = install(
            model,
            loss_head=True,
            last_layer=True,
            keep_dense=fits_dense_weights(model),
            free_loss_bytes=free_loss_bytes(memory_budget),
            mlp_tile=mlp_tile,
        )
    except RuntimeError as error:
        if kernels == "on":
            raise TrainingError(f"kernels: {error}; use kernels='off'") from error
        warnings.warn(f"fastprice_kernels are not used: {error}", stacklevel=2)
        yield None
        return
    try:
        yield report
    finally:
        uninstall(model)


def free_loss_bytes(memory_budget: int | None) -> int:
    """Bytes that a chunk of logits may take to read the output layer once: a sixty-fourth of the memory that is free
    beside the loaded model, within `memory_budget`, and at most the `LOSS_BYTES` that the memory estimate counts."""
    if not torch.cuda.is_available():
        return 0
    free = torch.cuda.mem_get_info()[0]
    if memory_budget is not None:
        free = min(free, max(0, memory_budget - torch.cuda.memory_reserved()))
    return min(LOSS_BYTES, free // 64)


def fits_dense_weights(model: Any) -> bool:
    """Whether a recomputed layer may store its dequantized weights until its backward pass, which saves one of three
    dequantizations a step: if they take at most a twentieth of the memory that is free beside the loaded model."""
    layers = getattr(model.get_decoder(), "layers", []) if torch.cuda.is_available() else []
    dense = max((2 * parameter_count(layer) for layer in layers), default=0)
    return 0 < dense <= torch.cuda.mem_get_info()[0] / 20
