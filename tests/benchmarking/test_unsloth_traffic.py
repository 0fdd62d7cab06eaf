"""The arithmetic of Unsloth's form against operators of the same form, counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastprice.benchmarking.traffic_counter import TrafficCounter
from fastprice.benchmarking.unsloth_traffic import unsloth_layer_traffic
from fastprice.models.shapes import Linear, read_shape

SHAPE = read_shape("Qwen2.5-0.5B")
TOKENS, RANK = 512, 16


def half(*sizes: int) -> Tensor:
    return torch.empty(*sizes, dtype=torch.bfloat16)


def forward(linear: Linear, x: Tensor, frozen: Tensor, a: Tensor, b: Tensor) -> None:
    y = x @ frozen.t()
    y.addmm_(x @ a.t(), b.t())


def backward(linear: Linear, dx: Tensor | None, frozen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`dx`: to add to, or None for the first projection of an input. o_proj and down_proj compute dy B twice."""
    dy, x = half(TOKENS, linear.outputs), half(TOKENS, linear.inputs)
    inner = dy @ b
    if linear.name in ("o_proj", "down_proj"):
        inner = dy @ b
    half(linear.inputs, RANK).addmm_(x.t(), inner, beta=0)
    half(RANK, linear.outputs).addmm_((x @ a.t()).t(), dy, beta=0)
    dx = dy @ frozen if dx is None else dx.addmm_(dy, frozen)
    return dx.addmm_(inner, a)


def test_the_products_of_all_linear_layers() -> None:
    counted = {}
    for phase in ("forward", "backward"):
        with TrafficCounter(RANK) as counter:
            dx = None
            for linear in SHAPE.linears:
                frozen, a, b = (
                    half(linear.outputs, linear.inputs),
                    half(RANK, linear.inputs),
                    half(linear.outputs, RANK),
                )
                if phase == "forward":
                    forward(linear, half(TOKENS, linear.inputs), frozen, a, b)
                else:
                    dx = backward(linear, dx if linear.name in ("k_proj", "v_proj", "up_proj") else None, frozen, a, b)
        for kind in ("frozen product", "LoRA product"):
            found = [each for each in counter.launches if each.kind == kind]
            counted[phase, kind] = (len(found), sum(each.bytes for each in found) / TOKENS)
        assert len(counter.launches) == sum(counted[phase, kind][0] for kind in ("frozen product", "LoRA product"))
    arithmetic = unsloth_layer_traffic(SHAPE, tokens=TOKENS, rank=RANK)
    for (phase, kind), (launches, size) in counted.items():
        assert arithmetic[phase][kind] == (launches, pytest.approx(size, rel=1e-9))


def test_what_is_the_same_for_all_is_as_counted_for_us() -> None:
    """Attention, dequantization and activation of Llama-3.1-8B, by hand: bytes a token."""
    traffic = unsloth_layer_traffic(read_shape("Llama-3.1-8B"), tokens=4096, rank=16)
    weights = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert traffic["forward"]["attention"] == (1, 2 * (4096 + 2 * 1024 + 4096) + 4 * 32)
    assert traffic["backward"]["attention"] == (1, 2 * (4096 + 2 * 1024 + 2 * 4096 + 4096 + 2 * 1024) + 4 * 32)
    assert traffic["forward"]["activation"] == (1, 6 * 14336)
    assert traffic["backward"]["activation"] == (1, 12 * 14336)
    nested = 0.5 + 1 / 64 + 4 / (64 * 256) + 2
    assert traffic["forward"]["dequantization"] == (7, pytest.approx(weights * nested / 4096))
    assert traffic["forward"]["fused norm"] == (2, 2 * (2 * 2 * 4096 + 4))


def test_norms_of_queries_and_keys_are_counted_where_a_family_has_them() -> None:
    plain = unsloth_layer_traffic(read_shape("Llama-3.2-1B"), tokens=4096, rank=16)
    qwen3 = unsloth_layer_traffic(read_shape("Qwen3-0.6B"), tokens=4096, rank=16)
    assert plain["forward"]["fused norm"][0] == 2
    assert qwen3["forward"]["fused norm"] == (4, 4 * (2 * 1024 + 2048 + 1024) + 8)
