"""Bases in 4 bits on both kinds of CPU: right weights, or one line that says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from fastprice.benchmarking.random_models import model_config, random_nf4_model
from fastprice.errors import ConfigError
from fastprice.inference.scorers.merged_decoder import MergedDecoder, _merged
from fastprice.models.base_models import resolve_base
from fastprice.models.peft_engine import PeftEngine
from fastprice.offload.device_transfers import SimulatedTransfers
from fastprice.offload.nf4_loading import load_nf4
from fastprice.offload.quantize import quantize
from fastprice_kernels import reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the engine would load onto the CUDA device")


@pytest.fixture(scope="module")
def four_bit_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano base in NF4, to be computed in fp16, as its configuration says."""
    return quantize("nano", tmp_path_factory.mktemp("bases") / "nano")


@pytest.fixture(scope="module")
def odd_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in 16 bits of width 288, as some of the smallest Llamas are: four blocks of 64 and a half."""
    folder = tmp_path_factory.mktemp("bases") / "odd"
    config = LlamaConfig(
        vocab_size=2048, hidden_size=288, intermediate_size=128, num_hidden_layers=1, num_attention_heads=6
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_base("nano")).save_pretrained(folder)
    return folder


def by_engine(base: str, method: Any) -> Any:
    return PeftEngine().load_base(base, method=method, max_tokens=64).model


def by_tensor(base: str, method: str) -> Any:
    return load_nf4(base, dtype=torch.float32, transfers=SimulatedTransfers())[0]


@pytest.mark.parametrize("load", [by_engine, by_tensor])
def test_widths_that_bitsandbytes_computes_wrongly_are_refused(
    cpu_kind: str, odd_base: Path, load: Callable[[str, str], Any]
) -> None:
    if cpu_kind == "avx2":
        assert load(str(odd_base), "qlora").is_loaded_in_4bit
        return
    with pytest.raises(ConfigError, match=r"block of 64: model.layers.0.self_attn.q_proj has rows of 288; use method"):
        load(str(odd_base), "qlora")
    by_engine(str(odd_base), "lora")


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_base_that_is_in_4_bits_trains_the_same_before_and_after_an_evaluation(
    cpu_kind: str, four_bit_base: Path, method: Any
) -> None:
    engine = PeftEngine()
    model = engine.attach(by_engine(str(four_bit_base), method), method=method, rank=2, alpha=4, dropout=0.0, seed=0)
    ids = torch.arange(40, 60)[None]

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients()
    assert len(before) == 2 * 7 * model.config.num_hidden_layers
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_weights_in_4_bits_cannot_train(four_bit_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"'full' trains all weights, those of .* are in 4 bits; use 'qlora'"):
        by_engine(str(four_bit_base), "full")


@pytest.mark.parametrize("columns", [64, 288])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_the_dense_copy_has_the_exact_weights(cpu_kind: str, columns: int, storage: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = Linear4bit(columns, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    linear.weight = Params4bit(torch.randn(96, columns), quant_type="nf4", quant_storage=storage, module=linear).to(
        "cpu"
    )
    state = linear.weight.quant_state
    exact = reference.dequantize_nf4(
        linear.weight.data.view(torch.uint8), state.code, state.absmax, state.state2.code, state.state2.absmax,
        state.offset, 64, 256, (96, columns), torch.float32,
    )  # fmt: skip
    assert torch.equal(_merged(linear).weight, exact)


@torch.inference_mode()
def test_no_dense_copy_is_made_of_repacked_weights(cpu_kind: str) -> None:
    model = random_nf4_model(model_config("nano", 1), "cpu", torch.float32).eval()
    assert MergedDecoder.of(model) is not None
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = cpu_kind == "avx512_bf16"
    model(input_ids=torch.arange(8)[None])
    assert (MergedDecoder.of(model) is None) == (cpu_kind == "avx512_bf16")
