"""Triton kernels for QLoRA fine-tuning, on torch and triton alone.

Every function takes CPU tensors too, where it is plain PyTorch. No kernel is autotuned: each has one configuration,
derived in its module or in docs/explanation/kernels.md. `python -m fastprice_kernels.codegen` compiles all of them for
every GPU generation, on any machine.

`fastprice_kernels.install` is the function; its module is `fastprice_kernels.patching.install`.
"""

from __future__ import annotations

from fastprice_kernels.ops.completion_cross_entropy import completion_cross_entropy
from fastprice_kernels.ops.lora import Projection, lora_linear, lora_projections, lora_qkv
from fastprice_kernels.ops.lora_mlp import lora_mlp
from fastprice_kernels.ops.nf4_dequantize import dequantize_nf4
from fastprice_kernels.ops.nf4_matmul_small import nf4_matmul_small
from fastprice_kernels.patching.install import InstallReport, install, installed, uninstall

__all__ = [
    "InstallReport",
    "Projection",
    "completion_cross_entropy",
    "dequantize_nf4",
    "install",
    "installed",
    "lora_linear",
    "lora_mlp",
    "lora_projections",
    "lora_qkv",
    "nf4_matmul_small",
    "uninstall",
]
