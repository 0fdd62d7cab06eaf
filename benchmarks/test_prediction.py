"""The distribution over prices against `generate` and a regular expression, batch for batch."""

from __future__ import annotations

from typing import Any

import pytest

from fastprice.bench.prediction import draw_prompts, generate_prices, sharpen
from fastprice.decoding import price_distributions
from fastprice.engines.bases import load_tokenizer


def test_distribution_against_generate(model: Any, ratio: Any) -> None:
    tokenizer = load_tokenizer("nano")
    model.set_attn_implementation("sdpa")
    sharpen(model)
    prompts = draw_prompts(tokenizer, 8, model.config.vocab_size)
    found = price_distributions(model, tokenizer, prompts)
    exact = price_distributions(model, tokenizer, prompts, tolerance=0.0)
    for each, truth in zip(found, exact, strict=True):
        assert each.median() == truth.median()
        assert 1 - each.missing_mass == pytest.approx(1 - truth.missing_mass, rel=0.01)
    ratio(
        lambda: price_distributions(model, tokenizer, prompts, batch_size=8),
        lambda: generate_prices(model, tokenizer, prompts, 8),
        at_least=0.3,  # of four generated tokens, on a model of which not much is computed but the prompt
    )
