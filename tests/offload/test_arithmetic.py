"""What the docs say that streaming costs."""

from __future__ import annotations

import pytest
from fastprice.offload.arithmetic import hides_from, layer_bytes, table
from tests.paths import DOCS

from fastprice.memory.planner import find_plan
from fastprice.memory.roofline import Step, known_gpu, step_seconds
from fastprice.models.shapes import read_shape

GUIDE = DOCS / "fit.md"


def test_the_table_in_the_docs_is_the_one_that_is_computed():
    assert table() in GUIDE.read_text(encoding="utf-8")


def test_a_70b_layer_is_441_mb_and_hides_from_about_a_thousand_tokens_on_a_4090():
    shape = read_shape("Llama-3.1-70B")
    assert layer_bytes(shape) == pytest.approx(441e6, rel=2e-3)
    gpu = known_gpu("RTX 4090")
    tokens = hides_from(shape, gpu, recomputed=80)
    assert 800 <= tokens <= 1100

    def seconds(tokens: int, streamed: int) -> float:
        return step_seconds(shape, Step(tokens, 80, 4 / 180, streamed=streamed), gpu)

    assert seconds(tokens, 80) == seconds(tokens, 0)
    assert seconds(tokens - 10, 80) > seconds(tokens - 10, 0)


def test_70b_is_planned_within_24_gib_and_not_without_streaming():
    assert find_plan("Llama-3.1-70B", "24GiB") is None
    plan = find_plan("Llama-3.1-70B", "24GiB", streaming=True, engine="fastprice")
    assert plan is not None
    assert 40 < plan.streamed < 80
