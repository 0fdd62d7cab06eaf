"""How fast a step can be at most: operations and bytes of a model's step against what a GPU can do.

Arithmetic, not measurement: a real step is slower. For each token and weight a matmul costs 2 operations forward and 2
for the gradient of its input; a recomputed layer costs its forward again; trained weights cost 2 more for their own
gradient. Attention over a text of S tokens costs 2 S q operations forward (half the square, scores and values), as
much again where recomputed, and 2.5 times that backward. A 4-bit base is dequantized once a pass over a layer, which
reads the packed weights and writes them in 16 bits. A layer that computes only its cheap things again reads and writes
each norm once and reads gate and up and writes their product.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastprice.errors import ConfigError, nearest_name
from fastprice.models.shapes import ModelShape

__all__ = ["GPUS", "Gpu", "Step", "flops_per_token", "known_gpu", "step_seconds"]

GIB = 1 << 30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight with its statistics under double quantization


@dataclass(frozen=True)
class Gpu:
    """Peak figures: bytes, bytes a second, dense bf16 operations a second (fp32 sums), host-to-device bytes a second.

    measured: bandwidth and operations were measured on such a card (copy and matmul), not read from its data sheet.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    pcie: float
    measured: bool = False


# Makers' data sheets, except the H200: copy and matmul measured. PCIe: what a pinned copy reaches in practice.
GPUS = (
    Gpu("RTX 3090", 24 * GIB, 0.936e12, 71e12, 25e9),
    Gpu("RTX 4090", 24 * GIB, 1.0e12, 165e12, 25e9),
    Gpu("RTX 5090", 32 * GIB, 1.79e12, 209e12, 50e9),
    Gpu("L4", 24 * GIB, 0.3e12, 121e12, 25e9),
    Gpu("L40S", 48 * GIB, 0.864e12, 362e12, 25e9),
    Gpu("A100-40GB", 40 * GIB, 1.555e12, 312e12, 25e9),
    Gpu("A100-80GB", 80 * GIB, 2.039e12, 312e12, 25e9),
    Gpu("H100", 80 * GIB, 3.35e12, 989e12, 50e9),
    Gpu("H200", 139 * GIB, 4.3e12, 790e12, 50e9, measured=True),
)


def known_gpu(name: str) -> Gpu:
    """The GPU of that name (any case, blanks and dashes ignored); ConfigError with the nearest name for another."""
    plain = {"".join(c for c in gpu.name.lower() if c.isalnum()): gpu for gpu in GPUS}
    found = plain.get("".join(c for c in name.lower() if c.isalnum()).removeprefix("nvidia").removeprefix("geforce"))
    if found is None:
        raise ConfigError(
            f"gpu: {name!r} is not one of {', '.join(gpu.name for gpu in GPUS)}"
            f"{nearest_name(name, [gpu.name for gpu in GPUS])}"
        )
    return found


@dataclass(frozen=True)
class Step:
    """What one micro-batch computes.

    recomputed   layers whose forward pass is done twice        labeled   share of positions whose logits are needed
    text         mean tokens of a text                          streamed   layers whose weights come from the host
    costly       layers that compute their cheap things twice   hosted     layers whose input waits on the host
    fused        fastprice's kernels, whose MLP has no product of its own to compute again
    """

    tokens: int
    recomputed: int
    labeled: float
    method: str = "qlora"
    rank: int = 16
    text: int = 180
    streamed: int = 0
    costly: int = 0
    hosted: int = 0
    fused: bool = False


def flops_per_token(shape: ModelShape, step: Step) -> float:
    """Floating-point operations for each token of a training step; for logits of all tokens, `labeled` is 1."""
    again = 2 * step.recomputed / shape.layers
    own = 2.0 if step.method == "full" else 0.0
    linear = (4 + own + again) * shape.layers * shape.layer_linear_weights
    adapters = 0.0 if step.method == "full" else (6 + again) * shape.layers * shape.adapter_weights(step.rank)
    head = (4 + own) * shape.lm_head_weights * step.labeled
    attention = (3.5 + again / 2) * 2 * step.text * shape.query_width * shape.layers
    return linear + adapters + head + attention


def step_seconds(shape: ModelShape, step: Step, gpu: Gpu) -> float:
    """The least time of one micro-batch: its operations, then the passes of dequantization and of cheap things that are
    computed again; and no less than it takes to bring each streamed layer in twice, in forward and in backward, and
    each input on the host back once, if that hides behind the rest."""
    width = 4 if step.method == "full" else 2  # bytes an element of the residual stream
    seconds = step.tokens * flops_per_token(shape, step) / gpu.flops
    again = 2 * width * shape.family.layer_norms * shape.width + (0 if step.fused else 6 * shape.inner)
    if shape.family.query_key_norms:
        again += 4 * (shape.query_width + shape.key_width)
    seconds += step.tokens * step.costly * again / gpu.bandwidth
    layer = shape.layer_linear_weights
    if step.method == "qlora":
        seconds += (2 * shape.layers + step.recomputed) * layer * (NF4_BYTES + 2) / gpu.bandwidth
    arriving = 2 * step.streamed * layer * NF4_BYTES + step.hosted * step.tokens * width * shape.width
    return max(seconds, arriving / gpu.pcie)
