"""NF4 dequantization against the card's own copy rate. Never run yet where this was written: there was no GPU."""

from __future__ import annotations

import pytest
import torch

from fastprice.benchmarking.copy_bandwidth import BAR, dequantize_bandwidth
from fastprice.benchmarking.environment import measure_limits
from fastprice.benchmarking.workload import dequantize_shapes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def copy_rate() -> float:
    return float(measure_limits("cuda", 2.0)["copy_bytes_per_second"])


@pytest.mark.parametrize(("shape", "dtype"), dequantize_shapes(), ids=str)
def test_long_moves_reach_most_of_the_copy_rate(shape: tuple[int, int], dtype: str, copy_rate: float) -> None:
    row = dequantize_bandwidth(shape, getattr(torch, dtype), torch.device("cuda"), copy_rate)
    if row["passes"] is None:
        pytest.skip(f"{1e6 * row['bytes_moved'] / copy_rate:.0f} microseconds at the copy rate: too short to say")
    assert row["passes"], f"{row['share_of_copy']:.0%} of the copy rate, {BAR:.0%} required; by {row['timed_by']}"
