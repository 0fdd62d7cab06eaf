"""dequantize_nf4: bit-equality with bitsandbytes, the kernel bodies in the interpreter, arguments, and the op."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprice_kernels.ops import nf4_dequantize
from fastprice_kernels.ops.nf4_dequantize import dequantize_nf4
from fastprice_kernels.ops.nf4_weight import read_weight

F = pytest.importorskip("bitsandbytes.functional")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


@dataclass(frozen=True)
class State:
    """A quant state of our own, with what the kernels read of bitsandbytes' one."""

    absmax: Tensor
    code: Tensor
    shape: Any
    dtype: Any = torch.float32
    blocksize: int = 64
    quant_type: str = "nf4"
    offset: Any = None
    state2: Any = None


def quantized(shape: tuple[int, int], dtype: torch.dtype, blocksize: int = 64, nested: bool = True, seed: int = 0):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return F.quantize_4bit(w, blocksize=blocksize, quant_type="nf4", compress_statistics=nested)


def random_state(
    shape: tuple[int, int], blocksize: int = 64, nested: bool = True, seed: int = 0
) -> tuple[Tensor, State]:
    """Random bytes and scales: every count of elements, without bitsandbytes' slow way through odd ones."""
    draw = torch.Generator().manual_seed(seed)
    blocks = -(-shape[0] * shape[1] // blocksize)
    packed = torch.randint(256, (-(-shape[0] * shape[1] // 2), 1), generator=draw, dtype=torch.uint8)
    code = F.get_4bit_type("nf4", device="cpu")
    if not nested:
        return packed, State(torch.rand(blocks, generator=draw), code, shape, blocksize=blocksize)
    code2 = torch.rand(256, generator=draw).sort().values
    state2 = State(torch.rand(-(-blocks // 256), generator=draw) + 1, code2, None, blocksize=256)
    absmax = torch.randint(256, (blocks,), generator=draw, dtype=torch.uint8)
    return packed, State(absmax, code, shape, blocksize=blocksize, offset=torch.tensor(0.0937), state2=state2)


def every_byte_and_scale(blocksize: int = 512) -> tuple[Tensor, State]:
    """All 256 bytes under all 256 codes of a nested scale: 256 blocks that hold every byte each."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(256).view(-1, 1)
    _, inner = F.quantize_blockwise(torch.rand(256), blocksize=256)
    state2 = State(absmax=torch.tensor([0.7311]), code=inner.code, shape=None, blocksize=256)
    absmax = torch.arange(256, dtype=torch.uint8)
    code = F.get_4bit_type("nf4", device="cpu")
    return packed, State(absmax, code, (256, 512), blocksize=blocksize, offset=torch.tensor(0.0937), state2=state2)


def as_bitsandbytes(state: State) -> Any:
    inner = F.QuantState(absmax=state.state2.absmax, code=state.state2.code, blocksize=256, dtype=torch.float32)
    return F.QuantState(
        absmax=state.absmax,
        shape=torch.Size(state.shape),
        code=state.code,
        blocksize=state.blocksize,
        quant_type="nf4",
        dtype=state.dtype,
        offset=state.offset,
        state2=inner,
    )


def launch(packed: Tensor, quant_state: Any, out: Tensor) -> None:
    """The Triton kernels on CPU tensors; only in the interpreter."""
    nf4_dequantize._launch(read_weight(packed, quant_state)[0], out)


def poisoned(shape: tuple[int, int], extra: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A buffer of NaN with `extra` columns, and the view of the others."""
    buffer = torch.full((shape[0], shape[1] + extra), float("nan"), dtype=dtype)
    return buffer, buffer[:, : shape[1]]


def truncated(w: Tensor) -> Tensor:
    """fp32 -> bf16 as the interpreter does it, by dropping bits instead of rounding (triton 3.6)."""
    return (w.float().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


# --- CPU: the reference against bitsandbytes ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_under_every_scale_equals_bitsandbytes(dtype: torch.dtype) -> None:
    packed, state = every_byte_and_scale()
    state = replace(state, dtype=dtype)
    expected = F.dequantize_4bit(packed, as_bitsandbytes(state))
    assert torch.equal(dequantize_nf4(packed, state), expected)
    assert torch.equal(dequantize_nf4(packed, as_bitsandbytes(state)), expected)


@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
@pytest.mark.parametrize("nested", [True, False])
def test_random_weights_equal_bitsandbytes(blocksize: int, nested: bool) -> None:
    for dtype in DTYPES:
        packed, state = quantized((48, 1024), dtype, blocksize, nested)
        w = dequantize_nf4(packed, state)
        assert w.dtype == dtype
        assert torch.equal(w, F.dequantize_4bit(packed, state))


def test_a_fused_multiply_add_would_differ() -> None:
    """The case above can fail: nested scales rounded once instead of twice have other bits."""
    packed, state = every_byte_and_scale()
    fused = state.state2.code.double() * state.state2.absmax.double() + state.offset.double()
    plain = replace(state, absmax=fused.float(), state2=None, offset=None)
    assert not torch.equal(dequantize_nf4(packed, plain), dequantize_nf4(packed, state))


@pytest.mark.parametrize("shape", [(9, 7), (1, 41), (5, 129)])
def test_counts_that_fill_no_block_equal_bitsandbytes(shape: tuple[int, int]) -> None:
    # bitsandbytes compiles its fallback for odd sizes with Inductor, for a minute.
    with torch.compiler.set_stance("force_eager"):
        packed, state = quantized(shape, torch.float32)
        assert torch.equal(dequantize_nf4(packed, state), F.dequantize_4bit(packed, state))


def test_out_is_written_and_returned_and_dtype_may_differ_from_the_state() -> None:
    packed, state = quantized((16, 64), torch.float32)
    buffer, out = poisoned((16, 64), 8, torch.float16)
    assert dequantize_nf4(packed, state, out=out) is out
    assert torch.equal(out, dequantize_nf4(packed, state, dtype=torch.float16))
    assert torch.equal(out, dequantize_nf4(packed, state).half())
    assert buffer[:, 64:].isnan().all()


def test_packed_may_have_any_shape_and_strides() -> None:
    packed, state = quantized((16, 64), torch.float32)
    spread = torch.zeros(512, 2, dtype=torch.uint8)
    spread[:, 0] = packed.view(-1)
    for same in (packed.t(), packed.view(16, 32), spread[:, 0]):
        assert torch.equal(dequantize_nf4(same, state), dequantize_nf4(packed, state))
        assert read_weight(same, state)[0].packed.is_contiguous(), "the kernels take no strides"


def test_an_empty_weight() -> None:
    code = F.get_4bit_type("nf4", device="cpu")
    state = State(torch.empty(0), code, (0, 64))
    assert dequantize_nf4(torch.empty(0, 1, dtype=torch.uint8), state).shape == (0, 64)


# --- The kernel bodies, interpreted ---------------------------------------------------------------------------------

# Whole programs of words, a tail, a word only, bytes shared by rows, columns that are no whole words.
SHAPES = [(16, 512), (33, 520), (96, 200), (1, 8), (9, 7), (7, 41), (3, 1030)]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra", [0, 3, 16])
def test_kernels_equal_the_reference(dtype: torch.dtype, extra: int) -> None:
    for shape in SHAPES:
        for nested in (True, False):
            packed, state = random_state(shape, nested=nested)
            buffer, out = poisoned(shape, extra, dtype)
            launch(packed, state, out)
            expected = dequantize_nf4(packed, state, dtype=dtype)
            if dtype == torch.bfloat16:
                expected = truncated(dequantize_nf4(packed, state, dtype=torch.float32))
            assert torch.equal(out, expected), (shape, nested)
            assert buffer[:, shape[1] :].isnan().all(), "wrote outside its columns"


@pytest.mark.interpreter
@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
def test_kernels_with_every_block_size(blocksize: int) -> None:
    for shape in ((64, 520), (7, 1171)):
        for nested in (True, False):
            packed, state = random_state(shape, blocksize, nested)
            _, out = poisoned(shape, 0, torch.float32)
            launch(packed, state, out)
            assert torch.equal(out, dequantize_nf4(packed, state))


@pytest.mark.interpreter
def test_kernel_on_every_byte_under_every_scale() -> None:
    packed, state = every_byte_and_scale()
    for dtype in (torch.float32, torch.float16):
        _, out = poisoned((256, 512), 0, dtype)
        launch(packed, state, out)
        assert torch.equal(out, dequantize_nf4(packed, state, dtype=dtype))


@pytest.mark.interpreter
def test_a_weight_with_several_second_scales() -> None:
    """More than one block of 256 scales, also where a program's share of them is not a divisor of the block."""
    packed, state = random_state((80, 520))
    assert state.state2.absmax.numel() == 3
    _, out = poisoned((80, 520), 0, torch.float32)
    launch(packed, state, out)
    assert torch.equal(out, dequantize_nf4(packed, state))

    state = replace(state, state2=replace(state.state2, blocksize=100, absmax=torch.rand(7)))
    _, out = poisoned((80, 520), 0, torch.float32)
    launch(packed, state, out)
    assert torch.equal(out, dequantize_nf4(packed, state))


@pytest.mark.interpreter
def test_unaligned_packed_bytes() -> None:
    packed, state = quantized((16, 64), torch.float32)
    shifted = torch.cat((torch.zeros(1, 1, dtype=torch.uint8), packed))[1:]
    assert shifted.data_ptr() % 4
    _, out = poisoned((16, 64), 0, torch.float32)
    launch(shifted, state, out)
    assert torch.equal(out, dequantize_nf4(packed, state))


# --- Which kernel, and whether its 32-bit arithmetic is exact -------------------------------------------------------


@pytest.mark.parametrize("row_words", [4, 5, 7, 112, 333, 1000, 2048, 7168, 28672, 2**15 - 1])
def test_the_reciprocal_gives_the_row(row_words: int) -> None:
    """floor(in_row * ceil(2^32 / row_words) / 2^32) is in_row // row_words, for every place a program can hold."""
    in_row = torch.arange(row_words + nf4_dequantize.WORDS, dtype=torch.int64)
    assert torch.equal((in_row * -(-(2**32) // row_words)) >> 32, in_row // row_words)


def test_shapes_and_alignments_that_the_word_kernel_supports() -> None:
    layers = [(512, 2048), (8192, 2048), (3072, 8192), (14336, 4096), (896, 896), (128, 896), (28672, 8192)]
    for rows, columns in layers:
        for gap in (0, 16, 64):
            assert nf4_dequantize._fits_words(rows, columns, columns + gap, 8, 64 * 256, 256)
    fits = nf4_dequantize._fits_words
    assert fits(70_000, 65_536, 65_536, 8, 64 * 256, 0), "4.6e9 elements: contiguous offsets are 64-bit"
    assert fits(70_000, 65_536, 65_552, 8, 64 * 256, 0)
    assert not fits(300_000, 65_536, 65_552, 8, 64 * 256, 0), "words beyond 2**31 in rows apart"
    assert not fits(4, 4096, 2**30, 8, 64 * 256, 0), "the gap itself overflows within a program"
    assert not fits(4, 4096, 4096, 8, 64 * 256, 2), "bytes unaligned"
    assert not fits(5, 7, 7, 8, 64 * 256, 0)
    assert not fits(4, 4096, 4099, 8, 64 * 256, 0)
    assert not fits(4, 4096, 4096, 8, 64 * 100, 0), "a program would need two second scales"


# --- Wrong arguments ------------------------------------------------------------------------------------------------


def _wrong_arguments() -> list[tuple[str, dict[str, Any], dict[str, Any], str]]:
    """(what, changes to the state, arguments, the message)."""
    return [
        ("fp4", {"quant_type": "fp4"}, {}, "type 'fp4', this kernel reads 'nf4'"),
        ("block size", {"blocksize": 48}, {}, "blocks of 48, bitsandbytes makes"),
        ("state dtype", {"dtype": torch.float64}, {}, "weight in torch.float64, this kernel writes"),
        ("shape", {"shape": (4, 4, 64)}, {}, "two dimensions"),
        ("other shape", {"shape": (16, 65)}, {}, r"packed has 512 elements, .*\(16, 65\) needs 520"),
        ("absmax size", {"absmax": torch.ones(3)}, {}, "absmax has 3 elements, .* needs 16"),
        ("absmax dtype", {"absmax": torch.ones(16).half()}, {}, "absmax is torch.float16, .* needs torch.float32"),
        ("code", {"code": torch.ones(256)}, {}, "code has 256 elements, NF4 needs 16"),
        ("offset missing", {"state2": State(torch.ones(1), torch.ones(256), None, blocksize=256)}, {}, "absmax is"),
        ("packed dtype", {}, {"packed": torch.zeros(512)}, "packed is torch.float32, .* needs torch.uint8"),
        ("dtype", {}, {"dtype": torch.int8}, "in torch.int8 is requested, this kernel writes"),
        ("out shape", {}, {"out": torch.empty(16, 63)}, r"out has shape \(16, 63\), the weight has \(16, 64\)"),
        (
            "out dtype",
            {},
            {"out": torch.empty(16, 64), "dtype": torch.float16},
            "out is torch.float32, .*torch.float16",
        ),
        ("out device", {}, {"out": torch.empty(16, 64, device="meta")}, "out is on meta, packed is on cpu"),
        ("out strides", {}, {"out": torch.empty(64, 16).t()}, r"strides \(1, 16\)"),
        ("out overlaps", {}, {"out": torch.empty(64).expand(16, 64)}, r"strides \(0, 1\)"),
    ]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [case[1:] for case in _wrong_arguments()],
    ids=[c[0] for c in _wrong_arguments()],
)
def test_wrong_arguments_raise_errors_with_their_names(
    changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    packed, state = quantized((16, 64), torch.float32, nested=False)
    ours = State(state.absmax, state.code, tuple(state.shape))
    arguments = dict(arguments)
    with pytest.raises(ValueError, match=message):
        dequantize_nf4(arguments.pop("packed", packed), replace(ours, **changes), **arguments)


def test_wrong_nested_states_raise_errors_with_their_names() -> None:
    packed, state = every_byte_and_scale()
    with pytest.raises(ValueError, match=r"offset is NoneType, nested scales needs a torch.float32 tensor"):
        dequantize_nf4(packed, replace(state, offset=None))
    with pytest.raises(ValueError, match=r"nested absmax is torch.float32, .* needs torch.uint8"):
        dequantize_nf4(packed, replace(state, absmax=torch.ones(256)))
    with pytest.raises(ValueError, match=r"nested absmax has strides \(2,\), a contiguous tensor is read"):
        dequantize_nf4(packed, replace(state, absmax=state.absmax.repeat_interleave(2)[::2]))
    with pytest.raises(ValueError, match=r"state2.absmax has 2 elements, 256 scales in blocks of 256 needs 1"):
        dequantize_nf4(packed, replace(state, state2=replace(state.state2, absmax=torch.ones(2))))


def test_a_weight_that_bitsandbytes_repacked_for_its_cpu_inference_is_refused() -> None:
    packed, state = quantized((16, 64), torch.float32)
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked by bitsandbytes"):
        dequantize_nf4(packed, state)


# --- The op ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [True, False])
def test_opcheck(nested: bool) -> None:
    packed, state = quantized((16, 64), torch.float32, nested=nested)
    weight, _, _ = read_weight(packed, state)
    torch.library.opcheck(torch.ops.fastprice.dequantize_nf4.default, (*weight, torch.empty(16, 64)))


def test_torch_compile_has_no_graph_break() -> None:
    packed, state = quantized((16, 64), torch.float32)

    def product(x: Tensor, packed: Tensor, buffer: Tensor) -> Tensor:
        w = dequantize_nf4(packed, state)
        return x @ dequantize_nf4(packed, state, out=buffer[:, :64]).t() + x @ w.t()

    x, expected_buffer, buffer = torch.randn(3, 64), torch.zeros(16, 72), torch.zeros(16, 72)
    expected = product(x, packed, expected_buffer)
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, packed, buffer), expected)
    assert torch.equal(buffer, expected_buffer)


def test_fake_tensors_take_no_memory_beyond_the_weight() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed, state = quantized((16, 64), torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        w = dequantize_nf4(packed, state)
    assert (w.shape, w.dtype) == ((16, 64), torch.bfloat16)
