"""What is measured: real model shapes with random weights, and rows of tokens as long as real price texts.

No model is downloaded: a configuration is its published numbers, its weights are drawn (models.py). A row is a prompt
of random tokens and a price of one to three digits with an end token, which alone carry labels, as in training.

Legend: T tokens, L linear layers' weights, V x D head weights. FLOP counts a multiplication and an addition as two.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastprice.errors import ConfigError, nearest_name
from fastprice.prompts.template import IGNORE, TrainingRow

__all__ = ["DEQUANTIZE_SHAPES", "MODELS", "NF4_BYTES", "Shape", "draw_rows", "shape_of", "step_flops"]

# Bytes of one NF4 weight with double quantization: 4 bits, 8 bits a block of 64, 32 bits a block of 256 blocks.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_QWEN25 = {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
    }


# The numbers of each model's config.json, as published with its weights.
MODELS: dict[str, dict[str, Any]] = {
    "nano": {
        "model_type": "llama",
        "vocab_size": 2048,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        **_sizes(128, 384, 6, 4, 2),
    },
    "qwen2.5-0.5b": {**_QWEN25, "vocab_size": 151936, "tie_word_embeddings": True, **_sizes(896, 4864, 24, 14, 2)},
    "llama-3.2-1b": {
        **_LLAMA3,
        "tie_word_embeddings": True,
        "head_dim": 64,
        "rope_scaling": {**_LLAMA3_ROPE, "factor": 32.0},
        **_sizes(2048, 8192, 16, 32, 8),
    },
    "llama-3.2-3b": {
        **_LLAMA3,
        "tie_word_embeddings": True,
        "head_dim": 128,
        "rope_scaling": {**_LLAMA3_ROPE, "factor": 32.0},
        **_sizes(3072, 8192, 28, 24, 8),
    },
    "qwen2.5-7b": {**_QWEN25, "vocab_size": 152064, "tie_word_embeddings": False, **_sizes(3584, 18944, 28, 28, 4)},
    "llama-3.1-8b": {
        **_LLAMA3,
        "tie_word_embeddings": False,
        "rope_scaling": {**_LLAMA3_ROPE, "factor": 8.0},
        **_sizes(4096, 14336, 32, 32, 8),
    },
    "qwen2.5-32b": {**_QWEN25, "vocab_size": 152064, "tie_word_embeddings": False, **_sizes(5120, 27648, 64, 40, 8)},
    "llama-3.1-70b": {
        **_LLAMA3,
        "tie_word_embeddings": False,
        "rope_scaling": {**_LLAMA3_ROPE, "factor": 8.0},
        **_sizes(8192, 28672, 80, 64, 8),
    },
}

# Weights (N, K) and compute dtypes on which dequantization is compared: the three shapes of Unsloth's public kernel
# challenge (2025), then every linear layer of the models below.
_CHALLENGE = (((2048, 8192), "float16"), ((1024, 4096), "bfloat16"), ((4096, 14336), "bfloat16"))
_DEQUANTIZE_MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen2.5-7b", "llama-3.1-70b")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that arithmetic needs."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each linear layer of a block, by its name in transformers."""
        d, kv, q = self.hidden, self.key_heads * self.head_dim, self.heads * self.head_dim
        return {
            "q_proj": (q, d),
            "k_proj": (kv, d),
            "v_proj": (kv, d),
            "o_proj": (d, q),
            "gate_proj": (self.intermediate, d),
            "up_proj": (self.intermediate, d),
            "down_proj": (d, self.intermediate),
        }

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers of all blocks."""
        return self.layers * sum(n * k for n, k in self.linear_layers().values())


def shape_of(model: Any) -> Shape:
    """The sizes of a transformers configuration or of a name of `MODELS`; ConfigError for any other name."""
    if not isinstance(model, str):
        numbers = model.to_dict()
    elif model in MODELS:
        numbers = MODELS[model]
    else:
        raise ConfigError(f"model: {model!r} is not one of {', '.join(MODELS)}{nearest_name(model, MODELS)}")
    return Shape(
        hidden=numbers["hidden_size"],
        intermediate=numbers["intermediate_size"],
        layers=numbers["num_hidden_layers"],
        heads=numbers["num_attention_heads"],
        key_heads=numbers["num_key_value_heads"],
        head_dim=numbers.get("head_dim") or numbers["hidden_size"] // numbers["num_attention_heads"],
        vocabulary=numbers["vocab_size"],
    )


def _dequantize_shapes() -> list[tuple[tuple[int, int], str]]:
    found = list(_CHALLENGE)
    for model in _DEQUANTIZE_MODELS:
        for shape in shape_of(model).linear_layers().values():
            if (shape, "bfloat16") not in found:
                found.append((shape, "bfloat16"))
    return found


DEQUANTIZE_SHAPES: list[tuple[tuple[int, int], str]] = _dequantize_shapes()


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


def step_flops(shape: Shape, lengths: Sequence[int], labeled: int, rank: int) -> float:
    """The fewest FLOP a LoRA step over texts of these lengths (tokens) needs, `labeled` of the tokens with a label.

    Frozen weights: one product forward, one backward for the input's gradient, none recomputed. Adapters: forward and
    twice that backward. Attention: causal within each text, backward 2.5 times the forward's work (Dao et al.,
    "FlashAttention", 2022). Head: at labeled positions alone. This is the numerator of the model FLOP utilization
    (Chowdhery et al., "PaLM", 2022), so recomputing, padding and unlabeled logits do not raise it.
    """
    tokens = sum(lengths)
    frozen = 4.0 * tokens * shape.linear_weights
    adapters = 6.0 * tokens * rank * shape.layers * sum(n + k for n, k in shape.linear_layers().values())
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    attention = 3.5 * 4.0 * pairs * shape.heads * shape.head_dim * shape.layers
    head = 4.0 * labeled * shape.vocabulary * shape.hidden
    return frozen + adapters + attention + head
