"""The copy in NF4: stock transformers and fastprice read from it what they would have computed from the base."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.offload.test_nf4_loading import same_models
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

from fastprice.errors import BaseModelError
from fastprice.models.base_models import resolve_base
from fastprice.models.peft_engine import PeftEngine
from fastprice.offload.device_transfers import SimulatedTransfers
from fastprice.offload.nf4_loading import load_nf4
from fastprice.offload.quantize import quantize


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    return quantize("nano", tmp_path_factory.mktemp("copies") / "nano", shard_bytes=400_000)


def test_it_is_sharded_and_configured(copy):
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    shards = sorted(copy.glob("*.safetensors"))
    assert len(shards) > 1
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    # Quantized weights are a quarter of their fp16 size plus statistics; the embedding stays in its dtype.
    assert (
        sum(shard.stat().st_size for shard in shards)
        < 0.6 * (Path(resolve_base("nano")) / "model.safetensors").stat().st_size
    )
    settings = json.loads((copy / "config.json").read_text())
    assert settings["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert settings["dtype"] == "float16"
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (copy, resolve_base("nano")))
    assert ours("Price is $12").input_ids == theirs("Price is $12").input_ids
    assert (copy / "generation_config.json").is_file()


def test_stock_transformers_reads_the_bits_it_would_have_computed(copy):
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    expected = AutoModelForCausalLM.from_pretrained(
        resolve_base("nano"), dtype=torch.float16, quantization_config=settings
    )
    found = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float16)
    same_models(found, expected)


def test_loading_from_the_copy_equals_loading_from_the_base(copy):
    expected = PeftEngine().load_base("nano", method="qlora", max_tokens=64).model
    through_mmap, hosts = load_nf4(str(copy), dtype=torch.float32, transfers=SimulatedTransfers(), offload=2)
    assert len(hosts) == 2
    stock = PeftEngine().load_base(str(copy), method="qlora", max_tokens=64).model
    ids = torch.arange(40, 60)[None]
    for found in (through_mmap, stock):
        for name, tensor in expected.state_dict().items():
            assert torch.equal(tensor, found.state_dict()[name]), name
        with torch.no_grad():
            assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_a_small_untied_model_is_one_file(tmp_path, fastprice):
    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(resolve_base("nano")).save_pretrained(base)
    status, output, _ = fastprice("quantize", base, "--out", tmp_path / "out")
    assert status == 0
    assert "GB" in output
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    expected = load_nf4(str(base), dtype=torch.float32, transfers=SimulatedTransfers())[0]
    same_models(load_nf4(str(tmp_path / "out"), dtype=torch.float32, transfers=SimulatedTransfers())[0], expected)


def test_a_damaged_copy_is_one_line(copy, tmp_path):
    damaged = Path(shutil.copytree(copy, tmp_path / "copy"))
    for shard in damaged.glob("*.safetensors"):
        tensors = load_file(shard)
        remaining = {
            name: tensor for name, tensor in tensors.items() if not name.endswith("up_proj.weight.nested_absmax")
        }
        save_file(remaining, shard)
    with pytest.raises(BaseModelError, match=r"statistics of model.layers.*damaged or incomplete"):
        load_nf4(str(damaged), dtype=torch.float32, transfers=SimulatedTransfers())


def test_an_existing_folder_is_not_overwritten(copy, fastprice):
    status, _, output = fastprice("quantize", "nano", "--out", copy)
    assert status == 2
    assert "give a new or empty folder" in output
    status, _, output = fastprice("quantize", copy, "--out", copy / "again")
    assert status == 2
    assert "quantized already" in output


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # a write beyond that fails, as on a full disk
    try:
        with pytest.raises(
            BaseModelError, match=r"cannot be written \(.*\); free space or give another folder"
        ) as caught:
            quantize("nano", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
