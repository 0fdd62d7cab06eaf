from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.benchmarking.fake_cuda import FakeCuda

from fastprice.benchmarking import peer_attention, peer_kernels
from fastprice.benchmarking.peer_attention import (
    TORCH_VARLEN,
    choose_attention,
    position_borders,
    register_torch_varlen,
    varlen_from_positions,
)
from fastprice.benchmarking.peer_kernels import unsloth_attention

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("installed", "packed", "expected"),
    [
        ({"flash_attn", "flash_attn_interface"}, True, "flash_attention_3"),
        ({"flash_attn"}, True, "flash_attention_2"),
        ({"flash_attn"}, False, "flash_attention_2"),
        ({"kernels"}, True, "kernels-community/flash-attn2"),
        (set(), True, TORCH_VARLEN),
        (set(), False, "sdpa"),
    ],
)
def test_stock_training_gets_the_fastest_attention_there_is(
    installed: set[str], packed: bool, expected: str, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_attention, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(peer_attention, "varlen_works", lambda device, dtype: True)
    monkeypatch.setattr(peer_attention, "_hub_kernel_is_cached", lambda: "kernels" in installed)
    assert choose_attention("cuda", BF16, packed=packed) == expected
    assert choose_attention("cpu", torch.float32, packed=packed) == "sdpa"


def test_a_card_without_flash_attention_keeps_sdpa(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_attention, "find_spec", lambda name: True)
    monkeypatch.setattr(peer_attention, "varlen_works", lambda device, dtype: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert choose_attention("cuda", torch.float16, packed=True) == "sdpa"


def test_no_hub_kernel_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(peer_attention, "find_spec", lambda name: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    assert not peer_attention._hub_kernel_is_cached()


def test_borders_are_read_off_the_positions_once() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    borders, longest = position_borders(positions)
    assert borders.tolist() == [0, 3, 4, 6]
    assert borders.dtype == torch.int32
    assert longest == 3
    assert position_borders(positions)[0] is borders, "all layers of a step share them"
    assert position_borders(positions.clone())[0] is not borders


def test_stock_layers_on_it_equal_each_text_alone() -> None:
    """Through transformers' own Llama on the CPU, where the varlen branch computes under a mask."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    register_torch_varlen()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    texts = [torch.randint(0, 64, (length,)) for length in (5, 1, 9)]
    with torch.no_grad():
        alone = torch.cat([model(text[None]).logits[0] for text in texts])
        model.set_attn_implementation(TORCH_VARLEN)
        positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
        together = model(torch.cat(texts)[None], position_ids=positions, use_cache=False).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert varlen_from_positions.__doc__


@pytest.mark.parametrize(
    ("chosen", "varlen", "expected"),
    [
        ("flash_varlen", None, ("flash_varlen", True)),
        ("xformers", None, ("xformers", False)),
        ("sdpa", object(), ("torch varlen", True)),
        ("sdpa", None, ("sdpa, a call for each run of equal texts", False)),
    ],
)
def test_unsloths_attention_is_named_with_whether_it_is_its_best(
    chosen: str, varlen: Any, expected: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"select_attention_backend": lambda use_varlen: chosen, "_TORCH_VARLEN_ATTN": varlen}
    monkeypatch.setattr(peer_kernels, "_attribute", lambda module, name: found[name])
    assert unsloth_attention() == expected


def test_an_unsloth_that_does_not_say_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(module: str, name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(peer_kernels, "_attribute", gone)
    assert unsloth_attention() == ("unknown", False)
