"""The functions of `fastprice_kernels.ops` in plain PyTorch and few lines, for tests and benchmarks to compare with."""
