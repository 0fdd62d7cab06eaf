"""A base model small enough to train in a second on one CPU thread: random weights in fp32, the nano tokenizer.

Its untrained loss is large and its gradients exceed the clipping norm, which the tests of single optimizer steps need.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastprice.models.base_models import load_tokenizer


def save_tiny_base(folder: Path) -> str:
    """Writes the model and its tokenizer to `folder`, and returns its name for `PriceEstimator(base=...)`."""
    tokenizer = load_tokenizer("nano")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=40, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
