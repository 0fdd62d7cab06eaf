"""What is measured: real model shapes, and rows of tokens as long as real price texts.

No model is downloaded: a shape is its published numbers, its weights are drawn (random_models.py). A row is a prompt of
random tokens and a price of one to three digits with an end token, which alone carry labels, as in training.

FLOP counts a multiplication and an addition as two.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

from fastprice.errors import ConfigError, nearest_name
from fastprice.models.shapes import ModelShape, read_shape, settings_of
from fastprice.prompts.template import IGNORE, TrainingRow

__all__ = [
    "GIB",
    "KERNEL_FAMILIES",
    "MODELS",
    "NF4_BYTES",
    "dequantize_shapes",
    "draw_rows",
    "folder_bytes",
    "linear_shapes",
    "linear_weights",
    "model_settings",
    "shape_of",
    "step_flops",
]

GIB = 2**30
# Bytes of one NF4 weight with double quantization: 4 bits, 8 bits a block of 64, 32 bits a block of 256 blocks.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

KERNEL_FAMILIES = ("dequantize", "lora_mlp", "lora_linear", "norm", "rotary", "loss_head", "small_matmul")

_LLAMA3 = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA32 = {**_LLAMA3, "rope_scaling": {**_LLAMA3_ROPE, "factor": 32.0}}
_LLAMA31 = {**_LLAMA3, "rope_scaling": {**_LLAMA3_ROPE, "factor": 8.0}}
_QWEN25 = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}

# What each model's published config.json says beside the sizes, which are in fastprice.models.shapes. "nano" is a small
# shape for CPUs, not that of the shipped model.
MODELS: dict[str, dict[str, Any]] = {
    "nano": {
        "model_type": "llama",
        "vocab_size": 2048,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "qwen2.5-0.5b": _QWEN25,
    "llama-3.2-1b": _LLAMA32,
    "llama-3.2-3b": _LLAMA32,
    "qwen2.5-7b": _QWEN25,
    "llama-3.1-8b": _LLAMA31,
    "qwen2.5-32b": _QWEN25,
    "llama-3.1-70b": _LLAMA31,
}

# Weights (N, K) and compute dtypes on which dequantization is compared: the three shapes of Unsloth's public kernel
# challenge (2025), then every linear layer of the models below.
_CHALLENGE = (((2048, 8192), "float16"), ((1024, 4096), "bfloat16"), ((4096, 14336), "bfloat16"))
_DEQUANTIZE_MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen2.5-7b", "llama-3.1-70b")


def model_settings(model: str) -> dict[str, Any]:
    """The keys of the `config.json` of a name of `MODELS`; ConfigError for any other name."""
    if model not in MODELS:
        raise ConfigError(f"model: {model!r} is not one of {', '.join(MODELS)}{nearest_name(model, MODELS)}")
    return dict(MODELS[model]) if model == "nano" else {**settings_of(model), **MODELS[model]}


def shape_of(model: Any) -> ModelShape:
    """The shape of a transformers configuration or of a name of `MODELS`; ConfigError for any other name."""
    return read_shape(model_settings(model) if isinstance(model, str) else model)


def linear_shapes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(N, K), outputs and inputs, of each linear layer of a decoder layer, by its name in transformers."""
    return {linear.name: (linear.outputs, linear.inputs) for linear in shape.linears}


def linear_weights(shape: ModelShape) -> int:
    """Weights of all linear layers of all decoder layers."""
    return shape.layers * shape.layer_linear_weights


def folder_bytes(model: str) -> float:
    """Bytes of a model's folder: NF4 layers, embedding and lm_head in 16 bits."""
    shape = shape_of(model)
    tables = 1 if shape.tied else 2
    return linear_weights(shape) * NF4_BYTES + 2.0 * tables * shape.lm_head_weights


@cache
def dequantize_shapes() -> tuple[tuple[tuple[int, int], str], ...]:
    """((N, K), dtype) of every dequantization that is compared, each once."""
    found = list(_CHALLENGE)
    for model in _DEQUANTIZE_MODELS:
        for shape in linear_shapes(shape_of(model)).values():
            if (shape, "bfloat16") not in found:
                found.append((shape, "bfloat16"))
    return tuple(found)


def draw_rows(count: int, vocabulary: int, end_token: int, seed: int = 0) -> list[TrainingRow]:
    """`count` training rows of random tokens: 60 to 256 tokens, most of them 100 to 180, labels on 2 to 4 of them.

    The first 16 ids, where tokenizers keep their special tokens, are not drawn; every answer ends in `end_token`.
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        length = min(256, max(60, round(draw.gauss(140, 25))))
        answer = [draw.randrange(16, vocabulary) for _ in range(draw.choice((1, 2, 2, 3, 3, 3)))] + [end_token]
        prompt = [draw.randrange(16, vocabulary) for _ in range(length - len(answer))]
        rows.append(TrainingRow([*prompt, *answer], [IGNORE] * len(prompt) + answer, cut=0))
    return rows


def step_flops(shape: ModelShape, lengths: Sequence[int], labeled: int, rank: int) -> float:
    """The fewest FLOP that a LoRA step over texts of these lengths (tokens) needs, with `labeled` labels among them.

    Frozen weights: one product forward, one backward for the input's gradient, none recomputed. Adapters: forward and
    twice that backward. Attention: causal within each text, backward 2.5 times the forward's work (Dao et al.,
    "FlashAttention", 2022). lm_head: at labeled positions alone. This is the numerator of the model FLOP utilization
    (Chowdhery et al., "PaLM", 2022), so recomputation, padding and unlabeled logits do not raise it.
    """
    tokens = sum(lengths)
    frozen = 4.0 * tokens * linear_weights(shape)
    adapters = 6.0 * tokens * shape.layers * shape.adapter_weights(rank)
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    attention = 3.5 * 4.0 * pairs * shape.query_width * shape.layers
    lm_head = 4.0 * labeled * shape.lm_head_weights
    return frozen + adapters + attention + lm_head
