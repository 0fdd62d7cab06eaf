"""What a step may use of the memory that is free beside the loaded model."""

from __future__ import annotations

import pytest
import torch

from fastprice.memory.estimate import estimate_memory
from fastprice.memory.loss_head_costs import LOSS_BYTES
from fastprice.training.step_options import free_loss_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "reserved", "budget", "found"),
    [
        (18 * GIB, 6 * GIB, None, LOSS_BYTES),
        (4 * GIB, 6 * GIB, None, GIB // 16),
        (18 * GIB, 6 * GIB, 8 * GIB, GIB // 32),  # the user's limit is nearer than the card's
        (18 * GIB, 6 * GIB, 6 * GIB, 0),
        (18 * GIB, 6 * GIB, 5 * GIB, 0),
    ],
)
def test_bytes_of_a_chunk_of_logits(
    free: int, reserved: int, budget: int | None, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
    assert free_loss_bytes(budget) == found


def test_without_a_gpu_the_chunk_is_the_frugal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert free_loss_bytes(None) == 0


def test_the_estimate_counts_the_largest_chunk() -> None:
    """With a small vocabulary 256 rows take less than `LOSS_BYTES`, and a chunk may have more."""

    def peak(labeled: float) -> int:
        estimate = estimate_memory(
            "SmolLM2-135M", tokens=8192, recompute="full", loss_head="completion", labeled=labeled,
            engine="fastprice",
        )  # fmt: skip
        assert estimate.moment == "loss head"
        return estimate.tensor_bytes

    rows_of_256 = 256 * 49152 * 6
    assert rows_of_256 < LOSS_BYTES
    assert peak(1.0) - peak(0.02) >= LOSS_BYTES - rows_of_256
