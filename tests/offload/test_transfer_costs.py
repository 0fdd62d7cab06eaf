"""The arithmetic costs of layer offload, as published in docs/fit.md."""

from __future__ import annotations

import pytest
from tests.paths import DOCS

from fastprice.memory.planner import find_plan
from fastprice.memory.roofline import TrainingStep, find_gpu, step_seconds
from fastprice.models.shapes import read_shape
from fastprice.offload.transfer_costs import cost_table, layer_weight_bytes, tokens_to_hide_copies

GUIDE = DOCS / "fit.md"


def test_the_table_in_the_docs_is_the_one_that_is_computed():
    assert cost_table() in GUIDE.read_text(encoding="utf-8")


def test_a_70b_layer_is_441_mb_and_hides_from_about_a_thousand_tokens_on_a_4090():
    shape = read_shape("Llama-3.1-70B")
    assert layer_weight_bytes(shape) == pytest.approx(441e6, rel=2e-3)
    gpu = find_gpu("RTX 4090")
    tokens = tokens_to_hide_copies(shape, gpu, recomputed_layers=80)
    assert 800 <= tokens <= 1100

    def seconds(tokens: int, offloaded_layers: int) -> float:
        return step_seconds(shape, TrainingStep(tokens, 80, 4 / 180, offloaded_layers=offloaded_layers), gpu)

    assert seconds(tokens, 80) == seconds(tokens, 0)
    assert seconds(tokens - 10, 80) > seconds(tokens - 10, 0)


def test_70b_is_planned_within_24_gib_only_with_layer_offload():
    assert find_plan("Llama-3.1-70B", "24GiB") is None
    plan = find_plan("Llama-3.1-70B", "24GiB", layer_offload=True, engine="fastprice")
    assert plan is not None
    assert 40 < plan.offloaded_layers < 80
