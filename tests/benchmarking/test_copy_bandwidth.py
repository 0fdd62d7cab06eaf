from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.benchmarking.fake_cuda import FakeCuda

from fastprice.benchmarking import copy_bandwidth
from fastprice.benchmarking.copy_bandwidth import dequantize_bandwidth
from fastprice.benchmarking.workload import NF4_BYTES

SHAPE = (256, 512)
MOVED = 256 * 512 * (NF4_BYTES + 2)


@pytest.mark.parametrize(
    ("move", "took", "passes"),
    [(50e-6, 50e-6 / 0.86, True), (50e-6, 50e-6 / 0.84, False), (30e-6, 30e-6 / 0.2, None), (30e-6, 30e-6, None)],
)
def test_the_bar_is_for_moves_that_are_long_enough(
    move: float, took: float, passes: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_bandwidth, "seconds_per_launch", lambda launches, device: (took, "graph"))
    row = dequantize_bandwidth(SHAPE, torch.float16, torch.device("cpu"), MOVED / move)
    assert row["passes"] is passes
    assert row["share_of_copy"] == pytest.approx(move / took)


def test_weights_on_a_device_are_larger_than_its_cache_together(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(copy_bandwidth, "dequantize_nf4", lambda packed, state, out: seen.append(out.data_ptr()))
    monkeypatch.setattr(copy_bandwidth, "seeded_generator", lambda device: torch.Generator())
    monkeypatch.setattr(copy_bandwidth, "random_nf4_weight", lambda *arguments: (None, None))
    row = dequantize_bandwidth(SHAPE, torch.float16, torch.device("cuda"), 1e12)
    assert row["timed_by"] == "graph"
    assert row["launches"] == 64
    assert len(set(seen)) == 64, "each launch has tensors of its own"
    wide = dequantize_bandwidth((4096, 4096), torch.float16, torch.device("cuda"), 1e12)
    assert wide["launches"] * wide["bytes_moved"] >= 2**28 * 0.9


def test_a_real_kernel_is_timed_on_the_cpu() -> None:
    row = dequantize_bandwidth((64, 128), torch.float32, torch.device("cpu"), 1e9)
    assert 0 < row["share_of_copy"] < 100
    assert row["timed_by"] == "stream"
