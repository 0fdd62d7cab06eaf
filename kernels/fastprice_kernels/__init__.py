"""Triton kernels for the hot path of QLoRA, on torch and triton alone."""
