"""Runs Unsloth's own forwards on a CPU, under fastprice's steps, and prints what happened as one line of JSON.

A program of its own, since importing Unsloth patches what comes after. Real are Unsloth's causal model, decoder, layer
and attention (of each family), its dispatch of attention, its switches between training and inference, PEFT's layers.
Stand-ins, as theirs need a GPU: the functions for norms and rotary embedding, in plain PyTorch, and the cached tables
of the latter. Unsloth loads no model here, so its functions are attached as its `patch_peft_model` does.
"""

from __future__ import annotations

import json
import random
import sys
from types import MethodType
from typing import Any

from fastprice.models.unsloth_engine import PACKED_FUNCTIONS, REQUIRED, UnslothEngine, read_packs  # isort: skip
import inspect

import torch
import transformers
import unsloth
import unsloth.models.gemma as gemma
import unsloth.models.gemma2 as gemma2
import unsloth.models.llama as llama
import unsloth.models.mistral as mistral
import unsloth.models.qwen2 as qwen2
import unsloth.models.qwen3 as qwen3
from tests.kernels.adapted_models import COMMON, CONFIGS, LAYERS, VOCABULARY, make
from tests.memory.simulation.step import LiveBytes
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from unsloth.utils import attention_dispatch, packing

from fastprice.config import TrainConfig
from fastprice.errors import ConfigError
from fastprice.memory.activation_checkpointing import ActivationCheckpointing
from fastprice.models.base_models import load_tokenizer
from fastprice.models.parts import decoder_layers
from fastprice.models.peft_engine import PeftEngine
from fastprice.prompts.packing import PackCollator, StaticShape
from fastprice.prompts.template import TrainingRow
from fastprice.training.step_options import StepOptions
from fastprice.training.train import train
from fastprice_kernels import install, uninstall

CONFIGS["gemma"] = lambda: transformers.GemmaConfig(**COMMON, hidden_activation="gelu_pytorch_tanh")
CONFIGS["mistral-window"] = lambda: transformers.MistralConfig(**COMMON, sliding_window=4)
PATCHERS = {
    "llama": llama.FastLlamaModel,
    "qwen2": qwen2.FastQwen2Model,
    "qwen3": qwen3.FastQwen3Model,
    "mistral": mistral.FastMistralModel,
    "mistral-window": mistral.FastMistralModel,
    "gemma": gemma.FastGemmaModel,
}
LENGTHS = (7, 9, 5)
LEVELS = ["none", "selective", "full", "offload"]


def make_pack() -> dict[str, list[Any]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (sum(LENGTHS),), generator=generator).tolist()
    labels = [token if at % 3 else -100 for at, token in enumerate(ids)]
    return {"input_ids": ids, "labels": labels, "lengths": list(LENGTHS)}


PACK = make_pack()
ITEMS = torch.tensor(10.0)


def collated(static: bool = False) -> dict[str, Any]:
    shape = StaticShape.of([PACK, {**PACK, "lengths": [*LENGTHS, 6], "labels": PACK["labels"] + [-100] * 6}])
    return PackCollator(positions=True, static=shape if static else None)([PACK])


def gradients(model: Any, *batches: dict[str, Any]) -> list[torch.Tensor]:
    """The sum of the losses, and the gradients."""
    model.zero_grad()
    loss: Any = 0
    for batch in batches:
        loss = loss + model(**batch, use_cache=False, num_items_in_batch=ITEMS).loss
    loss.backward()
    return [loss.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)]


def far(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-2)) for a, b in zip(got, want, strict=True))


def separate_texts() -> list[dict[str, Any]]:
    ids, labels = torch.tensor([PACK["input_ids"]]), torch.tensor([PACK["labels"]])
    texts = zip(ids.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True)
    return [{"input_ids": text, "labels": label} for text, label in texts]


def stand_in_norm(
    layernorm: Any, X: Any, gemma: bool = False, save_output: bool = False, reuse_grad: bool = False
) -> Any:
    eps = layernorm.variance_epsilon if hasattr(layernorm, "variance_epsilon") else layernorm.eps
    weight = layernorm.weight + 1 if gemma else layernorm.weight
    return X * (X.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def stand_in_rope(Q: Any, K: Any, cos: Any, sin: Any, rope_embedding_indices: Any = None) -> Any:
    rows = rope_embedding_indices.reshape(-1).long()
    return apply_rotary_pos_emb(Q, K, cos[rows][None], sin[rows][None])


class Rotary(nn.Module):
    """Tables of the model's own rotary embedding, as Unsloth's gives them."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.tables = [table[0] for table in stock(torch.empty(1), torch.arange(64)[None])]

    def extend_rope_embedding(self, *_: Any, **__: Any) -> None: ...

    def get_cached(self, *_: Any) -> Any:
        return self.tables


def as_unsloth(model: Any, kind: str, rotary: Any, *, fused_mlp: bool = True) -> None:
    """What Unsloth's `from_pretrained` and `patch_peft_model` do to a model."""
    PATCHERS[kind].pre_patch()
    model.get_decoder().rotary_emb = Rotary(rotary)
    for layer in decoder_layers(model):
        attention = layer.self_attn
        attention.rotary_emb = model.get_decoder().rotary_emb
        if kind != "qwen2":  # its projections have a bias
            attention.apply_qkv = llama.apply_lora_qkv
        attention.apply_o = llama.apply_lora_o
        if fused_mlp:
            name = "apply_lora_mlp_geglu_approx" if kind == "gemma" else "apply_lora_mlp_swiglu"
            layer.mlp.forward = MethodType(getattr(llama, name), layer.mlp)
    for module in model.modules():
        module.max_seq_length = max(LENGTHS)
    model._unsloth_gradient_checkpointing = False


def saved_bytes(model: Any, batch: dict[str, Any]) -> int:
    """Bytes that a forward pass leaves alive for its backward pass."""
    with LiveBytes() as live:
        loss = model(**batch, use_cache=False, num_items_in_batch=ITEMS).loss
        found: int = live.bytes
    del loss
    return found


def examine(kind: str, model: Any, want: list[torch.Tensor]) -> dict[str, Any]:
    """Loss and gradients of the pack on Unsloth's code, for every level, against those of separate texts."""
    engine, batch = UnslothEngine(), collated()
    read_packs(model)
    engine.for_training(model)
    found: dict[str, Any] = {"skipped": {}, "apart": {}, "saved": {}}
    report = install(model, loss_head=True, last_layer=True)
    found["skipped"], found["replaced"] = report.skipped, sorted(set(report.replaced.values()))
    last, rows = decoder_layers(model)[-1].mlp, []
    hook = last.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    for level in [*LEVELS, "mlp", "mixed"]:
        levels = [level] * LAYERS if level != "mixed" else LEVELS
        with ActivationCheckpointing(model, levels):
            found["apart"][level] = far(gradients(model, batch), want)
            found["saved"][level] = saved_bytes(model, batch)
    hook.remove()
    found["rows"] = sorted(set(rows))
    found["labels"] = len(batch["label_positions"])
    found["apart"]["static"] = far(gradients(model, collated(static=True)), want)
    before = gradients(model, batch)[0]
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, : LENGTHS[0]] = 5
    labels = other["labels"].clone()
    labels[0, : LENGTHS[0]] = -100
    keep = batch["label_positions"] >= LENGTHS[0]
    masked = {"labels": labels, "label_positions": batch["label_positions"][keep]}
    first, second = (gradients(model, {**each, **masked})[0] for each in (batch, other))
    found["other text"] = bool(first == second), bool(before == first)
    uninstall(model)
    return found


def switches(model: Any) -> dict[str, Any]:
    """Which levels hold after what Unsloth's trainer and generation do."""
    engine = UnslothEngine()
    engine.for_training(model)
    layers = decoder_layers(model)

    def flags() -> list[bool]:
        return [layer.gradient_checkpointing for layer in layers]

    found: dict[str, Any] = {}
    with ActivationCheckpointing(model, ["full", "none", "full", "none"]):
        engine.for_training(model, use_gradient_checkpointing="unsloth")
        found["trainer"] = flags()
        engine.for_prediction(model)
        llama.FastLlamaModel.for_inference(model)  # as its generation does
        found["in prediction"] = flags()
        engine.for_prediction(model)
        engine.for_training(model)
        found["after evaluation"] = flags()
    found["after removal"] = flags()
    found["own"] = ["gradient_checkpointing" in layer.__dict__ for layer in layers]
    found["overlength"] = model.get_decoder()._unsloth_allow_packed_overlength
    return found


def restoration(model: Any) -> dict[str, Any]:
    """Whether `uninstall` gives back Unsloth's own step bit for bit (its fused MLP, which needs a GPU, aside)."""
    batch = {name: each for name, each in collated().items() if name != "label_positions"}
    read_packs(model)
    llama.FastLlamaModel.for_training(model, use_gradient_checkpointing=False)
    packing.mark_allow_overlength(model)
    dicts = [dict(module.__dict__) for module in model.modules()]

    def step() -> list[torch.Tensor]:
        # Unsloth's fused loss needs a GPU as well.
        hidden: Any = model.get_decoder()(**{name: each for name, each in batch.items() if name != "labels"})
        model.zero_grad()
        hidden.last_hidden_state.square().mean().backward()
        grads = [each.grad.clone() for each in model.parameters() if each.grad is not None]
        return [hidden.last_hidden_state.detach(), *grads]

    before = step()
    install(model, loss_head=True, last_layer=True)
    during = step()
    with ActivationCheckpointing(model, LEVELS):
        gradients(model, collated())
    uninstall(model)
    same = all(
        module.__dict__.keys() == was.keys() and all(module.__dict__[name] is each for name, each in was.items())
        for module, was in zip(model.modules(), dicts, strict=True)
    )
    bits = all(torch.equal(a, b) for a, b in zip(step(), before, strict=True))
    return {"attributes": same, "bits": bits, "apart": far(during, before)}


def training(engine: Any, model: Any, **options: Any) -> dict[str, Any]:
    """A few steps of `train`, with evaluations between them, which switch to prediction and back."""
    draw = random.Random(0)
    rows = []
    for _ in range(24):
        ids = [draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(4, 9))]
        rows.append(TrainingRow(ids, [-100] * (len(ids) - 2) + ids[-2:], cut=0, price=5.0))
    settings = TrainConfig(learning_rate=1e-2, pack_tokens=24, gradient_accumulation=2, epochs=2.0, evaluations=2)
    flags: list[list[bool]] = []
    lengths: list[int] = []

    def validate() -> float:
        lengths.append(len(flags))
        return 1.0

    def start(trainer: Any) -> None:
        decoder_layers(model)[0].mlp.register_forward_pre_hook(lambda module, _: record(module.training))

    def record(trains: bool) -> None:
        if trains:
            flags.append([layer.gradient_checkpointing for layer in decoder_layers(model)])

    result = train(
        engine, model, load_tokenizer("nano"), rows, validate, settings,
        options=StepOptions(kernels="on", **options), on_trainer=start,
    )  # fmt: skip
    return {
        "losses": [event.loss for event in result.events if event.loss is not None],
        "tokens": result.tokens,
        "evaluations": len(lengths),
        "levels": sorted({str(each) for each in flags}),
    }


def contract() -> dict[str, Any]:
    fast = unsloth.FastLanguageModel
    homes = {"get_packed_info_from_kwargs": packing, "run_attention": attention_dispatch}
    return {
        "signatures": {name: list(inspect.signature(getattr(fast, name)).parameters) for name in REQUIRED},
        "required": REQUIRED,
        "packed": {name: list(inspect.signature(getattr(homes[name], name)).parameters) for name in homes},
        "packed required": PACKED_FUNCTIONS,
        "context": list(inspect.signature(attention_dispatch.AttentionContext).parameters),
        "config": list(inspect.signature(attention_dispatch.AttentionConfig).parameters),
        "norm": list(inspect.signature(llama.fast_rms_layernorm).parameters),
        "transforms": llama.resolve_logit_transforms(transformers.Gemma2Config(final_logit_softcapping=30.0)),
        "checkpoint": torch.utils.checkpoint.checkpoint.__module__,
        "layer": issubclass(llama.LlamaDecoderLayer, transformers.modeling_layers.GradientCheckpointingLayer),
        "collator": PackCollator() == UnslothEngine().collator(),
        "overlength": "_unsloth_allow_packed_overlength" in inspect.getsource(llama.LlamaModel_fast_forward),
    }


def main() -> None:
    found: dict[str, Any] = {"contract": contract(), "families": {}}
    models = {kind: make(kind) for kind in PATCHERS}
    models["restored"] = make("llama", nf4=False)
    wanted, rotaries = {}, {}
    for name, model in models.items():  # before Unsloth changes the classes
        wanted[name] = gradients(model, *separate_texts())
        rotaries[name] = model.get_decoder().rotary_emb
    two, steps = make("gemma2"), make("llama", seed=4)
    rotary = steps.get_decoder().rotary_emb
    found["peft training"] = training(PeftEngine(), make("llama", seed=4))
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("unsloth.models"):
            for name, stand_in in (("fast_rms_layernorm", stand_in_norm), ("fast_rope_embedding", stand_in_rope)):
                if name in vars(module):
                    setattr(module, name, stand_in)
    qwen3._qk_norm_rope.QK_NORM_ROPE_ENABLED = False
    for kind in PATCHERS:
        as_unsloth(models[kind], kind, rotaries[kind])
        found["families"][kind] = examine(kind, models[kind], wanted[kind])
    found["switches"] = switches(models["llama"])
    as_unsloth(models["restored"], "llama", rotaries["restored"], fused_mlp=False)
    found["restored"] = restoration(models["restored"])
    as_unsloth(steps, "llama", rotary)
    read_packs(steps)
    found["training"] = training(UnslothEngine(), steps, recompute="1 full, 1 none, 2 full")
    gemma2.FastGemma2Model.pre_patch()
    try:
        read_packs(two)
    except ConfigError as error:
        found["gemma2"] = str(error)
    print("found:" + json.dumps(found))


if __name__ == "__main__":
    main()
