"""The bytes that a layer of a tuned Unsloth moves, by arithmetic: nothing of Unsloth runs, and none of it is here.

For each token, in 16 bits, with nothing recomputed: what its fused kernels must read and write, and what its LoRA
functions multiply, read off their structure (2026.10.7). `ASSUMPTIONS` says each in words. Where two readings were
possible the one with fewer bytes was taken.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastprice.memory.roofline import NF4_BYTES
from fastprice.models.shapes import ModelShape

__all__ = ["ASSUMPTIONS", "unsloth_layer_traffic"]

ASSUMPTIONS = (
    "Nothing is recomputed (`use_gradient_checkpointing=False`); activations in bf16, adapters in fp32.",
    "RMSNorm: forward reads x and writes y, backward reads x and dy and writes dx over dy. The two statistics a token "
    "are 4 bytes each. Norms of queries and keys (Qwen3) likewise.",
    "Residual additions run in PyTorch: two reads and a write, forward and, as sums of gradients, backward.",
    "RoPE: queries and keys are views that are no rows of their own, so they are copied once, and the copy is rotated "
    "in place: two reads and two writes, forward and backward.",
    "Each weight is dequantized once forward and once backward, in one launch, and each product reads it in 16 bits.",
    "Each projection multiplies x by its own A (x is read once more for each), casts A and B from fp32 and their "
    "gradients back, and adds its second product in place, which reads and writes the output again.",
    "Backward, each projection reads dy twice and x twice for its adapter's gradients (x A is computed again), and "
    "adds the adapter's part of dx in place; o_proj and down_proj compute dy B twice.",
    "SwiGLU and GeGLU: two reads and a write forward, three reads and three writes backward.",
    "Attention reads q, k, v and writes its output and logsumexp, as counted for all peers.",
    "Biases (Qwen2) cost nothing.",
)

_Row = tuple[int, float]


def unsloth_layer_traffic(shape: ModelShape, *, tokens: int, rank: int) -> dict[str, Mapping[str, _Row]]:
    """For "forward" and "backward": kind -> (launches, bytes for each token of one layer)."""
    h, q, k, i = shape.width, shape.query_width, shape.key_width, shape.inner
    linears, count = shape.linears, len(shape.linears)
    inputs, outputs = sum(each.inputs for each in linears), sum(each.outputs for each in linears)
    weights, adapter = shape.layer_linear_weights / tokens, shape.adapter_weights(rank) / tokens
    heads = q + k if shape.family.query_key_norms else 0
    norms = shape.family.layer_norms
    norm_launches, normed = norms + (2 if heads else 0), norms * h + heads
    casts = 2 * count
    dequantization: _Row = (count, (NF4_BYTES + 2) * weights)
    rope: _Row = (1, 2 * 2 * (q + k))
    eager: _Row = (4, 2 * (2 * 3 * h) + 2 * 2 * (q + k))  # two additions, and q and k copied
    attention = 2 * (2 * q + 2 * k) + 4 * shape.heads
    # x, A and x A; then x A, B and the output read and written.
    lora_forward = 2 * (inputs + 2 * rank * count + 2 * outputs) + 2 * adapter
    # dy B; x^T (dy B); x A; (x A)^T dy; dx += (dy B) A. Of the adapter, B once, A twice, both gradients written.
    lora_backward = 2 * (2 * outputs + 4 * inputs + 5 * rank * count) + 2 * (2 * adapter + rank * inputs / tokens)
    lora_backward += 2 * 2 * (h + rank + rank * h / tokens)  # o_proj and down_proj once more dy B
    return {
        "forward": {
            "frozen product": (count, 2 * (inputs + outputs) + 2 * weights),
            "LoRA product": (2 * count, lora_forward),
            "attention": (1, attention),
            "dequantization": dequantization,
            "activation": (1, 2 * 3 * i),
            "fused norm": (norm_launches, 2 * 2 * normed + 4 * norms),
            "fused RoPE": rope,
            "cast": (casts, (4 + 2) * adapter),
            "other eager": eager,
        },
        "backward": {
            # q, k, v and gate, up add up in one dx: three of the five read it as well.
            "frozen product": (count, 2 * (inputs + outputs) + 2 * weights + 2 * 3 * h),
            "LoRA product": (5 * count + 2, lora_backward),
            "attention": (1, attention + 2 * q + 2 * (q + 2 * k)),
            "dequantization": dequantization,
            "activation": (1, 2 * 6 * i),
            "fused norm": (norm_launches, 2 * 3 * normed + 4 * norms),
            "fused RoPE": rope,
            "cast": (2 * casts, 2 * (4 + 2) * adapter),  # the weights, and their gradients back to fp32
            "other eager": eager,
        },
    }
