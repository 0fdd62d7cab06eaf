"""Point estimates from the distribution against `generate` and a regular expression, batch for batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from fastprice.bench.models import seed_adapters
from fastprice.bench.prediction import check_prediction, draw_prompts, generate_prices, sharpen
from fastprice.decoding import QUICK, PriceDecoder
from fastprice.dense_reading import DenseReader
from fastprice.engines.bases import load_tokenizer
from fastprice.methods import lora_config
from fastprice.stock_reading import StockReader


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_distribution_against_generate(batch: int, model: Any, ratio: Any) -> None:
    """As it comes out of training: NF4 with adapters beside it, rows as they come, four tokens an answer."""
    from peft import get_peft_model

    tokenizer = load_tokenizer("nano")
    tuned = copy.deepcopy(model)
    tuned.set_attn_implementation("sdpa")
    sharpen(tuned)
    tuned = get_peft_model(tuned, lora_config(rank=16, alpha=32.0, dropout=0.0)).eval()
    seed_adapters(tuned)
    prompts = draw_prompts(tokenizer, max(8, batch), tuned.config.vocab_size)[: max(4, batch)]
    decoder = PriceDecoder.of(tuned, tokenizer)
    assert isinstance(decoder.reader, DenseReader)
    error, off = check_prediction(decoder, StockReader(tuned, decoder.trie), prompts[:4])
    assert error < 0.01
    assert off <= QUICK
    ratio(
        lambda: decoder.distributions(prompts, tolerance=QUICK, batch_size=batch),
        lambda: generate_prices(tuned, tokenizer, prompts, batch),
        at_least={1: 3.0, 8: 1.6, 64: 1.8}[batch],
    )
