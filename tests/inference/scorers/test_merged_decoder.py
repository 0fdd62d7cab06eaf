"""The lean forward pass equals transformers', and steps aside where it does not know better."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tests.inference.test_price_decoder import SIZES, make_opinionated, single_digits
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

import fastprice.inference.scorers.merged
import fastprice.inference.scorers.merged_decoder
from fastprice.benchmarking.random_models import model_config, random_nf4_model, seed_adapters
from fastprice.inference.price_decoder import PriceDecoder
from fastprice.inference.price_trie import PriceTrie
from fastprice.inference.scorers.merged import DenseReader
from fastprice.inference.scorers.merged_decoder import DenseDecoder, dense_bytes
from fastprice.inference.scorers.stock import StockReader
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
    decoder = DenseDecoder.of(model)
    assert decoder is not None
    difference = decoder._difference(model)
    assert difference < (1e-4 if dtype == torch.float32 else 0.1)
    model.model.layers[0].self_attn.v_proj.weight.data *= 1.5
    assert decoder._difference(model) > 10 * difference + 1e-3, "v is copied, and the check would see a mistake"


@torch.inference_mode()
def test_nf4_weights_and_adapters_are_merged() -> None:
    config = model_config("nano", 2)
    model = get_peft_model(
        random_nf4_model(config, "cpu", torch.float32), lora_config(rank=4, alpha=8.0, dropout=0.1)
    ).eval()
    plain = DenseDecoder.of(model)
    assert seed_adapters(model) == 2 * 2 * 7
    tuned = DenseDecoder.of(model)
    assert plain is not None
    assert tuned is not None
    assert tuned._difference(model) < 1e-4
    assert plain._difference(model) > 1e-2
    with model.disable_adapter():
        off = DenseDecoder.of(model)
        assert off is not None
        torch.testing.assert_close(off.layers[0].qkv.weight, plain.layers[0].qkv.weight)
    assert dense_bytes(model.get_base_model()) == 4 * sum(
        layer.qkv.weight.numel() + layer.out.weight.numel() + layer.gate_up.weight.numel() + layer.down.weight.numel()
        for layer in tuned.layers
    )


def test_it_steps_aside() -> None:
    torch.manual_seed(0)
    assert DenseDecoder.of(Gemma2ForCausalLM(Gemma2Config(vocab_size=16, head_dim=8, **SIZES))) is None
    model = random_model("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fastprice.inference.scorers.merged_decoder, "free_bytes", lambda device: 2 * dense_bytes(model) - 1
        )
        assert DenseDecoder.of(model) is None
    visited = model.model.layers[1].register_forward_pre_hook(lambda module, inputs: None)
    assert DenseDecoder.of(model) is None
    visited.remove()
    assert isinstance(PriceDecoder.of(model, single_digits(), max_price=9).reader, DenseReader)
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.warns(UserWarning, match=r"disagree by .* in their logits"):
        decoder = PriceDecoder.of(model, single_digits(), max_price=9)
    assert isinstance(decoder.reader, StockReader)


def test_a_variant_of_lora_is_left_to_peft() -> None:
    from peft import LoraConfig

    model = get_peft_model(random_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    assert DenseDecoder.of(model.eval()) is None


TOKENIZER = single_digits()
TRIE = PriceTrie.of(TOKENIZER, 999)
MODEL = make_opinionated(
    (torch.manual_seed(0), LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **SIZES)))[1], TOKENIZER
)


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, 4), min_size=1, max_size=9), min_size=1, max_size=9),
    nodes=st.lists(st.integers(10, 999), min_size=1, max_size=30),
    pass_tokens=st.integers(4, 60),
    wide=st.integers(1, 8),
    trunk=st.sampled_from([1, 16]),
)
def test_shared_beginnings_and_any_grouping_give_what_transformers_gives(
    prompts: list[list[int]], nodes: list[int], pass_tokens: int, wide: int, trunk: int
) -> None:
    """Prompts over two tokens: many begin alike, some are equal or begin another."""
    decoder = DenseDecoder(MODEL)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastprice.inference.scorers.merged, "_WIDE", wide)
        patch.setattr(fastprice.inference.scorers.merged, "_ROOM", 1)
        stock, dense = StockReader(MODEL, TRIE), DenseReader(decoder, TRIE)
        dense.pass_tokens, dense.trunk = pass_tokens, TRIE.within(trunk)
        stock.begin(prompts)
        dense.begin(prompts)
        for batch in dense.batches(prompts, 5):
            chosen = [prompts[index] for index in batch]
            theirs, ours = stock.read(chosen), dense.read(chosen)
            np.testing.assert_allclose(ours.scores, theirs.scores[:, : dense.trunk], atol=1e-4)
            # Twice: nodes asked in one call are ancestors, or asked again, in the next.
            for some in (nodes[::2], nodes):
                items = np.arange(len(some)) % len(batch)
                asked = np.unique(np.stack([items, some], axis=1), axis=0)
                np.testing.assert_allclose(ours.ask(*asked.T), theirs.ask(*asked.T), atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, 4), min_size=1, max_size=12), max_size=9),
    pass_tokens=st.integers(4, 60),
)
def test_last_states_equal_those_of_transformers(prompts: list[list[int]], pass_tokens: int) -> None:
    decoder = PriceDecoder(DenseReader(DenseDecoder(MODEL), TRIE), MODEL.config)
    decoder.reader.pass_tokens = pass_tokens
    told: list[int] = []
    states = decoder.last_states(prompts, batch_size=4, on_batch=told.append)
    assert told[-1:] == [len(prompts)][: len(prompts)]
    assert states.shape == (len(prompts), SIZES["hidden_size"])
    for prompt, state in zip(prompts, states, strict=True):
        theirs = MODEL.model(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(state, theirs.detach(), atol=1e-5, rtol=1e-4)


def test_without_a_dense_copy_there_are_no_last_states() -> None:
    assert PriceDecoder(StockReader(MODEL, TRIE), MODEL.config).last_states([[3]]) is None


def test_what_is_not_a_number_stays_in_its_batch() -> None:
    decoder = DenseDecoder(MODEL)
    reader = DenseReader(decoder, TRIE)
    with torch.inference_mode():
        reader.begin([[3, 4, 5]])
        good = reader.read([[3, 4, 5]]).scores
        embeddings = decoder.embeddings
        decoder.embeddings = embeddings * torch.nan
        assert np.isneginf(reader.read([[3, 4, 5, 3, 4, 5]]).scores).all()
        decoder.embeddings = embeddings
        np.testing.assert_allclose(reader.read([[3, 4, 5]]).scores, good, atol=1e-5)
        decoder.embeddings = embeddings * torch.nan
        assert reader.last_states([[3, 4, 5, 3]]).isnan().all()
        decoder.embeddings = embeddings
        np.testing.assert_allclose(reader.read([[3, 4, 5, 3]]).scores, reader.read([[3, 4, 5, 3]]).scores, atol=1e-5)
