"""The counted training step: the launches are those of code that really computes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from fastprice.benchmarking import traffic_counter
from fastprice.benchmarking.dry_run import count_training_step
from fastprice.benchmarking.traffic_counter import Launch
from fastprice.models.packed_attention import PACKED_ATTENTION, packed_attention

TINY = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512,
}  # fmt: skip


def step(kernels: bool, **settings: Any) -> list[Launch]:
    return count_training_step(TINY | settings, tokens=128, labeled=8, rank=4, kernels=kernels)


def test_stock_peft_launches_the_same_when_it_really_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    dry = step(kernels=False)
    computed: list[str] = []

    def compute(func: Any, args: Any, kwargs: Any) -> Any:
        computed.append(func._schema.name)
        return func(*args, **kwargs)

    monkeypatch.setattr(traffic_counter, "_unwritten", compute)
    assert step(kernels=False) == dry
    assert len(computed) > 200, "the stand-in ran"


def test_a_step_of_ours_has_the_kernels_that_a_layer_needs() -> None:
    two, three = (
        Counter((each.phase, each.operator) for each in step(kernels=True, num_hidden_layers=layers))
        for layers in (2, 3)
    )
    layer = three - two
    for phase in ("forward", "backward"):
        assert layer[phase, "fastprice::dequantize_nf4"] == 7
        assert layer[phase, f"fastprice::glu_{phase}"] == 1
    assert layer["forward", "attention"] == layer["backward", "attention_backward"] == 1
    assert not two - three, "another layer adds launches and takes none away"
    assert two["forward", "fastprice::completion_cross_entropy"] == 1


def test_the_lines_of_a_backward_pass_are_those_whose_gradient_it_is() -> None:
    launches = [each for each in step(kernels=False) if each.phase == "backward"]
    places = [each.where for each in launches]
    assert any(where.startswith("transformers") and "LlamaRMSNorm.forward (PowBackward0)" in where for where in places)
    assert sum(each.where.startswith(("transformers", "peft", "bitsandbytes")) for each in launches) > 0.9 * len(
        launches
    )


def test_a_branch_of_cuda_is_taken_and_everything_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaMLP

    seen: list[bool] = []
    stock = LlamaMLP.forward

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            seen.append(gradients[0].is_cuda)
            return gradients[0]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.is_cuda)
        result: torch.Tensor = stock(self, Identity.apply(x))
        return result

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    before = torch.is_autocast_enabled("cuda")
    step(kernels=False)
    assert seen == [True] * 4, "two layers, forward and backward"
    assert not torch.ones(1).is_cuda
    assert torch.is_autocast_enabled("cuda") == before
    assert ALL_ATTENTION_FUNCTIONS[PACKED_ATTENTION] is packed_attention
