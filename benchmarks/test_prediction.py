"""Point estimates from the distribution against `generate` and a regular expression, batch for batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fastprice.benchmarking.prediction import check_prediction, draw_prompts, generate_prices, sharpen_logits
from fastprice.benchmarking.random_models import seed_adapters
from fastprice.inference.price_decoder import SAMPLING_TOLERANCE, PriceDecoder
from fastprice.inference.price_heads import make_head, prompt_hidden_states
from fastprice.inference.scorers.merged import MergedScorer
from fastprice.inference.scorers.stock import StockScorer
from fastprice.models.adapters import lora_config
from fastprice.models.base_models import load_tokenizer

BATCHES = pytest.mark.parametrize("batch", [1, 8, 64])


@pytest.fixture(scope="module")
def tuned(model: Any) -> Any:
    """As it comes out of training: NF4 with adapters beside it."""
    from peft import get_peft_model

    copied = copy.deepcopy(model)
    copied.set_attn_implementation("sdpa")
    sharpen_logits(copied)
    tuned = get_peft_model(copied, lora_config(rank=16, alpha=32.0, dropout=0.0)).eval()
    seed_adapters(tuned)
    return tuned


@BATCHES
def test_distribution_against_generate(batch: int, tuned: Any, ratio: Any) -> None:
    """Rows as they come, four tokens an answer."""
    tokenizer = load_tokenizer("nano")
    prompts = draw_prompts(tokenizer, max(8, batch), tuned.config.vocab_size)[: max(4, batch)]
    decoder = PriceDecoder.of(tuned, tokenizer)
    assert isinstance(decoder.scorer, MergedScorer)
    error, off = check_prediction(decoder, StockScorer(tuned, decoder.trie), prompts[:4])
    assert error < 0.01
    assert off <= SAMPLING_TOLERANCE
    ratio(
        lambda: decoder.distributions(prompts, tolerance=SAMPLING_TOLERANCE, batch_size=batch),
        lambda: generate_prices(tuned, tokenizer, prompts, batch),
        at_least={1: 3.0, 8: 1.6, 64: 1.8}[batch],
    )


@BATCHES
def test_head_against_generate(batch: int, tuned: Any, ratio: Any) -> None:
    """The same, read off a head: one pass over the prompts and nothing after them."""
    tokenizer = load_tokenizer("nano")
    prompts = draw_prompts(tokenizer, max(8, batch), tuned.config.vocab_size)[: max(4, batch)]
    decoder = PriceDecoder.of(tuned, tokenizer)
    head = make_head("histogram", tuned.config.hidden_size, 1.0, 1000.0)

    def read() -> Any:
        states = decoder.last_hidden_states(prompts, batch_size=batch)
        assert states is not None
        return head.distributions(head(states))

    ((order, states),) = prompt_hidden_states(tuned, prompts)
    found = decoder.last_hidden_states(prompts)
    assert found is not None
    torch.testing.assert_close(found[order], states, rtol=1e-3, atol=1e-3)
    ratio(
        read,
        lambda: generate_prices(tuned, tokenizer, prompts, batch),
        at_least={1: 5.0, 8: 2.0, 64: 2.0}[batch],
    )
