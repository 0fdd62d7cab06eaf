"""Compiles every kernel for every GPU generation without a GPU and reads its machine code.

The command is `python -m fastprice_kernels.codegen`, see report.py.
"""
