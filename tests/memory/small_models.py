"""Small transformers models with LoRA adapters, and a packed batch for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastprice.models.adapters import lora_config
from fastprice.models.packed_attention import PACKED_ATTENTION, register_packed_attention

LAYERS = 4
COMMON = {
    "vocab_size": 97, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 10, "attn_logit_softcapping": 50.0},
}


def make_model(
    family: str = "llama", *, nf4: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> Any:
    """A PEFT model of the family in training mode, equal at every call; `nf4`: with a 4-bit base."""
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]}))
    model = model.to(dtype).requires_grad_(False)
    if nf4:
        _quantize(model)
    model = get_peft_model(model, lora_config(rank=4, alpha=6, dropout=dropout))
    with torch.no_grad():  # a new B is zero, and would hide errors in A
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    register_packed_attention()
    model.get_base_model().set_attn_implementation(PACKED_ATTENTION)
    return model.train()


def _quantize(model: Any) -> None:
    import bitsandbytes as bnb

    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                quantized = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None, torch.float32, quant_type="nf4"
                )
                quantized.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
                quantized.bias = child.bias
                quantized.support_avx512bf16_for_cpu = False
                setattr(parent, name, quantized)


def make_batch(seed: int = 0) -> dict[str, Any]:
    """Two texts in a pack, of 9 and 15 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (1, 24), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) > 0.4, -100)
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "pack_lengths": (9, 15), "use_cache": False}
