"""Small decoders with NF4 weights and adapters, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from fastprice.benchmarking.random_models import random_nf4_model, seed_adapters
from fastprice.models.peft_engine import PeftEngine

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "use_cache": False,
}
CONFIGS = {
    "llama": lambda layers: LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=False, **SIZES),
    "qwen2": lambda layers: Qwen2Config(num_hidden_layers=layers, tie_word_embeddings=True, **SIZES),
}


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """(family, layers) -> a PEFT model on an NF4 base, equal at every call, with adapters that are not zero."""

    def make(family: str = "llama", layers: int = 5, *, adapters: bool = True) -> Any:
        torch.manual_seed(0)
        model = random_nf4_model(CONFIGS[family](layers), "cpu", torch.float32)
        if adapters:
            model = PeftEngine().attach(model, method="qlora", rank=4, alpha=8, dropout=0.0, seed=0)
            seed_adapters(model)
        return model

    return make


@pytest.fixture
def step() -> Callable[..., tuple[list[float], dict[str, torch.Tensor]]]:
    """Runs micro-batches without an optimizer step: their losses, and every gradient by name."""

    def run(model: Any, micro_batches: int = 1, seed: int = 0) -> tuple[list[float], dict[str, torch.Tensor]]:
        draw = torch.Generator().manual_seed(seed)
        losses = []
        model.zero_grad()
        for _ in range(micro_batches):
            ids = torch.randint(0, SIZES["vocab_size"], (2, 24), generator=draw)
            labels = ids.clone()
            labels[:, :16] = -100
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
        return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    return run
