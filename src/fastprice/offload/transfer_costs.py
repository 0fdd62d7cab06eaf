"""What layer offload costs by arithmetic: `python -m fastprice.offload.transfer_costs` prints the table of docs/fit.md.

No measurement: operations and bytes against the limits of a card (fastprice.memory.roofline), every layer offloaded,
logits for labeled tokens alone. A micro-batch hides its copies if computing takes at least as long as copying each
layer to the GPU twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastprice.memory.planner import LABELED
from fastprice.memory.roofline import NF4_BYTES, Gpu, TrainingStep, find_gpu, step_seconds
from fastprice.models.shapes import ModelShape, read_shape

__all__ = ["cost_table", "layer_weight_bytes", "tokens_to_hide_copies"]

MODELS = ("Llama-3.1-8B", "Qwen2.5-32B", "Llama-3.1-70B")
CARDS = ("RTX 4090", "H200")


def layer_weight_bytes(shape: ModelShape) -> float:
    """Bytes of one layer's frozen weights in NF4 with their statistics: one copy to the GPU."""
    return shape.layer_linear_weights * NF4_BYTES


def tokens_to_hide_copies(shape: ModelShape, gpu: Gpu, *, recomputed_layers: int) -> int:
    """The fewest tokens of a micro-batch whose computing takes as long as its copies, with every layer offloaded."""
    low, high = 1, 1 << 20
    while low < high:
        middle = (low + high) // 2
        resident, offloaded = (
            step_seconds(shape, _step(middle, recomputed_layers, layers), gpu) for layers in (0, shape.layers)
        )
        low, high = (low, middle) if resident >= offloaded else (middle + 1, high)
    return low


def cost_table(models: Sequence[str] = MODELS, cards: Sequence[str] = CARDS) -> str:
    """For each model and card, in Markdown: bytes copied, the micro-batch that hides the copies, tokens a second."""
    lines = [
        "| model | a layer | a step copies | card | hidden from, all recomputed | none recomputed | limit at 4,096 |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for name in models:
        shape = read_shape(name)
        size = layer_weight_bytes(shape)
        for card in cards:
            gpu = find_gpu(card)
            tokens = [tokens_to_hide_copies(shape, gpu, recomputed_layers=layers) for layers in (shape.layers, 0)]
            rate = 4096 / step_seconds(shape, _step(4096, shape.layers, shape.layers), gpu)
            lines.append(
                f"| {name} | {size / 1e6:,.0f} MB | {2 * shape.layers * size / 1e9:,.1f} GB | {gpu.name}, "
                f"{gpu.pcie / 1e9:.0f} GB/s | {tokens[0]:,} tokens | {tokens[1]:,} tokens | {rate:,.0f} tok/s |"
            )
    return "\n".join(lines)


def _step(tokens: int, recomputed_layers: int, offloaded_layers: int) -> TrainingStep:
    return TrainingStep(tokens, recomputed_layers, LABELED, offloaded_layers=offloaded_layers)


if __name__ == "__main__":
    print(cost_table())
