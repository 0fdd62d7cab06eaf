"""The memory estimate: its parts, its errors, and its distance from a simulation with the real model code."""

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
from fastprice.memory.tape import Peak, Tape
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
    parts = estimate_memory(shape, recompute="all").breakdown
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
        "import sys; from fastprice.memory import estimate_memory, make_plan; estimate_memory('Llama-3.2-1B'); "
        "make_plan('Llama-3.2-1B', '24GiB'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(deadline=None, max_examples=60)
@given(
    base=st.sampled_from(shipped_names()),
    method=st.sampled_from(["qlora", "lora", "full"]),
    tokens=st.integers(1, 4096),
    texts=st.integers(1, 8),
    recompute=st.sampled_from(["all", "none", 3]),
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


def test_what_costs_more_is_estimated_higher() -> None:
    def peak(**options: Any) -> int:
        return estimate_memory("Llama-3.1-8B", **{"tokens": 2048, "loss_head": "completion", **options}).peak_bytes

    by_layers = [peak(recompute=count) for count in range(33)]
    assert by_layers == sorted(by_layers, reverse=True)
    assert by_layers[0] == peak(recompute="none")
    assert by_layers[32] == peak(recompute="all")
    assert peak(loss_head="full") > peak()
    assert peak(tokens=4096) > peak()
    assert peak(rank=64) > peak()
    assert peak(method="lora") > peak()
    assert peak(engine="fastprice", recompute="none") < peak(recompute="none")
    assert peak(optimizer="adamw_8bit") < peak()
    assert peak(phase="eval") < peak()
    assert peak(loss_head="full", labeled=0.1) == peak(loss_head="full")


def test_levels_are_priced_layer_by_layer() -> None:
    def estimate(recompute: Any, **options: Any) -> Any:
        settings = {"tokens": 4096, "loss_head": "completion", "labeled": 0.02, **options}
        return estimate_memory("Llama-3.1-8B", recompute=recompute, **settings)

    assert estimate(["input"] * 32) == estimate("all") == estimate(32)
    assert estimate(["all"] * 32) == estimate("none") == estimate(0)
    assert estimate(["input"] * 5 + ["all"] * 27) == estimate(5)
    for engine in ("peft", "fastprice"):
        by_level = [estimate([level] * 32, engine=engine).peak_bytes for level in ("all", "costly", "input", "host")]
        assert by_level == sorted(by_level, reverse=True)
        assert len(set(by_level)) == 4
        # Recomputing the first layers costs less memory than recomputing the last ones.
        first, last = ["input"] * 16 + ["all"] * 16, ["all"] * 16 + ["input"] * 16
        assert estimate(first, engine=engine).peak_bytes < estimate(last, engine=engine).peak_bytes
    stream = 2 * 4096 * 4096
    assert estimate(["host"] * 32).host_bytes == 32 * stream
    embedding = 2 * 128256 * 4096
    streamed = estimate(["host"] * 32, streaming=10)
    assert streamed.host_bytes == pytest.approx(32 * stream + 10 * 112.5e6 + embedding, rel=0.01)
    assert estimate("all").host_bytes == 0
    assert estimate(["host"] * 32, phase="eval").host_bytes == 0


def test_streaming_keeps_two_layers_of_those_streamed() -> None:
    def base(streaming: int) -> int:
        parts = estimate_memory("Llama-3.1-8B", streaming=streaming).breakdown
        return parts["base weights (nf4)"] + parts["quantization statistics"]

    layer = base(0) / 32
    assert base(2) == base(0)
    assert base(12) == base(0) - 10 * layer
    assert base(32) == 2 * layer


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 0}, "tokens: 0 is not a whole number at least 1"),
        ({"tokens": 4.5}, "tokens: 4.5"),
        ({"rank": 0}, "rank: 0"),
        ({"rank": 5000}, "rank: 5000 is not a whole number from 1 to 4,096"),
        ({"sequences": 9, "tokens": 8}, "sequences: 9"),
        ({"recompute": 33}, "recompute: 33 is not a whole number from 0 to 32"),
        ({"recompute": ["all"] * 31}, "recompute: 31 levels for a model of 32 layers"),
        ({"recompute": ["cheap"] * 32}, "recompute: 'cheap' is not one of all, costly, input, host"),
        ({"recompute": ["input"] * 32, "engine": "unsloth"}, "recomputes every layer itself"),
        ({"recompute": "some"}, "recompute: 'some' is not 'all', 'none' or a number"),
        ({"optimizer": "adamw_tarch"}, "did you mean 'adamw_torch'?"),
        ({"method": "qlorra"}, "did you mean 'qlora'?"),
        ({"engine": "unslot"}, "did you mean 'unsloth'?"),
        ({"loss_head": "half"}, "loss_head: 'half'"),
        ({"phase": "predict"}, "phase: 'predict'"),
        ({"labeled": 2}, "labeled: 2 is not a share"),
        ({"streaming": 40}, "streaming: 40"),
        ({"streaming": 4, "method": "lora"}, "only a frozen 4-bit base is streamed"),
    ],
)
def test_impossible_settings_are_told_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        estimate_memory("Llama-3.1-8B", **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("Llama-3.1-9B", "did you mean"),
        ("nobody/llama-3.1-8bb", "did you mean"),
        ("/no/such/folder", "neither a folder nor a hub id"),
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({**settings_of("Llama-3.2-1B"), "hidden_size": "wide"}, "hidden_size='wide'"),
        (object(), "object is no model"),
    ],
)
def test_an_unknown_base_is_told_in_one_line(base: Any, said: str) -> None:
    with pytest.raises(BaseModelError) as error:
        estimate_memory(base)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_config_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"config\.json cannot be read as JSON"):
        estimate_memory(tmp_path)


class TestTape:
    """Peaks worked out by hand."""

    def test_saved_tensors_outlive_their_names(self) -> None:
        tape = Tape()
        x = tape.source(100)
        y = tape.apply(100, [x], saves_output=True)
        z = tape.apply(10, [y])
        tape.drop(y, z)
        assert tape.total == 100
        tape.peak = Peak()
        tape.backward(z)
        # z's gradient and y's; then y's and x's; y itself until its operation's backward is done
        assert tape.peak.total == 300
        assert tape.total == 0

    def test_nothing_is_kept_without_a_gradient_or_without_recording(self) -> None:
        for tape, wanted in ((Tape(), False), (Tape(record=False), True)):
            x = tape.source(100, gradient=wanted)
            y = tape.apply(100, [x], saves_output=True)
            tape.drop(y)
            assert tape.total == 0

    def test_a_second_gradient_is_added_in_place_unless_the_first_is_shared(self) -> None:
        tape = Tape()
        x = tape.source(100)
        a, b = tape.apply(100, [x]), tape.apply(100, [x])
        total = tape.apply(100, [a, b], passes=True)
        tape.drop(a, b, total)
        tape.peak = Peak()
        tape.backward(total)
        # the shared incoming gradient, b's result, a's result added to it in place
        assert tape.peak.total == 300

    def test_scratch_counts_only_while_its_operation_runs(self) -> None:
        tape = Tape()
        x = tape.source(10)
        y = tape.apply(10, [x], scratch=1000, scratch_backward=500, scratch_kind="dequantized")
        assert (tape.peak.total, tape.total) == (1010, 10)
        tape.peak = Peak()
        tape.backward(y)
        assert tape.peak.total == 10 + 10 + 500 + 10
        assert tape.peak.parts["dequantized"] == 500


CASES: list[dict[str, Any]] = [
    {"base": "Llama-3.2-1B", "method": "qlora", "tokens": 1024, "recompute": "none", "loss_head": "completion"},
    {"base": "Llama-3.2-1B", "method": "lora", "tokens": 4096, "recompute": "all", "loss_head": "completion",
     "labeled": 0.02},
    {"base": "Llama-3.2-1B", "method": "qlora", "tokens": 512, "recompute": "all", "loss_head": "full"},
    {"base": "Qwen2.5-0.5B", "method": "qlora", "tokens": 8192, "recompute": "all", "loss_head": "completion",
     "labeled": 0.02},
    {"base": "Qwen2.5-0.5B", "method": "lora", "tokens": 2048, "recompute": 1, "loss_head": "completion"},
    {"base": "Qwen3-0.6B", "method": "lora", "tokens": 2048, "recompute": "none", "loss_head": "full"},
    {"base": "gemma-2-2b", "method": "qlora", "tokens": 2048, "recompute": "none", "loss_head": "full", "sequences": 2},
    {"base": "gemma-2-2b", "method": "lora", "tokens": 2048, "recompute": "all", "loss_head": "completion"},
    {"base": "Qwen2.5-0.5B", "method": "qlora", "tokens": 2048, "recompute": "all", "loss_head": "full",
     "sequences": 4, "phase": "eval"},
    {"base": "Llama-3.2-1B", "method": "full", "tokens": 512, "recompute": "all", "loss_head": "completion"},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part) for part in case.values()))
def test_the_estimate_agrees_with_the_real_model_code(case: dict[str, Any]) -> None:
    from fastprice.memory.simulate import Case, simulate

    step = Case(**case, layers=2)
    assert step.estimate().tensor_bytes == pytest.approx(simulate(step), rel=0.015)


LEVELLED = [
    ("Llama-3.1-8B", "lora", ("host", "input", "costly", "all")), ("gemma-2-2b", "qlora", ("costly",) * 4),
    ("Llama-3.1-8B", "qlora", ("host",) * 4), ("Qwen3-8B", "lora", ("all", "costly", "host", "input")),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("base", "method", "levels"), LEVELLED, ids=str)
def test_levels_agree_with_the_real_model_code(base: str, method: str, levels: tuple[str, ...]) -> None:
    """With so small a vocabulary the peak falls into a layer, and not into the loss."""
    from fastprice.memory.simulate import Case, simulate

    step = Case(base, method, 4096, levels, "completion", sequences=4, labeled=0.02, layers=4, vocabulary=256)
    assert step.estimate().moment != "loss head"
    assert step.estimate().tensor_bytes == pytest.approx(simulate(step), rel=0.015)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("base", "method"), [("Llama-3.2-1B", "qlora"), ("Qwen3-0.6B", "lora"), ("gemma-2-2b", "lora")]
)
def test_a_layer_keeps_what_is_said_to_the_byte(base: str, method: str) -> None:
    """What one more layer adds to the bytes alive after the forward pass: the real model, autograd and our hooks."""
    from fastprice.memory.simulate import Case
    from fastprice.memory.simulate import kept_bytes as simulated_kept_bytes

    from fastprice.memory.estimate import kept_bytes

    def kept(levels: tuple[str, ...]) -> int:
        step = Case(base, method, 1024, levels, "completion", sequences=2, labeled=0.02, layers=len(levels),
                    vocabulary=256)  # fmt: skip
        return simulated_kept_bytes(step) - _weights(step)

    for level in ("all", "costly", "input", "host"):
        estimate = kept_bytes(base, level, method=method, tokens=1024, sequences=2)
        assert kept((level,) * 3) - kept((level,) * 2) == estimate


def _weights(step: Any) -> int:
    """Bytes of the model alone."""
    from fastprice.memory.simulate import build

    model = build(step)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.filterwarnings("ignore")
def test_the_simulation_counts_storages_not_tensors() -> None:
    import torch
    from fastprice.memory.stand_ins import Live
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), Live() as live:
        x = torch.empty(1000, requires_grad=True)
        y = x.exp()
        view = y.view(10, 100)
        assert live.bytes == 8000
        del y
        assert live.bytes == 8000  # the view holds it
        z = view + 1
        del view
        assert live.bytes == 12000  # autograd holds it
        z.sum().backward()
        del z
        assert live.bytes == 8000  # x and its gradient
        assert x.grad is not None
    assert live.peak > 12000
