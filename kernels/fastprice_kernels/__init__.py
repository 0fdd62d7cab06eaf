"""Triton kernels for the hot path of QLoRA, on torch and triton alone.

Every function takes CPU tensors too, where it is plain PyTorch. `python -m fastprice_kernels.codegen` builds
every kernel for every GPU generation, on any machine. No kernel is autotuned: each has one configuration, reasoned out
in its module.

Note that `fastprice_kernels.install` is the function; its module is `fastprice_kernels.patching.install`.
"""

from __future__ import annotations

from fastprice_kernels.ops.completion_cross_entropy import completion_cross_entropy
from fastprice_kernels.ops.lora import Projection, lora_linear, lora_mlp, lora_projections, lora_qkv
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
