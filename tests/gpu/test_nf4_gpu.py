"""NF4 kernels on a GPU, against bitsandbytes' CUDA kernels. Never run yet where this was written: there was no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastprice_kernels import dequantize_nf4, nf4_matmul_small
from fastprice_kernels.ops import nf4_matmul_small as small_module
from fastprice_kernels.ops.nf4_weight import read_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Every linear layer (out, in) of the models named, once each.
LAYERS = {
    "Llama-3.2-1B": [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)],
    "Llama-3.2-3B": [(3072, 3072), (1024, 3072), (8192, 3072), (3072, 8192)],
    "Llama-3.1-8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "Qwen2.5-0.5B": [(896, 896), (128, 896), (4864, 896), (896, 4864)],
    "Qwen2.5-7B": [(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)],
    "Llama-3.1-70B": [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)],
}
SHAPES = [shape for shapes in LAYERS.values() for shape in shapes]
ODD_SHAPES = [(9, 7), (7, 41), (1, 8), (33, 520), (3, 1030), (1, 4099)]


def bitsandbytes_functional() -> Any:
    return pytest.importorskip("bitsandbytes.functional")


def quantized(
    shape: tuple[int, int], dtype: torch.dtype, blocksize: int = 64, nested: bool = True
) -> tuple[Tensor, Any]:
    torch.manual_seed(shape[0] + shape[1])
    w = torch.randn(shape, device="cuda", dtype=dtype)
    packed, state = bitsandbytes_functional().quantize_4bit(
        w, blocksize=blocksize, quant_type="nf4", compress_statistics=nested
    )
    return packed, state


def poisoned(shape: tuple[int, int], extra: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    buffer = torch.full((shape[0], shape[1] + extra), float("nan"), device="cuda", dtype=dtype)
    return buffer, buffer[:, : shape[1]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nested", [True, False])
def test_every_layer_equals_bitsandbytes(shape: tuple[int, int], nested: bool) -> None:
    F = bitsandbytes_functional()
    for dtype in DTYPES:
        packed, state = quantized(shape, dtype, nested=nested)
        _, out = poisoned(shape, 0, dtype)
        dequantize_nf4(packed, state, out=out)
        assert torch.equal(out, F.dequantize_4bit(packed, state)), dtype


@pytest.mark.parametrize("extra", [3, 16, 64])
@pytest.mark.parametrize("shape", [(2048, 2048), (896, 896), (4864, 896), (4096, 14336), *ODD_SHAPES], ids=str)
def test_rows_apart_equal_rows_together(shape: tuple[int, int], extra: int) -> None:
    for dtype in DTYPES:
        for nested in (True, False):
            packed, state = quantized(shape, dtype, nested=nested)
            buffer, out = poisoned(shape, extra, dtype)
            dequantize_nf4(packed, state, out=out)
            assert torch.equal(out, dequantize_nf4(packed, state))
            assert buffer[:, shape[1] :].isnan().all(), "wrote outside its columns"


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_counts_that_fill_no_block_equal_the_cpu(shape: tuple[int, int]) -> None:
    for dtype in DTYPES:
        for nested in (True, False):
            packed, state = quantized(shape, dtype, nested=nested)
            w = dequantize_nf4(packed, state)
            state.to("cpu")
            assert torch.equal(w.cpu(), dequantize_nf4(packed.cpu(), state))


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_block_size_equals_bitsandbytes(blocksize: int) -> None:
    F = bitsandbytes_functional()
    for dtype in DTYPES:
        for nested in (True, False):
            packed, state = quantized((1000, 1032), dtype, blocksize, nested)
            assert torch.equal(dequantize_nf4(packed, state), F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_under_every_scale_equals_the_cpu(dtype: torch.dtype) -> None:
    """256 blocks that hold every byte each, under the 256 codes of a nested scale."""
    _, state = quantized((256, 512), dtype, blocksize=512)
    packed = torch.arange(256, dtype=torch.uint8).repeat(256).view(-1, 1)
    state.absmax = torch.arange(256, dtype=torch.uint8, device="cuda")
    w = dequantize_nf4(packed.cuda(), state)
    assert torch.equal(w, bitsandbytes_functional().dequantize_4bit(packed.cuda(), state))
    state.to("cpu")
    assert torch.equal(w.cpu(), dequantize_nf4(packed, state))


@pytest.mark.slow
@pytest.mark.parametrize("extra", [0, 16])
def test_more_than_2_31_elements(extra: int) -> None:
    """The last rows lie behind element 2**31: their bytes, scales and places are beyond 32 bits."""
    rows, columns = 2**31 // 8192 + 64, 8192
    need = rows * columns // 2 + rows * (columns + extra) * 2
    if torch.cuda.mem_get_info()[0] < need * 1.2:
        pytest.skip(f"needs {need * 1.2 / 2**30:.0f} GiB of free GPU memory")
    tail, state = quantized((64, columns), torch.bfloat16)
    packed = torch.zeros(rows * columns // 2, 1, device="cuda", dtype=torch.uint8)
    packed[-tail.numel() :] = tail
    expected = dequantize_nf4(tail, state)
    blocks, blocks2 = rows * columns // 64, rows * columns // (64 * 256)
    absmax = torch.zeros(blocks, device="cuda", dtype=torch.uint8)
    absmax[-state.absmax.numel() :] = state.absmax
    absmax2 = torch.zeros(blocks2, device="cuda")
    absmax2[-state.state2.absmax.numel() :] = state.state2.absmax
    state.absmax, state.state2.absmax, state.shape = absmax, absmax2, torch.Size((rows, columns))
    _, out = poisoned((rows, columns), extra, torch.bfloat16)
    dequantize_nf4(packed, state, out=out)
    assert torch.equal(out[-64:], expected)
    assert not out[:64].isnan().any()


def test_one_launch() -> None:
    packed, state = quantized((1024, 1024), torch.bfloat16)
    out = torch.empty(1024, 1024, device="cuda", dtype=torch.bfloat16)
    dequantize_nf4(packed, state, out=out)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        dequantize_nf4(packed, state, out=out)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels
    assert "_dequantize_words" in kernels[0]


def test_opcheck_and_torch_compile() -> None:
    packed, state = quantized((64, 128), torch.bfloat16)
    weight, _, _ = read_weight(packed, state)
    out = torch.empty(64, 128, device="cuda", dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.fastprice.dequantize_nf4.default, (*weight, out))
    compiled = torch.compile(lambda packed: dequantize_nf4(packed, state) * 2, fullgraph=True)
    assert torch.equal(compiled(packed), dequantize_nf4(packed, state) * 2)


@pytest.mark.parametrize("shape", [(4096, 4096), (512, 2048), (896, 896), (14336, 4096), (1000, 648), (7, 40)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_the_small_product_equals_the_weight_times_x(rows: int, shape: tuple[int, int]) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for nested in (True, False):
            packed, state = quantized(shape, dtype, nested=nested)
            x = torch.randn(rows, shape[1], device="cuda", dtype=dtype)
            bias = torch.randn(shape[0], device="cuda", dtype=dtype)
            w = dequantize_nf4(packed, state).double()
            for b in (None, bias):
                y = nf4_matmul_small(x, packed, state, bias=b, backend="triton")
                expected = x.double() @ w.t() + (0 if b is None else b.double())
                # One rounding to the dtype, and fp32 sums of the products' sizes.
                band = torch.finfo(dtype).eps * expected.abs() + 1e-5 * (x.double().abs() @ w.abs().t() + 1)
                assert ((y.double() - expected).abs() <= band).all()
                assert torch.equal(y, nf4_matmul_small(x, packed, state, bias=b, backend="triton")), "not repeatable"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_small_product_by_any_backend(dtype: torch.dtype) -> None:
    packed, state = quantized((512, 2048), dtype)
    x = torch.randn(4, 2048, device="cuda", dtype=dtype)
    expected = x.double() @ dequantize_nf4(packed, state).double().t()
    for backend in ("auto", "triton", "bitsandbytes"):
        y = nf4_matmul_small(x, packed, state, backend=backend)
        # bitsandbytes may use TF32 or sum in another order.
        torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=0.5 if dtype == torch.bfloat16 else 0.1)


def test_k_is_split_on_this_gpu() -> None:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert small_module._parts(512, 2048, processors)[0] > 1, "the shapes above exercise the sum of parts"
