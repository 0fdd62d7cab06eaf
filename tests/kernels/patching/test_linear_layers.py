"""`LayerRead` returns one object while nothing changes, and notices whatever `read_layer` would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.kernels.adapted_models import make
from torch import nn

from fastprice_kernels.patching import linear_layers
from fastprice_kernels.patching.linear_layers import Layer, LayerRead, read_layer

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")


def second_adapter(model: Any, layer: Any) -> None:
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter("other")


def both_adapters(model: Any, layer: Any) -> None:
    second_adapter(model, layer)
    model.base_model.set_adapter(["default", "other"])


def dropout(model: Any, layer: Any) -> None:
    layer.lora_dropout["default"] = nn.Dropout(0.5)


def set_weight(model: Any, layer: Any) -> None:
    layer.lora_B["default"].weight = nn.Parameter(torch.zeros_like(layer.lora_B["default"].weight))


def repacked(model: Any, layer: Any) -> None:
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True


def compute_dtype(model: Any, layer: Any) -> None:
    layer.base_layer.compute_dtype = torch.bfloat16


def base_weight(model: Any, layer: Any) -> None:
    layer.base_layer.weight = make(seed=1).get_decoder().layers[0].self_attn.q_proj.base_layer.weight


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "disabled": lambda model, layer: layer.enable_adapters(False),
    "merged": lambda model, layer: layer.merged_adapters.append("default"),
    "another adapter": second_adapter,
    "two adapters": both_adapters,
    "dropout": dropout,
    "scale": lambda model, layer: layer.scaling.update(default=3.0),
    "hook on A": lambda model, layer: layer.lora_A["default"].register_forward_hook(lambda *_: None),
    "hook on the base": lambda model, layer: layer.base_layer.register_forward_pre_hook(lambda *_: None),
    "another B": set_weight,
    "another base weight": base_weight,
    "repacked": repacked,
    "compute dtype": compute_dtype,
    "bias": lambda model, layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.zeros(40), requires_grad=False)),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Layer) and isinstance(b, Layer):
        mine, theirs = ([getattr(x.projection, name) for name in x.projection.__slots__] for x in (a, b))
        return a.dtype == b.dtype and all(
            x is y or (isinstance(x, float) and x == y) for x, y in zip(mine, theirs, strict=True)
        )
    return bool(a == b)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: str) -> None:
    model = make()
    layer = model.get_decoder().layers[0].self_attn.q_proj
    read = LayerRead(layer)
    before = read()
    assert isinstance(before, Layer)
    assert read() is before
    CHANGES[change](model, layer)
    assert same(read(), read_layer(layer))
    assert not same(read(), before)


def test_dropout_counts_in_training_alone() -> None:
    model = make(lora_dropout=0.1)
    layer = model.get_decoder().layers[0].self_attn.q_proj
    read = LayerRead(layer)
    assert read() == "LoRA dropout of 0.1"
    layer.eval()
    assert isinstance(read(), Layer)
    layer.train()
    assert read() == "LoRA dropout of 0.1"


@pytest.mark.parametrize("nf4", [True, False])
def test_unchanged_layers_are_not_read_again(nf4: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(nf4=nf4)
    attention = model.get_decoder().layers[0].self_attn
    reads = [LayerRead(attention.q_proj)]
    if nf4:
        reads.append(LayerRead(attention.q_proj.base_layer))
    before = [read() for read in reads]
    monkeypatch.setattr(linear_layers, "read_layer", None)
    assert [read() for read in reads] == before


def test_a_base_weight_that_begins_to_train_is_noticed() -> None:
    layer = make(nf4=False).get_decoder().layers[0].self_attn.q_proj
    read = LayerRead(layer)
    assert isinstance(read(), Layer)
    layer.base_layer.weight.requires_grad_(True)
    assert read() == "a base weight that trains"
