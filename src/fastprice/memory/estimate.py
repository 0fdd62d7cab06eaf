"""`estimate_memory`: the peak of GPU memory while training or evaluating, from a model's configuration alone.

Pure arithmetic: one layer of each kind and the loss head are played on a tape of sizes (layer_peaks.py), and the peak
is the highest of these moments of a step in its steady state (gradients of an earlier micro-batch present, the
optimizer's states allocated): the forward pass of a layer, with what the layers before it save; the loss head, with
what all layers save; the backward pass of a layer, with what the layers before it save, after its recomputation where
its level says so; the optimizer step, with no activations. Recomputing the first layers saves more than recomputing the
last: their backward pass comes when the others have released theirs. The CUDA context (with cuBLAS's workspace) and the
allocator's slack are assumed amounts, not arithmetic; `tensor_bytes` is the peak without them.

Engine "peft" is compared with the real model code in docs/memory-errors.md (within 1 % for qlora and lora; "full", with
every weight trained, was up to 5 % too low where the loss covers 8,192 labeled tokens). "fastprice" is PEFT with fused
LoRA layers, norms, rotary embeddings and MLP, and a loss without the entropy that TRL logs: its layers agree with the
real code within 0.2 %. "unsloth" is Unsloth's own way, every layer recomputed from its offloaded input and bf16 logits
for all tokens, overwritten by their gradient; it cannot be simulated without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fastprice.errors import ConfigError, nearest_name
from fastprice.memory.byte_sizes import GIB
from fastprice.memory.layer_costs import NF4_BLOCK, MicroBatch
from fastprice.memory.layer_peaks import (
    RECOMPUTED_FORWARD,
    evaluation_peaks,
    forward_peak_without_saving,
    layer_bytes,
    loss_head_peaks,
    residual_size,
)
from fastprice.memory.recompute_levels import expand_recompute
from fastprice.memory.tape import Peak
from fastprice.models.adapters import check_method
from fastprice.models.shapes import ModelShape, read_shape

__all__ = ["CUDA_CONTEXT", "DEVICE_BUFFERS", "OPTIMIZERS", "MemoryEstimate", "estimate_memory", "saved_bytes"]

ENGINES = ("peft", "unsloth", "fastprice")
DEVICE_BUFFERS = 2  # for weights of offloaded layers: one layer computes while the next one is prefetched

# Bytes of state, and of temporaries during the step, for each trainable weight. PyTorch's AdamW takes the "foreach" way
# on CUDA, which holds the square roots of all second moments at once; its fused way has none. bitsandbytes stores both
# moments in 8 bits, with an fp32 scale for 256 of them.
OPTIMIZERS: dict[str, tuple[float, float]] = {
    "adamw_torch": (8.0, 4.0),
    "adamw_torch_fused": (8.0, 0.0),
    "adamw_bnb_8bit": (2 + 8 / 256, 0.0),
    "adamw_8bit": (2 + 8 / 256, 0.0),
    "sgd": (0.0, 0.0),
}

# Assumed: what a CUDA context takes with PyTorch's kernels loaded lazily, and cuBLAS's workspace (32 MiB on Hopper).
CUDA_CONTEXT = 512 << 20
# Assumed: what the caching allocator reserves beyond the tensors, as a share of all that comes and goes.
SLACK = 0.04
MOMENTS = ("forward", "loss head", "backward", "optimizer")

_SAVED = "saved activations"
_RECOMPUTATION = "recomputation"
_WORKSPACE = "workspace and dequantized buffers"
_PARTS = (
    "base weights (bf16)",
    "base weights (fp32)",
    "base weights (nf4)",
    "quantization statistics",
    "adapters",
    "gradients",
    "optimizer",
    _SAVED,
    _RECOMPUTATION,
    "loss head",
    _WORKSPACE,
)
_Parts = dict[str, int]


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak bytes, and their parts at that moment (name -> bytes, adding up to `peak_bytes`).

    Attributes:
        moment: the moment of the step at which the peak falls: "forward", "loss head", "backward", "optimizer".
        host_bytes: pinned host memory besides: inputs of layers at level "offload", weights of offloaded layers and of
            an embedding beside them.
        step: the same breakdown at the highest point of each moment, in the order of the step.
    """

    peak_bytes: int
    breakdown: dict[str, int]
    moment: str
    host_bytes: int = 0
    step: tuple[tuple[str, dict[str, int]], ...] = ()

    @property
    def tensor_bytes(self) -> int:
        """The peak without the CUDA context and the allocator's slack: what PyTorch calls "allocated"."""
        return self.peak_bytes - self.breakdown["CUDA context"] - self.breakdown["allocator slack"]

    def table(self) -> str:
        """The breakdown as lines of text, largest first."""
        lines = [f"{size / GIB:8.2f} GiB  {name}" for name, size in self.by_size() if size]
        return "\n".join([*lines, f"{self.peak_bytes / GIB:8.2f} GiB  peak, at the {self.moment}"])

    def by_size(self) -> list[tuple[str, int]]:
        return sorted(self.breakdown.items(), key=lambda item: -item[1])


@dataclass(frozen=True)
class _StepSettings:
    """The checked arguments of `estimate_memory`, with a level for each layer."""

    shape: ModelShape
    batch: MicroBatch
    levels: tuple[str, ...]
    optimizer: str
    loss_head: str
    labeled: float
    engine: str
    offloaded_layers: int
    dense_layers: int
    phase: str

    @property
    def trainable_weights(self) -> int:
        shape, batch = self.shape, self.batch
        return shape.parameters if batch.method == "full" else shape.layers * shape.adapter_weights(batch.rank)

    @property
    def weight_copy_bytes(self) -> int:
        """bf16 copies of trainable weights of decoder layers, which autocast holds until the forward pass ends."""
        if self.batch.fused:
            return 0
        shape = self.shape
        cast = shape.layers * shape.layer_linear_weights if self.batch.method == "full" else self.trainable_weights
        return 2 * cast

    @property
    def host_embedding_bytes(self) -> int:
        """Bytes of the embedding if it is on the host: beside offloaded layers, unless it is tied to lm_head."""
        return 2 * self.shape.lm_head_weights if self.offloaded_layers and not self.shape.tied else 0


def estimate_memory(
    base: Any,
    *,
    method: str = "qlora",
    rank: int = 16,
    tokens: int = 4096,
    sequences: int = 1,
    optimizer: str = "adamw_torch",
    recompute: str | int | Sequence[str] = "full",
    loss_head: str = "full",
    labeled: float = 1.0,
    engine: str = "peft",
    offloaded_layers: int = 0,
    dense_layers: int = 0,
    mlp_tile: int | None = None,
    phase: str = "train",
) -> MemoryEstimate:
    """Peak GPU memory of fine-tuning `base` (folder, hub id, shipped name, or transformers configuration).

    Args:
        base: a folder, hub id, shipped name, or transformers configuration.
        tokens: of a micro-batch in all, in `sequences` texts of equal length.
        recompute: a recompute level for every layer ("none", "selective", "full", "offload"), counts of levels
            ("12 full, 20 selective"), the level of each layer, or the number of layers to recompute in full (the first
            ones).
        loss_head: "full": logits for all positions; "completion": for the `labeled` share of them, in chunks.
        offloaded_layers: frozen layers whose weights are on the host and prefetched; with any, the rows of an embedding
            that is not tied to lm_head come from the host too.
        dense_layers: layers whose frozen 4-bit weights stay dequantized beside the packed ones (engine "fastprice").
        mlp_tile: tokens that an MLP computes at a time (engine "fastprice"); None: all.
        phase: "train", or "eval": a forward pass with a KV cache; "completion" then means the logits of one position of
            each text.

    Raises:
        ConfigError: impossible settings.
        BaseModelError: a base that cannot be read.
    """
    check_method(method)
    _check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    _check_choice("loss_head", loss_head, ("full", "completion"))
    _check_choice("engine", engine, ENGINES)
    _check_choice("phase", phase, ("train", "eval"))
    shape = read_shape(base)
    _check_whole_number("tokens", tokens, 1)
    _check_whole_number("rank", rank, 1, shape.width)
    _check_whole_number("sequences", sequences, 1, tokens)
    _check_whole_number("offloaded_layers", offloaded_layers, 0, shape.layers)
    if offloaded_layers and method != "qlora":
        raise ConfigError(f"offloaded_layers: only a frozen 4-bit base can be; use method='qlora', not {method!r}")
    _check_whole_number("dense_layers", dense_layers, 0, shape.layers - offloaded_layers)
    if dense_layers and (method != "qlora" or engine != "fastprice"):
        raise ConfigError("dense_layers: only a frozen 4-bit base on the kernels has them; use engine='fastprice'")
    if not isinstance(labeled, int | float) or not 0 <= labeled <= 1:
        raise ConfigError(f"labeled: {labeled!r} is not a share of the tokens, from 0 to 1")
    if engine == "unsloth":
        if recompute not in ("full", "none") and not isinstance(recompute, int):
            raise ConfigError(
                "recompute: Unsloth without fastprice recomputes every layer itself; with it, engine='fastprice'"
            )
        levels = ("offload",) * shape.layers
    else:
        levels = expand_recompute(recompute, shape.layers)
    if mlp_tile is not None:
        _check_whole_number("mlp_tile", mlp_tile, 1)
        if engine != "fastprice":
            raise ConfigError("mlp_tile: only the kernels compute an MLP in tiles; use engine='fastprice'")
    batch = MicroBatch(tokens, sequences, method, rank, fused=engine != "peft", mlp_tile=mlp_tile)
    estimate = _estimate(
        _StepSettings(
            shape, batch, levels, optimizer, loss_head, labeled, engine, offloaded_layers, dense_layers, phase
        )
    )
    # Copies: the caller may change them, and the originals stay in the cache.
    return replace(
        estimate,
        breakdown=dict(estimate.breakdown),
        step=tuple((name, dict(parts)) for name, parts in estimate.step),
    )


def saved_bytes(
    base: Any, level: str, *, method: str = "qlora", rank: int = 16, tokens: int = 4096, sequences: int = 1,
    engine: str = "peft",
) -> int:  # fmt: skip
    """Bytes of GPU memory that one layer at a recompute level saves for its backward pass, its input's included."""
    batch = MicroBatch(tokens, sequences, method, rank, fused=engine != "peft")
    return layer_bytes(read_shape(base), batch, level, first=False).saved


@lru_cache(maxsize=4096)
def _estimate(settings: _StepSettings) -> MemoryEstimate:
    shape, batch = settings.shape, settings.batch
    trainable = settings.trainable_weights
    state, temporary = OPTIMIZERS[settings.optimizer]
    constant = _base_weights(settings)
    # The kernels keep 16-bit casts of the adapters beside them.
    constant["adapters"] = 0 if batch.method == "full" else (6 if settings.engine == "fastprice" else 4) * trainable
    constant["optimizer"] = int(state * trainable)
    constant["gradients"] = 4 * trainable if settings.phase == "train" else 0
    # Token and position ids and labels (8 bytes each), cosines and sines.
    constant[_WORKSPACE] = 24 * batch.tokens + 4 * batch.tokens * shape.head_dim
    if settings.phase == "eval":
        moments = [_evaluation_moment(settings)]
    else:
        moments = [*_training_moments(settings), ("optimizer", {_WORKSPACE: int(temporary * trainable)})]
    step = {}
    for name, parts in sorted(moments, key=lambda moment: sum(moment[1].values())):  # the highest of each name stays
        breakdown = {part: constant.get(part, 0) + parts.get(part, 0) for part in _PARTS}
        breakdown["CUDA context"] = CUDA_CONTEXT
        breakdown["allocator slack"] = int(SLACK * (sum(parts.values()) + constant["gradients"]))
        step[name] = breakdown
    moment, breakdown = max(step.items(), key=lambda item: sum(item[1].values()))
    in_order = tuple((name, step[name]) for name in MOMENTS if name in step)
    return MemoryEstimate(sum(breakdown.values()), breakdown, moment, _host_bytes(settings), in_order)


def _base_weights(settings: _StepSettings) -> _Parts:
    """Bytes of the base. NF4 with double quantization: half a byte a weight, a byte for 64, four bytes for 64 x 256,
    and for each layer the two code tables and the offset (16 + 256 + 1 fp32 numbers)."""
    shape, offloaded = settings.shape, settings.offloaded_layers
    if settings.batch.method == "full":
        return {"base weights (fp32)": 4 * shape.parameters}
    if settings.batch.method == "lora":
        return {"base weights (bf16)": 2 * shape.parameters}
    linear = shape.layers * shape.layer_linear_weights
    on_device = shape.layers - offloaded + min(offloaded, DEVICE_BUFFERS)
    dense = 2 * settings.dense_layers * shape.layer_linear_weights
    return {
        "base weights (bf16)": 2 * (shape.parameters - linear) - settings.host_embedding_bytes + dense,
        "base weights (nf4)": on_device * (shape.layer_linear_weights // 2),
        "quantization statistics": on_device * _layer_statistics(shape),
    }


def _layer_statistics(shape: ModelShape) -> int:
    blocks = [-(-linear.weights // NF4_BLOCK) for linear in shape.linears]
    return sum(count + 4 * -(-count // 256) + 4 * (16 + 256 + 1) for count in blocks)


def _host_bytes(settings: _StepSettings) -> int:
    shape = settings.shape
    inputs = settings.levels.count("offload") * residual_size(shape, settings.batch)
    weights = settings.offloaded_layers * (shape.layer_linear_weights // 2 + _layer_statistics(shape))
    return (inputs if settings.phase == "train" else 0) + weights + settings.host_embedding_bytes


def _training_moments(settings: _StepSettings) -> list[tuple[str, _Parts]]:
    """Forward, backward and loss head: the parts that come and go, at the peaks of each."""
    shape, batch, levels = settings.shape, settings.batch, settings.levels
    residual = residual_size(shape, batch)
    layers = [layer_bytes(shape, batch, level, first=i == 0) for i, level in enumerate(levels)]
    recomputed = [level in RECOMPUTED_FORWARD for level in levels]
    copies_per_layer = settings.weight_copy_bytes // shape.layers
    moments = []
    # Among layers of one level the last one's moments are the highest: the layers before it save the most.
    for i in {level: i for i, level in enumerate(levels)}.values():
        layer, level, saved_before = layers[i], levels[i], sum(each.saved for each in layers[:i])
        # The input of the last layer at level "offload" before this one is on the device, except in the forward pass of
        # another such layer, which releases it.
        newest_input = residual if "offload" in levels[:i] else 0
        # In the forward pass Python holds the layer's input, and the embedding's output until the last layer is done.
        held = saved_before + residual
        if i and not layers[0].saved_input and not (levels[0] == "offload" and "offload" not in levels[1:i]):
            held += residual
        # Autocast holds a copy of the trainable weights of layers that do not save it themselves.
        copies = copies_per_layer * sum(recomputed[:i])
        if recomputed[i]:
            saved = held + (0 if level == "offload" else newest_input)
            peak = forward_peak_without_saving(shape, batch)
            moments.append(("forward", _parts_of(peak, saved, _WORKSPACE, copies + copies_per_layer)))
            # During the recomputation the gradient of the layer's output waits; where the layer ends with a norm
            # (Gemma 2), so does its upcast to fp32, which runs before the first saved tensor is unpacked.
            ends_with_stock_norm = shape.family.layer_norms == 4 and not batch.fused
            upcast = 4 * batch.tokens * shape.width if ends_with_stock_norm else 0
            for peak, waiting in ((layer.recomputation, residual + upcast), (layer.backward, 0)):
                parts = _parts_of(peak, 0, _RECOMPUTATION, 0)
                parts[_RECOMPUTATION] += parts[_SAVED] + waiting
                moments.append(("backward", {**parts, _SAVED: saved_before + newest_input + residual}))
        else:
            saved = saved_before + newest_input + layer.saved_input
            moments.append(("forward", _parts_of(layer.forward, held + newest_input, _WORKSPACE, copies)))
            moments.append(("backward", _parts_of(layer.backward, saved, _WORKSPACE, 0)))

    rows = None if settings.loss_head == "full" else round(settings.labeled * batch.tokens)
    saved = sum(layer.saved for layer in layers) + (residual if "offload" in levels else 0)
    forward, backward = loss_head_peaks(shape, batch, rows, settings.engine == "unsloth" and rows is None)
    # In the head's forward pass autocast still holds the recomputed layers' copies of trainable weights.
    copies = copies_per_layer * sum(recomputed)
    moments.append(("loss head", {_SAVED: saved, "loss head": forward.total, "adapters": copies}))
    moments.append(("loss head", {_SAVED: saved, "loss head": backward.total, "adapters": 0}))
    return moments


def _evaluation_moment(settings: _StepSettings) -> tuple[str, _Parts]:
    shape, batch = settings.shape, settings.batch
    rows = batch.sequences if settings.loss_head == "completion" else batch.tokens
    cache = 4 * batch.tokens * shape.key_width * shape.layers
    layer, logits = evaluation_peaks(shape, batch, rows)
    held = 2 * residual_size(shape, batch)  # the layer's input, and the embedding's output
    if logits.total > layer.total + held:
        copies = settings.weight_copy_bytes
        return "loss head", {_SAVED: cache, "loss head": logits.total, "adapters": copies}
    parts = _parts_of(layer, 0, _WORKSPACE, settings.weight_copy_bytes)
    return "forward", {**parts, _SAVED: cache + held}


def _parts_of(peak: Peak, saved: int, temporaries: str, weight_copies: int) -> _Parts:
    """A tape's peak as parts of the breakdown; `temporaries` names the part to which its temporary tensors belong."""
    parts = {
        _SAVED: saved + peak.parts.get("saved", 0),
        "adapters": peak.parts.get("weight copies", 0) + weight_copies,
        _WORKSPACE: peak.parts.get("dequantized", 0),
    }
    parts[temporaries] = parts.get(temporaries, 0) + peak.parts.get("temporary", 0)
    return parts


def _check_whole_number(name: str, value: Any, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        bounds = f"at least {low:,}" if high is None else f"from {low:,} to {high:,}"
        raise ConfigError(f"{name}: {value!r} is not a whole number {bounds}")


def _check_choice(name: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(valid)}{nearest_name(str(value), valid)}")
