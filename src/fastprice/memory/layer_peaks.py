"""The bytes of one decoder layer and of the loss head at the peaks of their passes, found by playing them on a tape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from fastprice.memory.layer_costs import MicroBatch, layer_forward
from fastprice.memory.loss_head_costs import evaluation_logits, loss_head
from fastprice.memory.tape import Peak, Tape
from fastprice.models.shapes import ModelShape

__all__ = [
    "RECOMPUTED_FORWARD",
    "LayerBytes",
    "evaluation_peaks",
    "forward_peak_without_saving",
    "layer_bytes",
    "loss_head_peaks",
    "residual_size",
]

RECOMPUTED_FORWARD = ("full", "offload")  # levels at which the backward pass runs the layer's forward pass again


@dataclass(frozen=True)
class LayerBytes:
    """A layer's bytes: saved for its backward pass, its input's share of them, and the peaks of its passes.

    recomputation   the forward pass when it runs again, which stops at the last tensor to be saved
    """

    saved: int
    saved_input: int
    forward: Peak
    recomputation: Peak
    backward: Peak


def residual_size(shape: ModelShape, batch: MicroBatch) -> int:
    """Bytes of the residual stream of a micro-batch, (T, h): the input and the output of a layer."""
    return batch.residual_bytes * batch.tokens * shape.width


@lru_cache(maxsize=4096)
def layer_bytes(shape: ModelShape, batch: MicroBatch, level: str, *, first: bool) -> LayerBytes:
    """A layer's bytes at a recompute level; `first`: its input requires no gradient.

    Inputs at level "offload" are not counted: which of them are on the device depends on the moment of the step.
    """
    if level in RECOMPUTED_FORWARD:
        layer = _play_layer(shape, batch, first=first)
        saved = residual_size(shape, batch) if level == "full" else 0
        return replace(layer, saved=saved, saved_input=saved)
    batch = replace(batch, selective=level in ("selective", "mlp"), mlp=level == "mlp")
    return _play_layer(shape, batch, first=first)


@lru_cache(maxsize=1024)
def _play_layer(shape: ModelShape, batch: MicroBatch, *, first: bool) -> LayerBytes:
    residual = residual_size(shape, batch)
    tape = Tape()
    # If all weights train, the embedding's require the gradient of the first layer's input.
    x = tape.source(residual, gradient=not first or batch.method == "full")
    output = layer_forward(tape, shape, batch, x)
    forward, recomputation = tape.peak, tape.peak_at_last_save
    tape.release(output)
    saved_input = residual if x.buffer.references > 1 else 0  # the tape counts no byte of what comes from outside
    saved = tape.total + saved_input
    tape.peak = Peak()
    tape.backward(output)
    return LayerBytes(saved, saved_input, forward, recomputation, tape.peak)


@lru_cache(maxsize=1024)
def forward_peak_without_saving(shape: ModelShape, batch: MicroBatch) -> Peak:
    """The peak of a layer's forward pass that saves nothing."""
    tape = Tape(record=False)
    layer_forward(tape, shape, batch, tape.source(residual_size(shape, batch)))
    return tape.peak


@lru_cache(maxsize=1024)
def loss_head_peaks(shape: ModelShape, batch: MicroBatch, rows: int | None, in_place: bool) -> tuple[Peak, Peak]:
    """The peaks of the loss head's forward and backward pass; arguments as in `loss_head_costs.loss_head`."""
    tape = Tape()
    loss = loss_head(tape, shape, batch, tape.source(residual_size(shape, batch)), rows=rows, in_place=in_place)
    forward = tape.peak
    tape.peak = Peak()
    tape.backward(loss)
    return forward, tape.peak


def evaluation_peaks(shape: ModelShape, batch: MicroBatch, rows: int) -> tuple[Peak, Peak]:
    """The peaks of a layer, its keys and values cached, and of the logits of `rows` positions in a forward pass."""
    residual = residual_size(shape, batch)
    layer, logits = Tape(record=False), Tape(record=False)
    layer_forward(layer, shape, batch, layer.source(residual), cache=True)
    evaluation_logits(logits, shape, batch, logits.source(residual), rows)
    return layer.peak, logits.peak
