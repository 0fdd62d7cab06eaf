"""Which attention of packs runs here: chosen without a trace in any autograd graph, and why not a faster one."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.memory.small_models import LAYERS, make_batch, make_model
from tests.models.fused_attention import forget_choices, fused_attention
from torch import Tensor

from fastprice.memory.activation_checkpointing import ActivationCheckpointing
from fastprice.memory.recompute_levels import RECOMPUTE_LEVELS
from fastprice.models import attention_backends
from fastprice.models.attention_backends import attention_choice, backend, choose_attention, varlen_works
from fastprice.models.packed_attention import packed_attention
from fastprice.models.peft_engine import PeftEngine
from fastprice.offload import offload_layers
from fastprice.offload.device_transfers import SimulatedTransfers


def step(model: Any) -> list[Tensor]:
    """The loss of one micro-batch, then its gradients."""
    model.zero_grad()
    loss = model(**make_batch()).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.fixture
def fused() -> Iterator[None]:
    with fused_attention():
        yield


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("level", RECOMPUTE_LEVELS)
def test_the_first_step_may_choose_inside_a_layer_that_recomputes(level: str, streamed: bool) -> None:
    model = make_model(nf4=streamed)
    expected = step(model)  # one call a text
    with fused_attention(), ActivationCheckpointing(model, (level,) * LAYERS):
        assert attention_choice.cache_info().currsize == 0
        if streamed:
            with offload_layers(model, LAYERS, transfers=SimulatedTransfers()):
                found = step(model)
        else:
            found = step(model)
        assert backend("cpu", torch.float32) == "varlen"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_engine_chooses_before_training(fused: None) -> None:
    model = make_model()
    PeftEngine().for_training(model)
    assert attention_choice.cache_info().currsize == 1


def test_a_choice_under_hooks_of_others_calls_none_of_them(fused: None) -> None:
    def refuse(tensor: Tensor) -> Tensor:
        raise AssertionError("a tensor of the probe was seen outside of it")

    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse), torch.no_grad():
        assert backend("cpu", torch.float32) == "varlen"


def test_a_choice_in_inference_mode_is_the_choice_outside(fused: None) -> None:
    with torch.inference_mode():
        assert backend("cpu", torch.float32) == "varlen"


def test_on_a_cpu_nothing_is_missed() -> None:
    forget_choices()
    assert (backend("cpu", torch.float32), varlen_works("cpu", torch.bfloat16)) == ("texts", False)
    assert choose_attention("cpu", torch.float32).shortfall == ""


def test_a_backend_that_fails_is_reported_once_with_its_reason(fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(attention_backends, "varlen_attention", fails)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choice = choose_attention("cpu", torch.float32)
        assert choose_attention("cpu", torch.float32) is choice
    (warning,) = caught
    assert choice.backend == "texts"
    assert choice.failures == {"xformers": "it is not installed", "varlen": "no kernel image is available"}
    for part in ("one call a text", "no kernel image is available", "compute capability 8.0", "fastprice[gpu]"):
        assert part in str(warning.message)
    assert "\n" not in str(warning.message)


def test_an_xformers_that_is_not_installed_is_no_shortfall_beside_varlen(fused: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = choose_attention("cpu", torch.float32)
    assert choice == attention_backends.AttentionChoice("varlen", {"xformers": "it is not installed"})


def test_memory_that_runs_out_says_nothing_about_a_backend(fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(attention_backends, "varlen_attention", fails)
        with pytest.raises(torch.OutOfMemoryError):
            backend("cpu", torch.float32)
    assert backend("cpu", torch.float32) == "varlen"


@dataclass
class _Borders:
    seqstart: Tensor
    max_seqlen: int


@dataclass
class _Mask:
    """Of xformers' `BlockDiagonalCausalMask` what is used here, with its attention in place of xformers'."""

    q_seqinfo: _Borders
    k_seqinfo: _Borders
    window: int | None = None
    made = 0

    @classmethod
    def from_seqlens(cls, lengths: list[int], *, device: torch.device) -> _Mask:
        cls.made += 1
        assert device.type == "cpu"
        borders = _Borders(torch.full((len(lengths) + 1,), -1, device=device), max(lengths))
        return cls(borders, borders)

    def make_local_attention(self, window: int) -> _Mask:
        return _Mask(self.q_seqinfo, self.k_seqinfo, window)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, attn_bias: _Mask, scale: float | None) -> Tensor:
    from fastprice.models.packed_attention import _masked_attention

    flat = (side.flatten(2, 3).transpose(1, 2) for side in (q, k, v))
    assert attn_bias.q_seqinfo is attn_bias.k_seqinfo
    return _masked_attention(*flat, attn_bias.q_seqinfo.seqstart, scale, attn_bias.window).unflatten(2, q.shape[2:4])


@pytest.mark.parametrize("window", [None, 5])
def test_xformers_gets_one_mask_a_pack_with_borders_that_are_on_the_device(
    fused: None, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    for name in ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", _attend, raising=False)
    monkeypatch.setattr(sys.modules["xformers.ops.fmha.attn_bias"], "BlockDiagonalCausalMask", _Mask, raising=False)
    assert backend("cpu", torch.float64) == "xformers"
    gc.collect()
    assert len(attention_backends._block_masks) <= 1  # that of the probe, whose borders are cached
    q, k, v = (torch.randn(1, heads, 24, 6, dtype=torch.float64) for heads in (4, 2, 2))
    lengths, borders = (9, 15), torch.tensor([0, 9, 24], dtype=torch.int32)
    before, _Mask.made = len(attention_backends._block_masks), 0
    found = [
        packed_attention(
            torch.nn.Identity(), q, k, v, None, pack_lengths=lengths, cu_seqlens=borders, max_seqlen=15,
            sliding_window=window,
        )[0]
        for _ in range(3)
    ]  # fmt: skip
    assert _Mask.made == 1
    assert len(attention_backends._block_masks) == before + 1
    forget_choices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_backends, "_may_have_kernels", lambda device, dtype: False)
        expected, _ = packed_attention(torch.nn.Identity(), q, k, v, None, pack_lengths=lengths, sliding_window=window)
        forget_choices()
    for each in found:
        torch.testing.assert_close(each, expected)
    del borders
    gc.collect()
    assert len(attention_backends._block_masks) == before
