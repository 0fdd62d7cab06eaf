"""Models of real classes, small enough to train in a test: NF4 bases, LoRA adapters whose B is not zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# The kernels are compared with stock bitsandbytes, which on a CPU with AVX-512 is wrong about weights whose rows are a
# multiple of 16 but not of the block of 64 (tests/cpu_kinds.py): 40, 20 and 56 are none.
VOCABULARY, WIDTH, HEAD_WIDTH, LAYERS = 97, 40, 10, 4
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 56,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_WIDTH,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "sdpa",
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "llama-bias": lambda: transformers.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=None),
    "gemma": lambda: transformers.GemmaConfig(**COMMON),
    "gemma2": lambda: transformers.Gemma2Config(
        **{**COMMON, "attn_implementation": "eager"}, final_logit_softcapping=5.0, query_pre_attn_scalar=HEAD_WIDTH
    ),
    "cohere": lambda: transformers.CohereConfig(
        **{k: v for k, v in COMMON.items() if k != "head_dim"}, logit_scale=0.25
    ),
    "granite": lambda: transformers.GraniteConfig(
        **{k: v for k, v in COMMON.items() if k != "head_dim"}, logits_scaling=3.0
    ),
}


def to_nf4(model: nn.Module, compute_dtype: torch.dtype = torch.float32) -> None:
    """Every linear layer of the decoder as bitsandbytes' NF4 with nested scales, as transformers loads it."""
    for module in list(model.get_decoder().modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                four = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None, compute_dtype, quant_type="nf4"
                )
                weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                four.weight = weight.to("cpu")
                if child.bias is not None:
                    four.bias = nn.Parameter(child.bias.data.clone(), requires_grad=False)
                four.support_avx512bf16_for_cpu = False
                setattr(module, name, four)


def make(
    kind: str = "llama", *, nf4: bool = True, seed: int = 0, dtype=torch.float32, compute=None, **lora
) -> peft.PeftModel:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.requires_grad_(False)
    if nf4:
        to_nf4(model, compute or dtype)
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        **lora,
    }
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():  # a fresh B is zero, which would hide every error in A
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted.train()


def batch(seed: int = 0, labeled: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) >= labeled, -100).masked_fill(mask == 0, -100)
    labels[:, 8] = ids[:, 8]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model: nn.Module, steps: int = 50) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of `steps` steps of AdamW, and the gradients of the last."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**batch(step % 3)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.grad for p in trainable]


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor] | None = None, **options) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**(inputs or batch()), **options).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor], band: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= band * max(b.abs().max().item(), 1e-2)


MODES = {"layers": {}, "head": {"loss_head": True}, "all": {"loss_head": True, "last_layer": True}}
