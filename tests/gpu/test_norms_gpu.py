"""Norms, residual additions and rotary embeddings on a GPU. Never run yet where this was written: none was there."""

from __future__ import annotations

import pytest
import torch

from fastprice_kernels import reference
from fastprice_kernels.ops.norms import NORMS, add_norm, norm
from fastprice_kernels.ops.rotary import ROTARY_FORMS, rotate_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EPS = 1e-5
BANDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def draw(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def assert_close(got: torch.Tensor, want: torch.Tensor, band: float) -> None:
    assert (got.double() - want).abs().max() <= band * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", [(4096, 4096), (333, 2304), (7, 8192), (65536, 128), (5, 41), (1, 1)])
def test_norms_agree_with_float64(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    x, r, dtotal, dy = (draw(*shape, seed=seed, dtype=dtype) for seed in range(4))
    weight = draw(shape[1], seed=5, dtype=dtype).requires_grad_()
    bias = draw(shape[1], seed=6, dtype=dtype).requires_grad_() if kind == "layer" else None
    for residual in (r, None):
        leaf = x.clone().requires_grad_()
        total, y = add_norm(leaf, residual, weight, EPS, kind=kind, bias=bias)
        wide = total.detach().double().requires_grad_()
        wide_weight = weight.detach().double().requires_grad_()
        want = reference.norm(wide, wide_weight, EPS, kind, None if bias is None else bias.detach().double())
        dx, dweight = torch.autograd.grad(want, (wide, wide_weight), dy.double())
        got_dx, got_dweight = torch.autograd.grad((total, y), (leaf, weight), (dtotal, dy))
        assert torch.equal(total.detach(), x if residual is None else x + residual)
        assert_close(y, want.detach(), BANDS[dtype])
        assert_close(got_dx, dx + dtotal.double(), BANDS[dtype])
        assert_close(got_dweight, dweight, BANDS[dtype])


def test_norms_with_fp32_weights_write_the_dtype_that_is_asked_for() -> None:
    x, weight = draw(512, 2048, seed=0, dtype=torch.bfloat16), draw(2048, seed=1, dtype=torch.float32)
    want = reference.norm(x.double(), weight.double(), EPS, "rms")
    assert norm(x, weight, EPS).dtype is torch.float32
    assert_close(norm(x, weight, EPS, dtype=torch.bfloat16), want, 3e-2)


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("form", ROTARY_FORMS)
@pytest.mark.parametrize(
    ("heads", "keys", "width", "rotated"), [(32, 8, 128, 128), (32, 8, 64, 64), (14, 2, 64, 32), (8, 4, 256, 256)]
)
def test_rotations_agree_with_float64(
    heads: int, keys: int, width: int, rotated: int, form: str, dtype: torch.dtype
) -> None:
    q, k = (
        draw(2, 1000, n * width, seed=n, dtype=dtype).view(2, 1000, n, width).transpose(1, 2) for n in (heads, keys)
    )
    cos, sin = (draw(2, 1000, rotated, seed=seed, dtype=dtype) for seed in (3, 4))
    wide = [each.double().requires_grad_() for each in (q, k)]
    want = [reference.rotate(each, cos.double(), sin.double(), form) for each in wide]
    seeds = [draw(*each.shape, seed=9, dtype=dtype) for each in want]
    want_gradients = torch.autograd.grad(want, wide, [seed.double() for seed in seeds])
    leaves = [each.clone().requires_grad_() for each in (q, k)]
    got = rotate_(*(each * 1 for each in leaves), cos, sin, form)
    gradients = torch.autograd.grad(got, leaves, [seed.clone() for seed in seeds])
    for each, expected in zip((*got, *gradients), (*want, *want_gradients), strict=True):
        assert_close(each.detach(), expected.detach(), BANDS[dtype])


def test_launches_on_the_device_of_the_arguments() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(4, 64, device="cuda:1")
    assert norm(x, torch.ones(64, device="cuda:1"), EPS).isfinite().all()
