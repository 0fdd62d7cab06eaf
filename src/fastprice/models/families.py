"""Everything that differs between model families, in one table: supporting a family begins with a row of `FAMILIES`.

Each row says what the code elsewhere has to know before any weight is loaded: which linear layers carry adapters, how
many norms of which kind a layer has, which of them have biases, which RoPE variants the merged decoder computes, the
defaults that a `config.json` may leave out. tests/models/test_families.py builds a small model of every family with
transformers and holds each column against it.

What a module computes is never derived from a family: the kernels read the modules themselves (`fastprice_kernels.
patching`), and the merged decoder compares its logits with the model's before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["FAMILIES", "LLAMA_LINEARS", "Family", "family_of", "lora_targets"]

# The linear layers of a Llama layer, in the order in which they run. LoRA on all of them: attention alone is worse at
# equal size (Dettmers et al., "QLoRA", 2023, section 4).
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# RoPE variants in which a position's angle depends on the position alone, not on the length of the text.
_STATIC_ROPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Family:
    """One model family of transformers, by its `model_type`.

    model_type           as in `config.json`
    linears              names of a decoder layer's linear layers, which are the LoRA targets
    norm                 "rms": x / rms(x) * w; "rms_plus_one": x / rms(x) * (1 + w), which computes in fp32 throughout
    layer_norms          norms of a layer, on the hidden state; query_key_norms: also one of each head's queries, keys
    attention_bias       of q, k and v; "config": as `attention_bias` of the configuration says
    output_bias          of o_proj, likewise
    softcaps             whether attention scores and logits are soft-capped, unless the configuration says null
    head_dim             default where the configuration has none; None: hidden size / heads
    tied                 whether lm_head is the embedding where the configuration does not say
    merged_decoder       class that `inference.scorers.merged_decoder` computes; None: the stock forward pass serves
    merged_ropes         RoPE variants that it computes
    """

    model_type: str
    linears: tuple[str, ...] = LLAMA_LINEARS
    norm: Literal["rms", "rms_plus_one"] = "rms"
    layer_norms: int = 2
    query_key_norms: bool = False
    attention_bias: bool | Literal["config"] = "config"
    output_bias: bool | Literal["config"] = "config"
    softcaps: bool = False
    head_dim: int | None = None
    tied: bool = False
    merged_decoder: str | None = None
    merged_ropes: tuple[str, ...] = _STATIC_ROPES


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", merged_decoder="LlamaForCausalLM"),
        Family("mistral", attention_bias=False, output_bias=False, merged_decoder="MistralForCausalLM"),
        Family("qwen2", attention_bias=True, output_bias=False, merged_decoder="Qwen2ForCausalLM"),
        Family("qwen3", query_key_norms=True, head_dim=128, merged_decoder="Qwen3ForCausalLM"),
        Family("gemma", norm="rms_plus_one", head_dim=256, tied=True),
        Family(
            "gemma2",
            norm="rms_plus_one",
            layer_norms=4,
            softcaps=True,
            head_dim=256,
            tied=True,
        ),
    )
}


def family_of(model: Any) -> Family | None:
    """The family of a transformers model, with or without PEFT's wrapper, or of a configuration; None if unknown."""
    config = getattr(model, "config", model)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return FAMILIES.get(getattr(config, "model_type", None) or "")


def lora_targets(model: Any) -> list[str]:
    """Names of the linear layers of `model` that carry LoRA adapters; Llama's names for a family that is not listed."""
    family = family_of(model)
    return list(LLAMA_LINEARS if family is None else family.linears)
