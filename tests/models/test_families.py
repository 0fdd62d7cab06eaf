"""Each column of the table of model families against transformers' own code for that family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, OPTConfig

from fastprice.inference.scorers.merged_decoder import MergedDecoder
from fastprice.models.families import FAMILIES, LLAMA_LINEARS, Family, family_of, lora_targets
from fastprice.models.shapes import read_shape

SIZES = {
    "vocab_size": 61, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def small_model(family: Family, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.model_type, **SIZES | {"head_dim": 10} | settings)
    return AutoModelForCausalLM.from_config(config)


def biased(model: Any) -> dict[str, bool]:
    attention = model.model.layers[0].self_attn
    return {name: getattr(attention, name).bias is not None for name in ("q_proj", "k_proj", "v_proj", "o_proj")}


@families
def test_linear_layers_are_those_of_a_decoder_layer_in_order(family: Family) -> None:
    layer = small_model(family).model.layers[0]
    names = [name.rpartition(".")[2] for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(names) == sorted(family.linears)
    shapes = {name.rpartition(".")[2]: tuple(module.weight.shape) for name, module in layer.named_modules()
              if isinstance(module, nn.Linear)}  # fmt: skip
    described = read_shape(small_model(family).config).linears
    assert {linear.name: (linear.outputs, linear.inputs) for linear in described} == shapes


@families
def test_norms(family: Family) -> None:
    layer = small_model(family).model.layers[0]
    norms = [name for name, module in layer.named_modules() if type(module).__name__.endswith("RMSNorm")]
    assert len([name for name in norms if not name.startswith("self_attn")]) == family.layer_norms
    assert (len([name for name in norms if name.startswith("self_attn")]) == 2) is family.query_key_norms
    norm = layer.input_layernorm
    with torch.no_grad():
        norm.weight.fill_(0.5)
        x = torch.randn(3, 40)
        factor = float((norm(x) / (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))).mean())
    assert factor == pytest.approx({"rms": 0.5, "rms_plus_one": 1.5}[family.norm], rel=1e-3)


@families
@pytest.mark.parametrize("configured", [False, True])
def test_biases(family: Family, configured: bool) -> None:
    found = biased(small_model(family, attention_bias=configured))
    attention = configured if family.attention_bias == "config" else family.attention_bias
    output = configured if family.output_bias == "config" else family.output_bias
    assert found == {"q_proj": attention, "k_proj": attention, "v_proj": attention, "o_proj": output}


@families
def test_defaults_of_the_configuration(family: Family) -> None:
    config = AutoConfig.for_model(family.model_type, **SIZES)
    assert (getattr(config, "head_dim", None) or 10) == (family.head_dim or 10)
    assert config.tie_word_embeddings is family.tied
    assert (getattr(config, "attn_logit_softcapping", None) is not None) is family.softcaps
    assert (getattr(config, "final_logit_softcapping", None) is not None) is family.softcaps


@families
def test_parameters_by_the_shape_are_those_of_the_model(family: Family) -> None:
    for tied in (False, True):
        model = small_model(family, tie_word_embeddings=tied)
        assert read_shape(model.config).parameters == sum(each.numel() for each in model.parameters())


@families
@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn", "dynamic"])
def test_merged_decoder_computes_the_families_and_ropes_of_the_table(family: Family, rope: str) -> None:
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0}
    if rope != "default":
        parameters["factor"] = 2.0
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = small_model(family, rope_parameters=parameters, max_position_embeddings=64).eval()
    computed = MergedDecoder.of(model) is not None  # compares its logits with the model's; warnings are errors here
    assert computed is (family.merged_decoder is not None and rope in family.merged_ropes)


def test_family_is_found_by_model_or_configuration_and_none_for_an_unknown_one() -> None:
    assert family_of(LlamaConfig()) is FAMILIES["llama"]
    assert family_of(small_model(FAMILIES["qwen3"])) is FAMILIES["qwen3"]
    assert family_of(OPTConfig()) is None
    assert lora_targets(OPTConfig()) == list(LLAMA_LINEARS)
