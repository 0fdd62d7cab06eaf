"""Loading in NF4 tensor by tensor: the bits of transformers' own loading, and one line for every error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen2Config

from fastprice.errors import BaseModelError, ConfigError
from fastprice.models.base_models import resolve_base
from fastprice.models.peft_engine import PeftEngine, settle_four_bit
from fastprice.offload.device_transfers import SimulatedTransfers
from fastprice.offload.nf4_loading import load_nf4, load_with_offload

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 200,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def write_model(folder: Path, *, tied: bool, dtype=torch.bfloat16, shard="60KB") -> Path:
    torch.manual_seed(1)
    config = (Qwen2Config if tied else LlamaConfig)(num_hidden_layers=3, tie_word_embeddings=tied, **SIZES)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tied=False)


@pytest.fixture
def copied(base, tmp_path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def same_models(one, other):
    tensors, others = one.state_dict(), other.state_dict()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name
    buffers = dict(one.named_buffers())
    assert buffers.keys() == dict(other.named_buffers()).keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in other.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_the_bits_are_those_of_transformers(tmp_path, tied, dtype):
    folder = write_model(tmp_path / "base", tied=tied)
    assert len(list(folder.glob("*.safetensors"))) > 2
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    expected = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=settings, attn_implementation="sdpa"
    )
    settle_four_bit(expected, dtype)  # else its first forward below repacks it, on some CPUs
    found, hosts = load_nf4(str(folder), dtype=dtype, transfers=SimulatedTransfers(), offload=[0, 2])
    same_models(found, expected)
    assert sorted(hosts) == [0, 2]
    assert (found.lm_head.weight is found.get_input_embeddings().weight) == tied
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "name_or_path", "training"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    layer = found.model.layers[1].self_attn.q_proj
    assert layer.compute_dtype == dtype
    assert not layer.support_avx512bf16_for_cpu
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_the_nano_base_with_offload_equals_the_engines():
    expected = PeftEngine().load_base("nano", method="qlora", max_tokens=64)
    found, offload = load_with_offload("nano", 4)
    with offload:
        ids = torch.arange(40, 60)[None]
        with torch.no_grad():
            assert torch.equal(found.model(input_ids=ids).logits, expected.model(input_ids=ids).logits)
        assert found.base == expected.base
        assert found.model.config.pad_token_id == expected.model.config.pad_token_id
    same_models(found.model, expected.model)


def test_the_size_of_chunks_changes_nothing(base, monkeypatch):
    expected, _ = load_nf4(str(base), dtype=torch.float32, transfers=SimulatedTransfers())
    monkeypatch.setattr("fastprice.offload.nf4_loading._CHUNK_WEIGHTS", {"cpu": 192})
    found, _ = load_nf4(str(base), dtype=torch.float32, transfers=SimulatedTransfers())
    same_models(found, expected)


def change(folder: Path, name: str, make) -> Path:
    """Rewrites the shard that holds `name` after `make` changed its tensors."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    make(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def load(folder: Path):
    return load_nf4(str(folder), dtype=torch.float32, transfers=SimulatedTransfers())


NAME = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_tensor_is_named(copied):
    change(copied, NAME, lambda tensors: tensors.pop(NAME))
    with pytest.raises(BaseModelError, match=f"lacks {NAME}; give a complete LlamaForCausalLM"):
        load(copied)


def test_a_tensor_of_another_shape_is_named(copied):
    change(copied, NAME, lambda tensors: tensors.update({NAME: tensors[NAME][:4].clone()}))
    with pytest.raises(BaseModelError, match=rf"{NAME} is \(4, 64\) in the file, the configuration says \(200, 64\)"):
        load(copied)


def test_unused_tensors_warn_and_old_rotary_frequencies_do_not(copied, recwarn):
    change(
        copied, NAME, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    load(copied)
    assert not recwarn.list
    change(copied, NAME, lambda tensors: tensors.update({"visual.weight": torch.ones(8)}))
    with pytest.warns(UserWarning, match="holds visual.weight, which a LlamaForCausalLM does not use"):
        load(copied)


@pytest.mark.parametrize("length", [0, 5, 300, -100])
def test_a_damaged_shard_is_one_line(copied, length):
    path = sorted(copied.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BaseModelError, match=r"model-00002.*is damaged or unreadable \(.*download it again$") as caught:
        load(copied)
    assert "\n" not in str(caught.value)


def test_missing_files(copied, tmp_path):
    sorted(copied.glob("*.safetensors"))[1].unlink()
    with pytest.raises(BaseModelError, match=r"its shard model-00002.* is missing"):
        load(copied)
    (copied / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BaseModelError, match=r"index\.json is damaged"):
        load(copied)
    (copied / "model.safetensors.index.json").unlink()
    with pytest.raises(BaseModelError, match=r"has no model.safetensors"):
        load(copied)


def test_a_base_in_another_quantization_is_an_error(tmp_path):
    config = json.loads((Path(resolve_base("nano")) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantized by gptq, not in 4-bit NF4"):
        load(tmp_path)
