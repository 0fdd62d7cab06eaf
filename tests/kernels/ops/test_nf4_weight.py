"""A quant state is checked once, and again as soon as anything is not what was checked; nothing is kept alive."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprice_kernels.ops import nf4_weight
from fastprice_kernels.ops.nf4_dequantize import dequantize_nf4
from fastprice_kernels.ops.nf4_weight import read_weight

bnb = pytest.importorskip("bitsandbytes")


def weight(nested: bool = True, seed: int = 0, shape: tuple[int, int] = (48, 64)) -> Any:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=nested).to("cpu")


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    check = nf4_weight._check_weight
    monkeypatch.setattr(nf4_weight, "_check_weight", lambda *a: made.append(1) or check(*a))
    return made


@pytest.mark.parametrize("nested", [True, False])
def test_a_weight_is_checked_once(nested: bool, checks: list[int]) -> None:
    packed = weight(nested)
    first, second = (read_weight(packed, packed.quant_state) for _ in range(2))
    assert len(checks) == 1
    for a, b in zip(first[0], second[0], strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert first[1:] == second[1:] == ((48, 64), torch.float32)
    assert type(second[0].packed) is Tensor, "an attribute of a Params4bit costs microseconds"


def other_absmax(packed: Any, other: Any) -> None:
    packed.quant_state.absmax = other.quant_state.absmax


def other_nested_absmax(packed: Any, other: Any) -> None:
    packed.quant_state.state2.absmax = other.quant_state.state2.absmax


def other_state2(packed: Any, other: Any) -> None:
    packed.quant_state.state2 = other.quant_state.state2


def other_offset(packed: Any, other: Any) -> None:
    packed.quant_state.offset = other.quant_state.offset


def other_bytes(packed: Any, other: Any) -> None:
    packed.data = other.data.clone()


def other_dtype(packed: Any, other: Any) -> None:
    packed.quant_state.dtype = torch.bfloat16


CHANGES = [other_absmax, other_nested_absmax, other_state2, other_offset, other_bytes, other_dtype]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_checked_again_and_used(change: Callable[[Any, Any], None], checks: list[int]) -> None:
    packed, other = weight(), weight(seed=1)
    dequantize_nf4(packed, packed.quant_state)
    change(packed, other)
    got = dequantize_nf4(packed, packed.quant_state)
    assert len(checks) == 2
    copied = copy.deepcopy(packed.quant_state)
    assert torch.equal(got, dequantize_nf4(packed.data.clone(), copied))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda packed: setattr(packed.quant_state, "absmax", torch.zeros(7, dtype=torch.uint8)), "absmax has 7"),
        (lambda packed: setattr(packed, "data", packed.data[:5]), "packed has 5"),
        (lambda packed: setattr(packed, "data", packed.data.float()), "packed is torch.float32"),
        (lambda packed: setattr(packed.quant_state, "blocksize", 128), "nested absmax has 48"),
        (lambda packed: setattr(packed.quant_state, "shape", torch.Size((48, 32))), "packed has 1536"),
        (lambda packed: setattr(packed.quant_state, "quant_type", "fp4"), "'fp4'"),
        (lambda packed: setattr(packed.quant_state, "packing_format_for_cpu", True), "repacked"),
    ],
)
def test_what_stopped_to_fit_is_refused(change: Callable[[Any], None], words: str) -> None:
    packed = weight()
    dequantize_nf4(packed, packed.quant_state)
    change(packed)
    with pytest.raises(ValueError, match=words):
        dequantize_nf4(packed, packed.quant_state)


def test_nothing_is_kept_alive_and_nothing_is_left_behind() -> None:
    gc.collect()
    before = len(nf4_weight._CHECKED)
    packed = weight()
    dequantize_nf4(packed, packed.quant_state)
    assert len(nf4_weight._CHECKED) == before + 1
    buffer = packed.data.clone()
    old = weakref.ref(packed.quant_state.absmax), weakref.ref(packed.untyped_storage())
    packed.quant_state.absmax = packed.quant_state.absmax.clone()
    packed.data = buffer
    assert [each() for each in old] == [None, None], "the storage of before"
    state = weakref.ref(packed.quant_state)
    del packed, buffer
    gc.collect()
    assert state() is None
    assert len(nf4_weight._CHECKED) == before


def test_copies_are_read_for_themselves() -> None:
    packed = weight()
    want = dequantize_nf4(packed, packed.quant_state)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(dequantize_nf4(twin, twin.quant_state), want)
        twin.data.zero_()
        assert torch.equal(dequantize_nf4(packed, packed.quant_state), want)
        assert not torch.equal(dequantize_nf4(twin, twin.quant_state), want)
