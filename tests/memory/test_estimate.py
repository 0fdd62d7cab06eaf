"""The memory estimate: its parts, their order, and its errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprice.errors import BaseModelError, ConfigError
from fastprice.memory import estimate_memory
from fastprice.memory.recompute_levels import RECOMPUTE_LEVELS
from fastprice.models.shapes import read_shape, settings_of, shipped_names

# Published totals, in billions.
PARAMETERS = {
    "Llama-3.1-8B": 8.03,
    "Llama-3.1-70B": 70.6,
    "Llama-3.2-1B": 1.236,
    "Llama-3.2-3B": 3.21,
    "Qwen2.5-0.5B": 0.494,
    "Qwen2.5-1.5B": 1.54,
    "Qwen2.5-3B": 3.09,
    "Qwen2.5-7B": 7.62,
    "Qwen2.5-14B": 14.8,
    "Qwen2.5-32B": 32.8,
    "Qwen2.5-72B": 72.7,
    "Qwen3-0.6B": 0.596,
    "Qwen3-4B": 4.02,
    "Qwen3-8B": 8.19,
    "Qwen3-14B": 14.8,
    "Qwen3-32B": 32.8,
    "Mistral-7B-v0.3": 7.25,
    "SmolLM2-135M": 0.1345,
    "SmolLM2-360M": 0.362,
    "SmolLM2-1.7B": 1.71,
    "gemma-2-2b": 2.61,
    "gemma-2-9b": 9.24,
    "gemma-2-27b": 27.2,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_configurations_have_the_published_number_of_parameters(name: str) -> None:
    assert read_shape(name).parameters / 1e9 == pytest.approx(PARAMETERS[name], rel=0.005)


def test_nf4_sizes_of_a_70b_model() -> None:
    shape = read_shape("Llama-3.1-70B")
    parts = estimate_memory(shape, recompute="full").breakdown
    total = parts["base weights (nf4)"] + parts["quantization statistics"]
    assert total == pytest.approx(35.3e9, rel=0.002)
    assert total / shape.layers == pytest.approx(441e6, rel=0.002)
    assert parts["base weights (bf16)"] == 2 * (shape.parameters - shape.layers * shape.layer_linear_weights)


@pytest.mark.parametrize(
    "name", ["Llama-3.1-8B", "llama-3.1-8b", "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B"]
)
def test_a_model_is_known_under_its_usual_names(name: str) -> None:
    assert read_shape(name) == read_shape("Llama-3.1-8B")


def test_a_shape_comes_from_a_folder_and_from_a_transformers_configuration(tmp_path: Path) -> None:
    from transformers import AutoConfig

    shipped = settings_of("Qwen2.5-0.5B")
    config = AutoConfig.for_model(**shipped)
    config.save_pretrained(tmp_path)
    fields = [
        {**vars(shape), "name": ""} for shape in map(read_shape, ("Qwen2.5-0.5B", tmp_path, str(tmp_path), config))
    ]
    assert all(each == fields[0] for each in fields)


def test_an_estimate_imports_no_torch() -> None:
    code = (
        "import sys; from fastprice.memory import estimate_memory, plan_memory; estimate_memory('Llama-3.2-1B'); "
        "plan_memory('Llama-3.2-1B', '24GiB'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(deadline=None, max_examples=60)
@given(
    base=st.sampled_from(shipped_names()),
    method=st.sampled_from(["qlora", "lora", "full"]),
    tokens=st.integers(1, 4096),
    texts=st.integers(1, 8),
    recompute=st.sampled_from(["full", "none", 3]),
    head=st.sampled_from(["full", "completion"]),
    engine=st.sampled_from(["peft", "unsloth", "fastprice"]),
    phase=st.sampled_from(["train", "eval"]),
    optimizer=st.sampled_from(["adamw_torch", "adamw_8bit", "sgd"]),
)
def test_the_breakdown_adds_up_and_no_part_is_negative(
    base: str, method: str, tokens: int, texts: int, recompute: Any, head: str, engine: str, phase: str, optimizer: str
) -> None:
    estimate = estimate_memory(
        base, method=method, tokens=tokens, sequences=min(texts, tokens), recompute=recompute, loss_head=head,
        engine=engine, phase=phase, optimizer=optimizer,
    )  # fmt: skip
    assert sum(estimate.breakdown.values()) == estimate.peak_bytes
    assert min(estimate.breakdown.values()) >= 0
    assert estimate.tensor_bytes > 0.5 * read_shape(base).parameters


def test_estimates_are_ordered_as_their_causes() -> None:
    def peak(**options: Any) -> int:
        return estimate_memory("Llama-3.1-8B", **{"tokens": 2048, "loss_head": "completion", **options}).peak_bytes

    by_layers = [peak(recompute=count) for count in range(33)]
    assert by_layers == sorted(by_layers, reverse=True)
    assert by_layers[0] == peak(recompute="none")
    assert by_layers[32] == peak(recompute="full")
    assert peak(loss_head="full") > peak()
    assert peak(tokens=4096) > peak()
    assert peak(rank=64) > peak()
    assert peak(method="lora") > peak()
    assert peak(engine="fastprice", recompute="none") < peak(recompute="none")
    assert peak(optimizer="adamw_8bit") < peak()
    assert peak(phase="eval") < peak()
    assert peak(loss_head="full", labeled=0.1) == peak(loss_head="full")


def test_levels_are_estimated_layer_by_layer() -> None:
    def estimate(recompute: Any, **options: Any) -> Any:
        settings = {"tokens": 4096, "loss_head": "completion", "labeled": 0.02, **options}
        return estimate_memory("Llama-3.1-8B", recompute=recompute, **settings)

    assert estimate(["full"] * 32) == estimate("full") == estimate(32)
    assert estimate(["none"] * 32) == estimate("none") == estimate(0)
    assert estimate(["full"] * 5 + ["none"] * 27) == estimate(5)
    for engine in ("peft", "fastprice"):
        by_level = [estimate(level, engine=engine).peak_bytes for level in RECOMPUTE_LEVELS]
        assert by_level == sorted(by_level, reverse=True)
        assert len(set(by_level)) == 5
        # Recomputing the first layers costs less memory than recomputing the last ones.
        first, last = ["full"] * 16 + ["none"] * 16, ["none"] * 16 + ["full"] * 16
        assert estimate(first, engine=engine).peak_bytes < estimate(last, engine=engine).peak_bytes
    residual = 2 * 4096 * 4096
    assert estimate(["offload"] * 32).host_bytes == 32 * residual
    embedding = 2 * 128256 * 4096
    offloaded = estimate(["offload"] * 32, offloaded_layers=10)
    assert offloaded.host_bytes == pytest.approx(32 * residual + 10 * 112.5e6 + embedding, rel=0.01)
    assert estimate("full").host_bytes == 0
    assert estimate(["offload"] * 32, phase="eval").host_bytes == 0


def test_two_offloaded_layers_are_on_the_device() -> None:
    def base(offloaded_layers: int) -> int:
        parts = estimate_memory("Llama-3.1-8B", offloaded_layers=offloaded_layers).breakdown
        return parts["base weights (nf4)"] + parts["quantization statistics"]

    layer = base(0) / 32
    assert base(2) == base(0)
    assert base(12) == base(0) - 10 * layer
    assert base(32) == 2 * layer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens: 0 is not a whole number at least 1"),
        ({"tokens": 4.5}, "tokens: 4.5"),
        ({"rank": 0}, "rank: 0"),
        ({"rank": 5000}, "rank: 5000 is not a whole number from 1 to 4,096"),
        ({"sequences": 9, "tokens": 8}, "sequences: 9"),
        ({"recompute": 33}, "recompute: 33 is not a whole number from 0 to 32"),
        ({"recompute": ["none"] * 31}, "recompute: 31 levels given for a model of 32 layers"),
        ({"recompute": ["cheap"] * 32}, "recompute: 'cheap' is not one of none, selective, mlp, full, offload"),
        ({"recompute": ["full"] * 32, "engine": "unsloth"}, "recomputes every layer itself"),
        ({"recompute": "selective", "engine": "unsloth"}, "recomputes every layer itself"),
        ({"recompute": "some"}, "recompute: 'some' is neither one of none, selective, mlp, full, offload"),
        ({"optimizer": "adamw_tarch"}, "did you mean 'adamw_torch'?"),
        ({"method": "qlorra"}, "did you mean 'qlora'?"),
        ({"engine": "unslot"}, "did you mean 'unsloth'?"),
        ({"loss_head": "half"}, "loss_head: 'half'"),
        ({"phase": "predict"}, "phase: 'predict'"),
        ({"labeled": 2}, "labeled: 2 is not a share"),
        ({"offloaded_layers": 40}, "offloaded_layers: 40"),
        ({"offloaded_layers": 4, "method": "lora"}, "only a frozen 4-bit base can be"),
    ],
)
def test_impossible_settings_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        estimate_memory("Llama-3.1-8B", **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("Llama-3.1-9B", "did you mean"),
        ("nobody/llama-3.1-8bb", "did you mean"),
        ("/no/such/folder", "neither a folder nor a hub id"),
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({**settings_of("Llama-3.2-1B"), "hidden_size": "wide"}, "hidden_size='wide'"),
        (object(), "object is no model"),
    ],
)
def test_an_unknown_base_is_one_line(base: Any, message: str) -> None:
    with pytest.raises(BaseModelError) as error:
        estimate_memory(base)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_config_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"config\.json cannot be read as JSON"):
        estimate_memory(tmp_path)
