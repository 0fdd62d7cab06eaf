"""Arithmetic limits of a training step.

The published figures are for Llama-3.1-8B, rank 16 on all linear layers, texts of 180 tokens, 4 of them the price.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastprice.errors import ConfigError
from fastprice.memory import plan_memory
from fastprice.memory.roofline import NF4_BYTES, TrainingStep, find_gpu, flops_per_token, step_seconds
from fastprice.models.shapes import read_shape

SHAPE = read_shape("Llama-3.1-8B")
LABELED = 4 / 180


def test_operations_for_each_token() -> None:
    stock = flops_per_token(SHAPE, TrainingStep(4096, 32, 1.0))
    best = flops_per_token(SHAPE, TrainingStep(4096, 0, LABELED))
    assert round(stock / 1e9, 1) == 44.5
    assert round(best / 1e9, 1) == 28.4
    assert round(stock / best, 2) == 1.57


def test_a_plan_without_recomputation_saves_the_published_share() -> None:
    """8B, 4,096 packed tokens: the plan against recomputing everything with logits for every token."""
    plan = plan_memory("Llama-3.1-8B", "80GiB", tokens=4096)
    assert plan.levels == ("none",) * 32
    step = TrainingStep(4096, plan.recomputed_layers, LABELED, selective_layers=plan.levels.count("selective"))
    stock = flops_per_token(SHAPE, TrainingStep(4096, 32, 1.0))
    assert stock / flops_per_token(SHAPE, step) == pytest.approx(1.57, abs=0.005)


def test_selective_recomputation_costs_bytes_and_offloaded_inputs_the_bus() -> None:
    gpu = find_gpu("RTX 4090")
    plain = step_seconds(SHAPE, TrainingStep(4096, 0, LABELED), gpu)
    cheap = step_seconds(SHAPE, TrainingStep(4096, 0, LABELED, selective_layers=32), gpu)
    # Two norms read and written (8 h), gate and up read, their product written (6 i)
    assert cheap - plain == pytest.approx(32 * 4096 * (8 * 4096 + 6 * 14336) / 1.0e12)
    assert 0.01 < cheap / plain - 1 < 0.03
    fused = step_seconds(SHAPE, TrainingStep(4096, 0, LABELED, selective_layers=32, fused=True), gpu)
    assert fused - plain == pytest.approx(32 * 4096 * 8 * 4096 / 1.0e12)
    again = step_seconds(SHAPE, TrainingStep(4096, 32, LABELED), gpu)
    assert step_seconds(SHAPE, TrainingStep(4096, 32, LABELED, offloaded_inputs=32), gpu) == again
    slow = replace(gpu, pcie=5e8)
    assert step_seconds(SHAPE, TrainingStep(4096, 32, LABELED, offloaded_inputs=32), slow) == pytest.approx(
        32 * 4096 * 8192 / 5e8
    )


@pytest.mark.parametrize(("name", "again", "once"), [("8B", 4.7, 6.9), ("3B", 8.4, 12.0), ("1B", 14.9, 20.8)])
def test_share_of_lm_head(name: str, again: float, once: float) -> None:
    shape = read_shape("Llama-3.1-8B" if name == "8B" else f"Llama-3.2-{name}")
    for recomputed, share in ((shape.layers, again), (0, once)):
        full = flops_per_token(shape, TrainingStep(4096, recomputed, 1.0))
        none = flops_per_token(shape, TrainingStep(4096, recomputed, 0.0))
        assert 100 * (full - none) / full == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize(("tokens", "floor"), [(2048, 128), (4096, 243), (8192, 474)])
def test_least_time_of_a_step_on_an_h200(tokens: int, floor: int) -> None:
    assert round(1e3 * step_seconds(SHAPE, TrainingStep(tokens, 32, 1.0), find_gpu("H200"))) == floor


@pytest.mark.parametrize(
    ("gpu", "tokens", "recomputed", "labeled", "thousands"),
    [
        ("H200", 2048, 32, 1.0, 16.0), ("H200", 4096, 32, 1.0, 16.8), ("H200", 8192, 32, 1.0, 17.3),
        ("H200", 2048, 0, LABELED, 25.1), ("H200", 4096, 0, LABELED, 26.4), ("H200", 8192, 0, LABELED, 27.1),
        ("RTX 4090", 2048, 32, 1.0, 3.4), ("RTX 4090", 4096, 32, 1.0, 3.5), ("RTX 4090", 8192, 32, 1.0, 3.6),
        ("RTX 4090", 2048, 0, LABELED, 5.3), ("RTX 4090", 4096, 0, LABELED, 5.5),
        ("RTX 4090", 8192, 0, LABELED, 5.7),
    ],
)  # fmt: skip
def test_tokens_per_second_limits(gpu: str, tokens: int, recomputed: int, labeled: float, thousands: float) -> None:
    step = TrainingStep(tokens, recomputed, labeled)
    assert round(tokens / step_seconds(SHAPE, step, find_gpu(gpu)) / 1e3, 1) == thousands


def test_three_dequantization_passes_move_53_gigabytes() -> None:
    weights = SHAPE.layers * SHAPE.layer_linear_weights
    assert 3 * weights * (NF4_BYTES + 2) == pytest.approx(52.7e9, rel=0.001)


def test_a_70b_step_copies_71_gigabytes() -> None:
    shape, gpu = read_shape("Llama-3.1-70B"), find_gpu("rtx4090")
    tiny = TrainingStep(16, 80, LABELED, offloaded_layers=80)
    assert step_seconds(shape, tiny, gpu) == pytest.approx(70.6e9 / 25e9, rel=0.001)
    large = TrainingStep(4096, 80, LABELED, offloaded_layers=80)
    assert step_seconds(shape, large, gpu) == step_seconds(shape, TrainingStep(4096, 80, LABELED), gpu)


def test_an_unknown_card_gets_the_nearest_name() -> None:
    assert find_gpu("NVIDIA GeForce RTX-4090").name == "RTX 4090"
    with pytest.raises(ConfigError, match=r"did you mean 'RTX 4090'"):
        find_gpu("RTX 4091")
