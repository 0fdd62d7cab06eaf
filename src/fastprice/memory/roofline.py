"""How fast a training step can be at most: its operations and bytes against the limits of a GPU.

Arithmetic, not measurement: a real step is slower. For each token and weight a matrix product costs 2 operations
forward and 2 for the gradient of its input; a recomputed layer costs its forward again; trainable weights cost 2 more
for their own gradient. Attention over a text of S tokens costs 2 S q operations forward (half the square, scores and
values), as much again where recomputed, and 2.5 times that backward. A 4-bit base is dequantized once in each pass over
a layer, which reads the packed weights and writes them in 16 bits. Selective recomputation reads and writes each norm
once more, and reads gate and up and writes their product; at level "mlp" the products of gate and up run again.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastprice.errors import ConfigError, nearest_name
from fastprice.memory.byte_sizes import GIB
from fastprice.models.shapes import ModelShape

__all__ = ["GPUS", "Gpu", "TrainingStep", "find_gpu", "flops_per_token", "step_seconds"]

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


# From the makers' data sheets, except the H200: copy and matmul measured. PCIe: what a pinned copy reaches in practice.
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


def find_gpu(name: str) -> Gpu:
    """The GPU of that name (any case, blanks and dashes ignored); raises ConfigError for an unknown one."""
    by_name = {_alphanumeric(gpu.name): gpu for gpu in GPUS}
    gpu = by_name.get(_alphanumeric(name).removeprefix("nvidia").removeprefix("geforce"))
    if gpu is None:
        names = [each.name for each in GPUS]
        raise ConfigError(f"gpu: {name!r} is not one of {', '.join(names)}{nearest_name(name, names)}")
    return gpu


def _alphanumeric(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


@dataclass(frozen=True)
class TrainingStep:
    """What the forward and backward pass of one micro-batch computes and copies.

    tokens             of the micro-batch                labeled      share of positions whose logits are computed
    recomputed_layers  whose forward pass runs twice     rank         of the LoRA adapters (methods "qlora", "lora")
    text_tokens        mean tokens of a text             fused        fastprice's kernels, whose MLP saves no product
    selective_layers   at recompute level "selective"    offloaded_inputs   layers at recompute level "offload"
    offloaded_layers   whose weights are on the host     mlp_layers   at recompute level "mlp"
    dense_layers       whose 4-bit weights stay dequantized, none of them recomputed
    """

    tokens: int
    recomputed_layers: int
    labeled: float
    method: str = "qlora"
    rank: int = 16
    text_tokens: int = 180
    offloaded_layers: int = 0
    selective_layers: int = 0
    mlp_layers: int = 0
    dense_layers: int = 0
    offloaded_inputs: int = 0
    fused: bool = False


def flops_per_token(shape: ModelShape, step: TrainingStep) -> float:
    """Floating-point operations for each token of a training step; for logits of all tokens, `labeled` is 1."""
    recomputed = 2 * step.recomputed_layers / shape.layers
    weight_gradient = 2.0 if step.method == "full" else 0.0
    linear = (4 + weight_gradient + recomputed) * shape.layers * shape.layer_linear_weights
    adapters = 0.0 if step.method == "full" else (6 + recomputed) * shape.layers * shape.adapter_weights(step.rank)
    gate_up = 2 * step.mlp_layers * sum(linear.weights for linear in shape.linears[4:6])
    head = (4 + weight_gradient) * shape.lm_head_weights * step.labeled
    attention = (3.5 + recomputed / 2) * 2 * step.text_tokens * shape.query_width * shape.layers
    return linear + adapters + gate_up + head + attention


def step_seconds(shape: ModelShape, step: TrainingStep, gpu: Gpu) -> float:
    """The least time of one micro-batch.

    That is its operations, then the passes of dequantization and of selective recomputation; and no less than it takes
    to copy each offloaded layer to the GPU twice, in forward and in backward, and each offloaded input back once, if
    these copies overlap with the rest.
    """
    residual_bytes = 4 if step.method == "full" else 2  # an element of the residual stream
    seconds = step.tokens * flops_per_token(shape, step) / gpu.flops
    selective = 2 * residual_bytes * shape.family.layer_norms * shape.width + (0 if step.fused else 6 * shape.inner)
    if shape.family.query_key_norms:
        selective += 4 * (shape.query_width + shape.key_width)
    seconds += step.tokens * (step.selective_layers + step.mlp_layers) * selective / gpu.bandwidth
    layer = shape.layer_linear_weights
    if step.method == "qlora":
        passes = (2 * (shape.layers - step.dense_layers) + step.recomputed_layers) * layer
        if not step.fused:  # the kernels dequantize gate and up once for the recomputation and the gradient
            passes += step.mlp_layers * sum(linear.weights for linear in shape.linears[4:6])
        seconds += passes * (NF4_BYTES + 2) / gpu.bandwidth
    inputs = step.offloaded_inputs * step.tokens * residual_bytes * shape.width
    return max(seconds, (2 * step.offloaded_layers * layer * NF4_BYTES + inputs) / gpu.pcie)
