from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprice.benchmarking.random_models import model_config
from fastprice.benchmarking.workload import (
    MODELS,
    NF4_BYTES,
    dequantize_shapes,
    draw_rows,
    folder_bytes,
    linear_shapes,
    linear_weights,
    shape_of,
    step_flops,
)
from fastprice.errors import ConfigError
from fastprice.prompts.template import IGNORE


def test_flop_and_bytes_are_those_of_the_published_model() -> None:
    shape = shape_of("llama-3.1-8b")
    assert linear_weights(shape) == 6_979_321_856
    assert linear_shapes(shape)["down_proj"] == (4096, 14336)
    texts = [140] * 29
    # 28.4 GFLOP a token: 4 x 6.98 G frozen, the rest adapters, attention and 2 % of lm_head.
    assert step_flops(shape, texts, 87, 16) / sum(texts) == pytest.approx(28.4e9, rel=0.01)
    assert linear_weights(shape) * NF4_BYTES == pytest.approx(3.60e9, rel=0.01)
    every_token = step_flops(shape, texts, sum(texts), 16) - step_flops(shape, texts, 0, 16)
    assert every_token == pytest.approx(4 * sum(texts) * 128256 * 4096)
    # Adapters of rank 16 on every linear layer have 41,943,040 weights; forward and twice that backward.
    adapters = step_flops(shape, texts, 0, 32) - step_flops(shape, texts, 0, 16)
    assert adapters == pytest.approx(6 * sum(texts) * 41_943_040)
    assert folder_bytes("llama-3.1-8b") == pytest.approx(3.60e9 + 2 * 2 * 128256 * 4096, rel=0.01)


@pytest.mark.parametrize("model", MODELS)
def test_the_configuration_of_every_model_has_its_shape(model: str) -> None:
    assert shape_of(model_config(model)).parameters == shape_of(model).parameters
    assert model_config(model, layers=2).num_hidden_layers == 2


def test_every_layer_of_the_named_models_is_dequantized_once() -> None:
    shapes = dequantize_shapes()
    assert ((14336, 4096), "bfloat16") in shapes
    assert ((8192, 28672), "bfloat16") in shapes
    assert len(set(shapes)) == len(shapes)
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3.1-8b'"):
        shape_of("llama-3.1-8")


@given(st.integers(0, 1000))
def test_rows_are_as_long_as_price_texts_and_labeled_on_the_answer(seed: int) -> None:
    for row in draw_rows(20, 2048, 2, seed):
        assert 60 <= len(row.ids) <= 256
        answer = [label for label in row.labels if label != IGNORE]
        assert 2 <= len(answer) <= 4
        assert row.ids[-len(answer) :] == answer
        assert answer[-1] == 2
        assert min(row.ids[:-1]) >= 16
