"""What streaming costs by arithmetic: `python -m fastprice.offload.arithmetic` prints the table of docs/fit.md.

No measurement: operations and bytes against the limits of a card (fastprice.memory.roofline), every layer streamed,
logits for labeled tokens alone. A micro-batch hides its copies when computing takes at least as long as bringing each
layer in twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastprice.memory.planner import LABELED
from fastprice.memory.roofline import NF4_BYTES, Gpu, Step, known_gpu, step_seconds
from fastprice.models.shapes import ModelShape, read_shape

__all__ = ["hides_from", "layer_bytes", "table"]

MODELS = ("Llama-3.1-8B", "Qwen2.5-32B", "Llama-3.1-70B")
CARDS = ("RTX 4090", "H200")


def layer_bytes(shape: ModelShape) -> float:
    """Bytes of one layer's frozen weights in NF4, with their statistics: one visit."""
    return shape.layer_linear_weights * NF4_BYTES


def hides_from(shape: ModelShape, gpu: Gpu, *, recomputed: int) -> int:
    """The fewest tokens of a micro-batch whose computing takes as long as its copies, all layers being streamed."""
    low, high = 1, 1 << 20
    while low < high:
        middle = (low + high) // 2
        alone, streamed = (step_seconds(shape, _step(middle, recomputed, n), gpu) for n in (0, shape.layers))
        low, high = (low, middle) if alone >= streamed else (middle + 1, high)
    return low


def table(models: Sequence[str] = MODELS, cards: Sequence[str] = CARDS) -> str:
    """For each model and card, in Markdown: bytes, from which micro-batch copies are hidden, and the ceiling."""
    lines = [
        "| model | a layer | a step copies | card | hidden from, all recomputed | none recomputed | ceiling at 4,096 |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for name in models:
        shape = read_shape(name)
        size = layer_bytes(shape)
        for card in cards:
            gpu = known_gpu(card)
            tokens = [hides_from(shape, gpu, recomputed=recomputed) for recomputed in (shape.layers, 0)]
            rate = 4096 / step_seconds(shape, _step(4096, shape.layers, shape.layers), gpu)
            lines.append(
                f"| {name} | {size / 1e6:,.0f} MB | {2 * shape.layers * size / 1e9:,.1f} GB | {gpu.name}, "
                f"{gpu.pcie / 1e9:.0f} GB/s | {tokens[0]:,} tokens | {tokens[1]:,} tokens | {rate:,.0f} tok/s |"
            )
    return "\n".join(lines)


def _step(tokens: int, recomputed: int, streamed: int) -> Step:
    return Step(tokens, recomputed, LABELED, streamed=streamed)


if __name__ == "__main__":
    print(table())
