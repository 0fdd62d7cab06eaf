"""The merged decoder and scorer equal transformers' forward pass, and serve no model that they do not know."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tests.inference.test_price_decoder import SIZES, single_digits, with_uneven_logits
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastprice.benchmarking.random_models import model_config, random_nf4_model, seed_adapters
from fastprice.inference.price_decoder import PriceDecoder
from fastprice.inference.price_trie import PriceTrie
from fastprice.inference.scorers import merged, merged_decoder
from fastprice.inference.scorers.merged import MergedScorer
from fastprice.inference.scorers.merged_decoder import MergedDecoder, merged_bytes
from fastprice.inference.scorers.stock import StockScorer
from fastprice.models.adapters import lora_config

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KNOWN: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=16, rope_parameters=ROPE, attention_bias=True, **SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(vocab_size=16, head_dim=8, **SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(vocab_size=16, **SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(vocab_size=16, head_dim=16, **SIZES)),
}


def random_model(kind: str) -> Any:
    torch.manual_seed(0)
    model = KNOWN[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms of one and biases of zero would hide a mistake
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_logits_equal_those_of_transformers(kind: str, dtype: torch.dtype) -> None:
    model = random_model(kind).to(dtype)
    decoder = MergedDecoder.of(model)
    assert decoder is not None
    difference = decoder.logit_difference(model)
    assert difference < (1e-4 if dtype == torch.float32 else 0.1)
    model.model.layers[0].self_attn.v_proj.weight.data *= 1.5
    assert decoder.logit_difference(model) > 10 * difference + 1e-3, "v is copied, and the check would see a mistake"


@torch.inference_mode()
def test_nf4_weights_and_adapters_are_merged() -> None:
    config = model_config("nano", 2)
    model = get_peft_model(
        random_nf4_model(config, "cpu", torch.float32), lora_config(rank=4, alpha=8.0, dropout=0.1)
    ).eval()
    plain = MergedDecoder.of(model)
    assert seed_adapters(model) == 2 * 2 * 7
    tuned = MergedDecoder.of(model)
    assert plain is not None
    assert tuned is not None
    assert tuned.logit_difference(model) < 1e-4
    assert plain.logit_difference(model) > 1e-2
    with model.disable_adapter():
        off = MergedDecoder.of(model)
        assert off is not None
        torch.testing.assert_close(off.layers[0].qkv.weight, plain.layers[0].qkv.weight)
    assert merged_bytes(model.get_base_model()) == 4 * sum(
        layer.qkv.weight.numel() + layer.out.weight.numel() + layer.gate_up.weight.numel() + layer.down.weight.numel()
        for layer in tuned.layers
    )


def test_models_that_it_does_not_serve_get_the_stock_scorer() -> None:
    torch.manual_seed(0)
    assert MergedDecoder.of(Gemma2ForCausalLM(Gemma2Config(vocab_size=16, head_dim=8, **SIZES))) is None
    model = random_model("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merged_decoder, "free_bytes", lambda device: 2 * merged_bytes(model) - 1)
        assert MergedDecoder.of(model) is None
    hook = model.model.layers[1].register_forward_pre_hook(lambda module, inputs: None)
    assert MergedDecoder.of(model) is None
    hook.remove()
    assert isinstance(PriceDecoder.of(model, single_digits(), max_price=9).scorer, MergedScorer)
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.warns(UserWarning, match=r"disagrees with it by .* in its logits"):
        decoder = PriceDecoder.of(model, single_digits(), max_price=9)
    assert isinstance(decoder.scorer, StockScorer)


def test_variants_of_lora_are_not_merged() -> None:
    from peft import LoraConfig

    model = get_peft_model(random_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    assert MergedDecoder.of(model.eval()) is None


TOKENIZER = single_digits()
TRIE = PriceTrie.of(TOKENIZER, 999)
MODEL = with_uneven_logits(
    (torch.manual_seed(0), LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **SIZES)))[1], TOKENIZER
)


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, 4), min_size=1, max_size=9), min_size=1, max_size=9),
    nodes=st.lists(st.integers(10, 999), min_size=1, max_size=30),
    pass_tokens=st.integers(4, 60),
    pass_nodes=st.integers(1, 8),
    trunk=st.sampled_from([1, 16]),
)
def test_shared_prefixes_and_any_grouping_give_the_scores_of_transformers(
    prompts: list[list[int]], nodes: list[int], pass_tokens: int, pass_nodes: int, trunk: int
) -> None:
    """Prompts over two tokens: many share a prefix, some are equal or a prefix of another."""
    decoder = MergedDecoder(MODEL)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(merged, "_NODES", pass_nodes)
        patch.setattr(merged, "_SPARE_COLUMNS", 1)
        stock, ours = StockScorer(MODEL, TRIE), MergedScorer(decoder, TRIE)
        ours.pass_tokens, ours.trunk = pass_tokens, TRIE.nodes_within(trunk)
        stock.prepare(prompts)
        ours.prepare(prompts)
        for batch in ours.batches(prompts, 5):
            chosen = [prompts[index] for index in batch]
            expected, session = stock.start_session(chosen), ours.start_session(chosen)
            np.testing.assert_allclose(session.trunk_scores, expected.trunk_scores[:, : ours.trunk], atol=1e-4)
            # Twice: nodes that were scored in one call are ancestors, or scored again, in the next.
            for some in (nodes[::2], nodes):
                items = np.arange(len(some)) % len(batch)
                pairs = np.unique(np.stack([items, some], axis=1), axis=0)
                np.testing.assert_allclose(session.score(*pairs.T), expected.score(*pairs.T), atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, 4), min_size=1, max_size=12), max_size=9),
    pass_tokens=st.integers(4, 60),
)
def test_last_hidden_states_equal_those_of_transformers(prompts: list[list[int]], pass_tokens: int) -> None:
    decoder = PriceDecoder(MergedScorer(MergedDecoder(MODEL), TRIE), MODEL.config)
    decoder.scorer.pass_tokens = pass_tokens
    counts: list[int] = []
    states = decoder.last_hidden_states(prompts, batch_size=4, on_batch=counts.append)
    assert counts[-1:] == [len(prompts)][: len(prompts)]
    assert states.shape == (len(prompts), SIZES["hidden_size"])
    for prompt, state in zip(prompts, states, strict=True):
        theirs = MODEL.model(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(state, theirs.detach(), atol=1e-5, rtol=1e-4)


def test_without_a_merged_copy_there_are_no_last_hidden_states() -> None:
    assert PriceDecoder(StockScorer(MODEL, TRIE), MODEL.config).last_hidden_states([[3]]) is None


def test_nan_does_not_reach_the_next_batch() -> None:
    decoder = MergedDecoder(MODEL)
    scorer = MergedScorer(decoder, TRIE)
    with torch.inference_mode():
        scorer.prepare([[3, 4, 5]])
        good = scorer.start_session([[3, 4, 5]]).trunk_scores
        embeddings = decoder.embeddings
        decoder.embeddings = embeddings * torch.nan
        assert np.isneginf(scorer.start_session([[3, 4, 5, 3, 4, 5]]).trunk_scores).all()
        decoder.embeddings = embeddings
        np.testing.assert_allclose(scorer.start_session([[3, 4, 5]]).trunk_scores, good, atol=1e-5)
        decoder.embeddings = embeddings * torch.nan
        assert scorer.last_hidden_states([[3, 4, 5, 3]]).isnan().all()
        decoder.embeddings = embeddings
        np.testing.assert_allclose(
            scorer.start_session([[3, 4, 5, 3]]).trunk_scores,
            scorer.start_session([[3, 4, 5, 3]]).trunk_scores,
            atol=1e-5,
        )
