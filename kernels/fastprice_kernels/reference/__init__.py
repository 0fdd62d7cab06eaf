"""The functions of `fastprice_kernels.ops` in plain PyTorch and few lines, for tests and benchmarks to compare with."""

from __future__ import annotations

from fastprice_kernels.reference.cross_entropy import completion_cross_entropy
from fastprice_kernels.reference.lora import activation, glu, lora_linear, lora_mlp
from fastprice_kernels.reference.nf4 import dequantize_nf4, matmul_fp32
from fastprice_kernels.reference.norms import norm
from fastprice_kernels.reference.rotary import rotate

__all__ = [
    "activation",
    "completion_cross_entropy",
    "dequantize_nf4",
    "glu",
    "lora_linear",
    "lora_mlp",
    "matmul_fp32",
    "norm",
    "rotate",
]
