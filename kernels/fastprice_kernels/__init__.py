"""Triton kernels for the hot path of QLoRA, on torch and triton alone.

Every function takes CPU tensors too, where it is plain PyTorch (`reference.py`), and is a `torch.library` op below.
"""

from __future__ import annotations

from fastprice_kernels.nf4 import dequantize_nf4

__all__ = ["dequantize_nf4"]
