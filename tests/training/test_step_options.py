"""What a step may use of the memory that is free beside the loaded model."""

from __future__ import annotations

import pytest
import torch

from fastprice.memory import estimate as estimate_module
from fastprice.memory import layer_peaks, loss_head_costs
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


def test_the_estimate_counts_the_largest_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small vocabulary 256 rows take less than `LOSS_BYTES`, and a chunk may have more."""

    def peak() -> int:
        estimate = estimate_memory(
            "SmolLM2-135M", tokens=1024, recompute="full", loss_head="completion", labeled=1.0, engine="fastprice"
        )
        assert estimate.moment == "loss head"
        return estimate.tensor_bytes

    counted = peak()
    monkeypatch.setattr(loss_head_costs, "LOSS_BYTES", 0)
    for cached in (layer_peaks.loss_head_peaks, estimate_module._estimate):
        cached.cache_clear()
    assert counted - peak() == 1024 * 49152 * 2 - 256 * 49152 * 6 > 0
