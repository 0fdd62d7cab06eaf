"""`estimate_memory`: the peak of GPU memory while training or evaluating, from a model's configuration alone.

Pure arithmetic: one layer of each kind and the loss head are played on a tape of sizes (tape.py, layers.py), and the
peak is the highest of these moments of a step in its steady state (gradients of an earlier micro-batch present, the
optimizer's states made):

    forward      a layer, with what the layers before it keep
    loss head    forward and backward, with what all layers keep
    backward     a layer, with what the layers before it keep; recomputed first where its level says so (levels.py)
    optimizer    its temporaries, with no activations

Layers that recompute had better be the first ones: their turn in backward comes last, when the others have let go of
theirs.

What a layer keeps at each level: `kept_bytes`.

Two parts are assumptions, not arithmetic, and no simulation can see them: the CUDA context (with cuBLAS's workspace)
and the allocator's slack. `tensor_bytes` is the peak without them.

Engines: "peft" is checked against the real model code (docs/memory-errors.md: within 1 % for qlora and lora; training
every weight, "full", was up to 5 % under where the loss looks at 8,192 labeled tokens). "fastprice" is PEFT's form
with fused LoRA layers, an MLP that keeps gate and up alone, and a loss without the entropy that TRL logs; its norms are
the stock ones, which keep their input in fp32. "unsloth" is the fused form, every layer recomputed with its input kept
on the host (two layers' inputs on the device), bf16 logits for all tokens overwritten by their gradient. Neither of the
last two can be simulated without a GPU: their figures are arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fastprice.errors import ConfigError, nearest_name
from fastprice.memory.layer_costs import NF4_BLOCK, Work, evaluation_head, layer_forward, loss_head
from fastprice.memory.recompute_levels import check_levels
from fastprice.memory.tape import Peak, Tape
from fastprice.models.adapters import check_method
from fastprice.models.shapes import ModelShape, read_shape

__all__ = ["OPTIMIZERS", "MemoryEstimate", "estimate_memory", "kept_bytes", "levels_of"]

GIB = 1 << 30
ENGINES = ("peft", "unsloth", "fastprice")
STREAM_SLOTS = 2  # a streamed layer computes while the next one arrives

# Bytes of state, and of temporaries during the step, for each trainable weight. PyTorch's AdamW takes the "foreach" way
# on CUDA, which holds the square roots of all second moments at once; its fused way has none. bitsandbytes keeps both
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
# Assumed: what the caching allocator holds beyond the tensors, as a share of all that comes and goes.
SLACK = 0.04
MOMENTS = ("forward", "loss head", "backward", "optimizer")


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak bytes, and what they are made of at that moment (name -> bytes, adding up to `peak_bytes`).

    moment       the moment of the step at which the peak falls: "forward", "loss head", "backward", "optimizer"
    host_bytes   pinned host memory besides: inputs of layers at level "host", weights of streamed layers
                 and of an embedding beside them
    step         the same breakdown at the highest point of each moment, in the order of the step
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


def estimate_memory(
    base: Any,
    *,
    method: str = "qlora",
    rank: int = 16,
    tokens: int = 4096,
    sequences: int = 1,
    optimizer: str = "adamw_torch",
    recompute: str | int | Sequence[str] = "all",
    loss_head: str = "full",
    labeled: float = 1.0,
    engine: str = "peft",
    streaming: int = 0,
    phase: str = "train",
) -> MemoryEstimate:
    """Peak GPU memory of fine-tuning `base` (folder, hub id, shipped name, or transformers configuration).

    tokens      tokens of a micro-batch in all, in `sequences` texts of equal length
    recompute   what is computed again: "all" layers, "none", so many layers (the first ones), each keeping its input;
                or the level of each layer: "all", "costly", "input" or "host" (fastprice.memory.recompute_levels)
    loss_head   "full": logits for all positions; "completion": for the `labeled` share of them, in chunks
    streaming   frozen layers whose weights come from the host when needed; with any, so do the rows of an embedding
                that is not tied to the head
    phase       "train", or "eval": a forward pass with a cache of keys and values; "completion" then means the logits
                of one position of each text

    Raises ConfigError for settings that make no sense, BaseModelError for a base that cannot be read.
    """
    check_method(method)
    _one_of("optimizer", optimizer, tuple(OPTIMIZERS))
    _one_of("loss_head", loss_head, ("full", "completion"))
    _one_of("engine", engine, ENGINES)
    _one_of("phase", phase, ("train", "eval"))
    shape = read_shape(base)
    _whole("tokens", tokens, 1)
    _whole("rank", rank, 1, shape.width)
    _whole("sequences", sequences, 1, tokens)
    _whole("streaming", streaming, 0, shape.layers)
    if streaming and method != "qlora":
        raise ConfigError(f"streaming: only a frozen 4-bit base is streamed, and the method is {method!r}, not 'qlora'")
    if not isinstance(labeled, int | float) or not 0 <= labeled <= 1:
        raise ConfigError(f"labeled: {labeled!r} is not a share of the tokens, from 0 to 1")
    levels = levels_of(recompute, shape)
    if engine == "unsloth":
        if not isinstance(recompute, str | int):
            raise ConfigError("recompute: the unsloth engine recomputes every layer itself; levels need engine='peft'")
        levels = ("host",) * shape.layers
    found = _estimate(
        shape, method, rank, tokens, sequences, optimizer, levels, loss_head, labeled, engine, streaming, phase
    )
    # The caller's own; the found ones stay in the cache.
    return replace(
        found, breakdown=dict(found.breakdown), step=tuple((name, dict(parts)) for name, parts in found.step)
    )


def kept_bytes(
    base: Any, level: str, *, method: str = "qlora", rank: int = 16, tokens: int = 4096, sequences: int = 1,
    engine: str = "peft",
) -> int:  # fmt: skip
    """Bytes on the device that one layer at `level` keeps for its backward pass, with what it keeps of its input."""
    work = Work(tokens, sequences, method, rank, fused=engine != "peft")
    return _kept_by(read_shape(base), work, level, first=False).kept


@lru_cache(maxsize=4096)
def _estimate(
    shape: ModelShape,
    method: str,
    rank: int,
    tokens: int,
    sequences: int,
    optimizer: str,
    levels: tuple[str, ...],
    head: str,
    labeled: float,
    engine: str,
    streaming: int,
    phase: str,
) -> MemoryEstimate:
    work = Work(tokens, sequences, method, rank, fused=engine != "peft")
    static = _weights(shape, method, streaming)
    trained = shape.parameters if method == "full" else shape.layers * shape.adapter_weights(rank)
    state, temporary = OPTIMIZERS[optimizer]
    static["adapters"] = 0 if method == "full" else 4 * trained
    static["optimizer"] = int(state * trained)
    static["gradients"] = 4 * trained if phase == "train" else 0
    # Autocast keeps the bf16 copies of trained weights until the forward pass ends.
    cast = shape.layers * shape.layer_linear_weights if method == "full" else trained
    copies = 0 if work.fused else 2 * cast
    # Token and position ids and labels (8 bytes each), cosines and sines.
    static[_WORKSPACE] = 24 * tokens + 4 * tokens * shape.head_dim
    if phase == "eval":
        moments = [_evaluation(shape, work, sequences if head == "completion" else tokens, copies)]
    else:
        rows = None if head == "full" else round(labeled * tokens)
        moments = _training(shape, work, levels, rows, engine, copies)
        moments.append(("optimizer", {_WORKSPACE: int(temporary * trained)}))
    step = {}
    for name, parts in sorted(moments, key=lambda found: sum(found[1].values())):  # the highest of each name is kept
        whole = {kind: static.get(kind, 0) + parts.get(kind, 0) for kind in _NAMES}
        whole["CUDA context"] = CUDA_CONTEXT
        whole["allocator slack"] = int(SLACK * (sum(parts.values()) + static["gradients"]))
        step[name] = whole
    moment, breakdown = max(step.items(), key=lambda found: sum(found[1].values()))
    inputs = levels.count("host") * work.stream * tokens * shape.width if phase == "train" else 0
    host = inputs + _streamed_bytes(shape, streaming) + _embedding_on_host(shape, streaming)
    in_order = tuple((name, step[name]) for name in MOMENTS if name in step)
    return MemoryEstimate(sum(breakdown.values()), breakdown, moment, host, in_order)


_WORKSPACE = "workspace and dequantized buffers"
_NAMES = (
    "base weights (bf16)",
    "base weights (fp32)",
    "base weights (nf4)",
    "quantization statistics",
    "adapters",
    "gradients",
    "optimizer",
    "activations kept",
    "recompute peak",
    "loss head",
    _WORKSPACE,
)


def _weights(shape: ModelShape, method: str, streaming: int) -> dict[str, int]:
    """Bytes of the base. NF4 with double quantization: half a byte a weight, a byte for 64, four bytes for 64 x 256,
    and for each layer the two code tables and the offset (16 + 256 + 1 fp32 numbers)."""
    linear = shape.layers * shape.layer_linear_weights
    if method == "full":
        return {"base weights (fp32)": 4 * shape.parameters}
    if method == "lora":
        return {"base weights (bf16)": 2 * shape.parameters}
    resident = shape.layers - streaming + min(streaming, STREAM_SLOTS)
    return {
        "base weights (bf16)": 2 * (shape.parameters - linear) - _embedding_on_host(shape, streaming),
        "base weights (nf4)": resident * (shape.layer_linear_weights // 2),
        "quantization statistics": resident * _layer_statistics(shape),
    }


def _embedding_on_host(shape: ModelShape, streaming: int) -> int:
    """Bytes of the embedding where it is on the host: beside streamed layers, if it is not the head as well."""
    return 2 * shape.lm_head_weights if streaming and not shape.tied else 0


def _layer_statistics(shape: ModelShape) -> int:
    blocks = [-(-each.weights // NF4_BLOCK) for each in shape.linears]
    return sum(count + 4 * -(-count // 256) + 4 * (16 + 256 + 1) for count in blocks)


def _streamed_bytes(shape: ModelShape, streaming: int) -> int:
    return streaming * (shape.layer_linear_weights // 2 + _layer_statistics(shape))


@dataclass(frozen=True)
class _Layer:
    """A layer's bytes: kept for its backward pass, of which its input; and at the peaks of its passes.

    again   the forward pass of a recomputation, which stops at the last tensor to be saved
    """

    kept: int
    kept_input: int
    forward: Peak
    again: Peak
    backward: Peak


@lru_cache(maxsize=1024)
def _play(shape: ModelShape, work: Work, *, first: bool = False) -> _Layer:
    """`first`: nothing asks for the gradient of the layer's input."""
    stream = work.stream * work.tokens * shape.width
    tape = Tape()
    # Of weights that all train, the embedding's want the gradient of the first layer's input.
    x = tape.source(stream, gradient=not first or work.method == "full")
    output = layer_forward(tape, shape, work, x)
    forward, again = tape.peak, tape.peak_at_last_save
    tape.drop(output)
    kept_input = stream if x.buffer.holders > 1 else 0  # the tape counts no byte of what comes from outside
    kept = tape.total + kept_input
    tape.peak = Peak()
    tape.backward(output)
    return _Layer(kept, kept_input, forward, again, tape.peak)


@lru_cache(maxsize=1024)
def _play_plain(shape: ModelShape, work: Work) -> Peak:
    """The peak of a layer's forward pass of which nothing is kept."""
    tape = Tape(record=False)
    layer_forward(tape, shape, work, tape.source(work.stream * work.tokens * shape.width))
    return tape.peak


@lru_cache(maxsize=1024)
def _play_head(shape: ModelShape, work: Work, rows: int | None, in_place: bool) -> tuple[Peak, Peak]:
    """The peaks of the loss head's forward and backward pass."""
    tape = Tape()
    loss = loss_head(
        tape, shape, work, tape.source(work.stream * work.tokens * shape.width), rows=rows, in_place=in_place
    )
    forward = tape.peak
    tape.peak = Peak()
    tape.backward(loss)
    return forward, tape.peak


def _training(
    shape: ModelShape, work: Work, levels: tuple[str, ...], rows: int | None, engine: str, copies: int
) -> list[tuple[str, dict[str, int]]]:
    stream = work.stream * work.tokens * shape.width
    layers = [_kept_by(shape, work, level, first=i == 0) for i, level in enumerate(levels)]
    again = [level in _AGAIN for level in levels]
    copies_a_layer = copies // shape.layers
    moments = []
    # Among layers of one level the last one's moments are the highest: the layers before it keep the most.
    for at in {level: i for i, level in enumerate(levels)}.values():
        layer, before, level = layers[at], sum(each.kept for each in layers[:at]), levels[at]
        # The input of the latest layer at level "host" before this one is on the device, but for the forward pass of
        # another such layer, which lets go of it.
        latest = stream if "host" in levels[:at] else 0
        # In the forward pass Python holds the layer's input, and the embedding's output until the last layer is done.
        held = before + stream
        if at and not layers[0].kept_input and not (levels[0] == "host" and "host" not in levels[1:at]):
            held += stream
        # Autocast holds a copy of the trained weights of layers that do not save it themselves.
        cast = copies_a_layer * sum(again[:at])
        if again[at]:
            ahead = held + (0 if level == "host" else latest)
            moments.append(("forward", _split(_play_plain(shape, work), ahead, _WORKSPACE, cast + copies_a_layer)))
            # While the forward pass is done again, the gradient of the layer's output waits; where the layer ends with
            # a norm (Gemma 2), so does its upcast to fp32, as that takes place before the first saved tensor is asked
            # for.
            upcast = 4 * work.tokens * shape.width if shape.family.layer_norms == 4 else 0
            for peak, waiting in ((layer.again, stream + upcast), (layer.backward, 0)):
                parts = _split(peak, 0, "recompute peak", 0)
                parts["recompute peak"] += parts["activations kept"] + waiting
                moments.append(("backward", {**parts, "activations kept": before + latest + stream}))
        else:
            ahead = before + latest + layer.kept_input
            moments.append(("forward", _split(layer.forward, held + latest, _WORKSPACE, cast)))
            moments.append(("backward", _split(layer.backward, ahead, _WORKSPACE, 0)))

    # The forward pass of the head runs while autocast still has the recomputed layers' copies of trained weights.
    kept = sum(each.kept for each in layers) + (stream if "host" in levels else 0)
    forward, backward = _play_head(shape, work, rows, engine == "unsloth" and rows is None)
    moments += [
        ("loss head", {"activations kept": kept, "loss head": peak.total, "adapters": cast})
        for peak, cast in ((forward, copies_a_layer * sum(again)), (backward, 0))
    ]
    return moments


_AGAIN = ("input", "host")


@lru_cache(maxsize=4096)
def _kept_by(shape: ModelShape, work: Work, level: str, *, first: bool) -> _Layer:
    """A layer's bytes at a level. Inputs at level "host" are counted by the caller: which of them are on the device
    depends on the moment."""
    if level in _AGAIN:
        layer = _play(shape, work, first=first)
        stream = work.stream * work.tokens * shape.width
        kept = stream if level == "input" else 0
        return replace(layer, kept=kept, kept_input=kept)
    return _play(shape, replace(work, costly=level == "costly"), first=first)


def _split(peak: Peak, kept: int, flow: str, copies: int) -> dict[str, int]:
    parts = {"activations kept": kept + peak.parts.get("saved", 0), "adapters": peak.parts.get("copies", 0) + copies}
    parts[_WORKSPACE] = peak.parts.get("dequantized", 0)
    parts[flow] = parts.get(flow, 0) + peak.parts.get("flow", 0)
    return parts


def _evaluation(shape: ModelShape, work: Work, rows: int, copies: int) -> tuple[str, dict[str, int]]:
    stream = work.stream * work.tokens * shape.width
    cache = 4 * work.tokens * shape.key_width * shape.layers
    layer = Tape(record=False)
    layer_forward(layer, shape, work, layer.source(stream), cache=True)
    parts = _split(layer.peak, 0, _WORKSPACE, copies)
    parts["activations kept"] = cache + 2 * stream  # the layer's input, and the embedding's output
    head = Tape(record=False)
    evaluation_head(head, shape, work, head.source(stream), rows)
    if head.peak.total > layer.peak.total + 2 * stream:
        return "loss head", {"activations kept": cache, "loss head": head.peak.total, "adapters": copies}
    return "forward", parts


def levels_of(recompute: str | int | Sequence[str], shape: ModelShape) -> tuple[str, ...]:
    """The level of each layer that `recompute` stands for, as `estimate_memory` takes it."""
    if recompute == "all":
        return ("input",) * shape.layers
    if recompute == "none":
        return ("all",) * shape.layers
    if isinstance(recompute, str):
        raise ConfigError(f"recompute: {recompute!r} is not 'all', 'none' or a number of layers")
    if isinstance(recompute, Sequence):
        return check_levels(recompute, shape.layers, "recompute")
    _whole("recompute", recompute, 0, shape.layers)
    return ("input",) * recompute + ("all",) * (shape.layers - recompute)


def _whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        bounds = f"at least {least:,}" if most is None else f"from {least:,} to {most:,}"
        raise ConfigError(f"{name}: {value!r} is not a whole number {bounds}")


def _one_of(name: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(valid)}{nearest_name(str(value), valid)}")
