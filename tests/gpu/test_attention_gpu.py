"""Packed attention on CUDA: every backend that runs there against one fp64 call a text, outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from fastprice.models import attention_backends
from fastprice.models.attention_backends import backend, borders_of
from fastprice.models.packed_attention import packed_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (33, 1, 128, 7, 300)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("way", ["xformers", "varlen", "static"])
def test_backends_agree_with_one_call_a_text(way: str, window: int | None, dtype: torch.dtype) -> None:
    """ "static": borders as a pack of one static shape has them, with texts of no tokens at the end."""
    if way == "xformers":
        pytest.importorskip("xformers")
    lengths = (*LENGTHS, 0, 0, 0) if way == "static" else LENGTHS
    borders = borders_of(lengths, torch.device("cuda"))
    longest = 320 if way == "static" else max(LENGTHS)
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    shapes = ((1, 8, tokens, 64), (1, 2, tokens, 64), (1, 2, tokens, 64))
    inputs = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    truths = [each.detach().double().requires_grad_() for each in inputs]
    weight = torch.randn(1, tokens, 8, 64, device="cuda", dtype=dtype)

    if way == "xformers":
        output = attention_backends.xformers_attention(*inputs, borders, LENGTHS, None, window)
    else:
        output = attention_backends.varlen_attention(*inputs, borders, longest, None, window)
    (output * weight).sum().backward()
    truth, _ = packed_attention(torch.nn.Identity(), *truths, None, pack_lengths=LENGTHS, sliding_window=window)
    (truth * weight.double()).sum().backward()

    band = 2e-2 if dtype == torch.bfloat16 else 4e-3
    torch.testing.assert_close(output.double(), truth, rtol=band, atol=band)
    for mine, theirs in zip(inputs, truths, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=4 * band, atol=4 * band)


def test_a_backend_of_flash_kind_is_found() -> None:
    assert backend("cuda", torch.float16) in ("xformers", "varlen")
