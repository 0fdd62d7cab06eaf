"""nf4_matmul_small: the reference, the kernels in the interpreter, how K is split, arguments, and the op."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprice_kernels import dequantize_nf4
from fastprice_kernels.ops import nf4_matmul_small as small_module
from fastprice_kernels.ops.nf4_matmul_small import nf4_matmul_small
from fastprice_kernels.ops.nf4_weight import read_weight

NF4 = [-1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.6, 0.7, 1.0]


@dataclass(frozen=True)
class Case:
    x: Tensor
    packed: Tensor
    state: Any
    bias: Tensor


def case(rows: int, n: int, k: int, dtype: torch.dtype = torch.float32, nested: bool = True) -> Case:
    draw = torch.Generator().manual_seed(rows * n + k)
    blocks = -(-n * k // 64)
    packed = torch.randint(256, (-(-n * k // 2), 1), generator=draw, dtype=torch.uint8)
    state = SimpleNamespace(
        absmax=torch.rand(blocks, generator=draw),
        code=torch.tensor(NF4),
        shape=(n, k),
        dtype=dtype,
        blocksize=64,
        quant_type="nf4",
        offset=None,
        state2=None,
    )
    if nested:
        scales = torch.rand(-(-blocks // 256), generator=draw)
        state.absmax = torch.randint(256, (blocks,), generator=draw, dtype=torch.uint8)
        state.offset = torch.tensor(0.3)
        state.state2 = SimpleNamespace(absmax=scales, code=torch.rand(256, generator=draw), blocksize=256)
    x = torch.randn(rows, k, generator=draw).to(dtype)
    return Case(x, packed, state, torch.randn(n, generator=draw).to(dtype))


def truth(c: Case, bias: bool = True) -> Tensor:
    """The product in fp64 with the weight as dequantized to x's dtype."""
    y = c.x.double() @ dequantize_nf4(c.packed, c.state, dtype=c.x.dtype).double().t()
    return y + c.bias.double() if bias else y


def close(y: Tensor, c: Case, bias: bool = True) -> bool:
    """Within a rounding of the dtype and of the fp32 sums."""
    size = c.x.double().abs() @ dequantize_nf4(c.packed, c.state, dtype=c.x.dtype).double().abs().t() + 1
    band = torch.finfo(y.dtype).eps * truth(c, bias).abs() + 1e-6 * size
    return bool(((y.double() - truth(c, bias)).abs() <= band).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 128), (16, 7, 41), (3, 896, 128)])
def test_the_product_on_the_cpu(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    for nested in (True, False):
        c = case(*shape, dtype, nested)
        y = nf4_matmul_small(c.x, c.packed, c.state, bias=c.bias)
        assert (y.dtype, y.shape) == (dtype, shape[:2])
        assert close(y, c)
        assert close(nf4_matmul_small(c.x, c.packed, c.state), c, bias=False)


def test_leading_dimensions_strides_and_no_rows() -> None:
    c = case(6, 16, 64)
    y = nf4_matmul_small(c.x, c.packed, c.state)
    assert torch.equal(nf4_matmul_small(c.x.view(3, 2, 64), c.packed, c.state), y.view(3, 2, 16))
    assert torch.equal(nf4_matmul_small(c.x[0], c.packed, c.state), nf4_matmul_small(c.x[:1], c.packed, c.state)[0])
    assert torch.equal(nf4_matmul_small(c.x.t().contiguous().t(), c.packed, c.state), y)
    assert nf4_matmul_small(c.x[:0], c.packed, c.state).shape == (0, 16)


def test_bitsandbytes_gives_the_same_product() -> None:
    F = pytest.importorskip("bitsandbytes.functional")
    x, w = torch.randn(3, 128), torch.randn(64, 128)
    packed, state = F.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    bias = torch.randn(64)
    ours = nf4_matmul_small(x, packed, state, bias=bias, backend="triton")
    theirs = nf4_matmul_small(x, packed, state, bias=bias, backend="bitsandbytes")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "n", "k", "processors"),
    [
        (1, 64, 256, 0),  # whole tiles, K not split
        (16, 128, 512, 132),  # whole tiles, K in four parts
        (9, 7, 40, 132),  # one tile, all edges
        (5, 70, 648, 132),  # edges, K in parts of which the last is short
    ],
)
def test_kernels_equal_the_reference(
    dtype: torch.dtype, rows: int, n: int, k: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = torch.empty
    monkeypatch.setattr(small_module.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    for nested in (True, False):
        c = case(rows, n, k, dtype, nested)
        for bias in (c.bias, None):
            y = small_module._launch(processors, c.x, read_weight(c.packed, c.state)[0], bias, n)
            assert close(y, c, bias is not None)


@pytest.mark.interpreter
def test_a_scale_that_is_not_finite_stays_in_its_row() -> None:
    """Elements behind the edges must not carry the first block's scale into other rows."""
    c = case(2, 7, 72, nested=False)
    c.state.absmax[0] = float("nan")
    y = small_module._launch(132, c.x, read_weight(c.packed, c.state)[0], None, 7)
    assert y[:, 0].isnan().all()
    assert y[:, 1:].isfinite().all()


def test_k_is_split_until_every_processor_has_three_programs() -> None:
    assert small_module._parts(4096, 4096, 132) == (8, 4)
    assert small_module._parts(128_256, 4096, 132) == (1, 32)
    assert small_module._parts(64, 128, 132) == (1, 1), "nothing to split"
    for n, k in ((512, 2048), (896, 896), (896, 4864), (14336, 4096), (7, 648)):
        parts, steps = small_module._parts(n, k, 132)
        assert parts * steps * small_module.WORDS * 8 >= k


def test_shapes_dtypes_and_gpus_that_the_kernel_supports() -> None:
    assert small_module._fits(4096, 4096, 256, torch.bfloat16, 8)
    assert not small_module._fits(4096, 4096, 256, torch.float32, 10), "TF32 on sm_100"
    assert not small_module._fits(4096, 4096, 256, torch.float16, 7), "no tensor cores on Turing"
    assert not small_module._fits(4096, 4092, 256, torch.float16, 9)
    assert not small_module._fits(4096, 4096, 258, torch.float16, 9)
    assert not small_module._fits(2**21, 2**13, 256, torch.float16, 9), "2**31 words"


def test_wrong_arguments_raise_errors_with_their_names() -> None:
    c = case(3, 16, 64)

    def refuses(message: str, x: Tensor = c.x, **more: Any) -> None:
        with pytest.raises(ValueError, match=message):
            nf4_matmul_small(x, c.packed, c.state, **more)

    refuses("x has 17 rows, this product takes 16", torch.randn(17, 64))
    refuses(r"x has shape \(3, 63\), the weight has \(16, 64\)", torch.randn(3, 63))
    refuses("x is torch.float64, this product takes", c.x.double())
    refuses("x is on meta, packed is on cpu", c.x.to("meta"))
    refuses(r"bias is \(15,\) in torch.float32 on cpu, .* need \(16,\)", bias=torch.randn(15))
    refuses(r"bias is \(16,\) in torch.float16 .* need \(16,\) in torch.float32", bias=torch.randn(16).half())
    refuses("backend is 'cuda', there are", backend="cuda")
    refuses("requires a gradient", c.x.clone().requires_grad_())
    c.state.quant_type = "fp4"
    refuses("type 'fp4'")


def test_inputs_that_require_a_gradient_are_accepted_under_no_grad() -> None:
    c = case(3, 16, 64)
    with torch.no_grad():
        nf4_matmul_small(c.x.clone().requires_grad_(), c.packed, c.state)


def test_opcheck_and_torch_compile() -> None:
    c = case(3, 16, 64)
    weight, _, _ = read_weight(c.packed, c.state)
    torch.library.opcheck(torch.ops.fastprice.nf4_matmul_small.default, (c.x, *weight, c.bias, 16))
    compiled = torch.compile(
        lambda x: nf4_matmul_small(x, c.packed, c.state, bias=c.bias), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(c.x), nf4_matmul_small(c.x, c.packed, c.state, bias=c.bias))
