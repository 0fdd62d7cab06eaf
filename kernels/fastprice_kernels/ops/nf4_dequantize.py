"""NF4 dequantisation in one launch, the nested form too.

    q         = packed[i // 2] >> 4 if i is even else packed[i // 2] & 15          for each flat element i
    scale[b]  = code2[absmax[b]] * absmax2[b // 256] + offset      nested, two roundings;   absmax[b] if plain
    w[i]      = round_to(dtype, code[q] * scale[i // blocksize])   one multiplication in fp32, one rounding

which is bit for bit what bitsandbytes computes, as long as no multiply-add is fused (`enable_fp_fusion=False`).

Floor. An element moves 0.5 bytes of codes, 1/64 byte of absmax and 4/16384 bytes of second absmax in, and its own size
out: 2.516 bytes in 16 bits. A 4096x4096 weight is 42.2 MB, 9.8 us at an H200's measured 4.3 TB/s. At that pace an SM
finishes 7.4 elements a cycle, so issue (4 x 32 lanes) would become the limit at about 17 to 19 instructions an
element; this kernel has 6.4 on sm_90 (5.6 for plain scales), of which 4.5 are the work itself: shift, mask, look-up,
multiply, half a pack. None of these times has been measured yet: see tests/gpu and benchmarks for that.

Why it is written this way:

- One thread turns one 32-bit word, eight neighbours, into one 128-bit store, and neighbouring threads take
  neighbouring words: loads and stores are both coalesced and no register changes its thread. Triton would rather load
  four words a thread and carry them across through shared memory; the `max_contiguous(..., 1)` talks it out of that.
- The sixteen values sit in shared memory, in sixteen banks: 32 lanes that look up at random never collide, one cycle
  for 32 elements. A table of 256 pairs takes half the look-ups and about six cycles for each 64 elements, since
  sixteen lanes fall at random on sixteen bank pairs (the fullest holds 3.1 of them on average, two half-warps): slower
  where look-ups, not instructions, are what the SM runs out of.
- One thread takes its eight words at stride 128, and every offset within a program is a 32-bit constant plus the
  lane's: addresses fold into the instructions. Block numbers are spelt as a broadcast, not as a division, because the
  compiler does not see through the division and computes eight addresses.
- `_dequantize_elements` is the same formula an element at a time, for whatever does not divide: odd counts, rows that
  start in the middle of a byte, unaligned views. No layer of a language model needs it.

Row-strided output (`out=` a view of a wider buffer): a word's row follows from one multiply-high by a reciprocal,
exact for the ranges that `_fits_words` admits.
"""

# mypy: disable-error-code="no-untyped-def"
# (a @triton.jit function's arguments are Triton's, not Python's)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprice_kernels.codegen.machine_code import Bars, CompileCase
from fastprice_kernels.ops._checks import DTYPES, check_out, read_state
from fastprice_kernels.reference.nf4 import nf4_reference

__all__ = ["compile_cases", "dequantize_nf4"]

WORDS = 1024  # words of one program of `_dequantize_words`; four warps, eight words a thread
ELEMENTS = 1024  # elements of one program of `_dequantize_elements`


@triton.jit
def _scales(code2, absmax2, offset, absmax_W, block2, NESTED: tl.constexpr):
    """The fp32 scales of loaded absmax values; `block2` is their block, or blocks, of second absmax."""
    scale_W = absmax_W
    if NESTED:
        scale_W = tl.load(code2 + absmax_W.to(tl.uint32)) * tl.load(absmax2 + block2) + tl.load(offset)
    return scale_W


@triton.jit
def _weights(table, word_W, scale_W, WORDS: tl.constexpr, E: tl.constexpr):
    """The fp32 weights (WORDS, E) of words of E nibbles: every step keeps a word's elements in the thread it is in."""
    q = tl.join(word_W, word_W >> 8)
    if E == 8:
        q = tl.join(word_W, word_W >> 16)
        q = tl.join(q, q >> 8)
    q = tl.join(q >> 4, q) & 15  # the even element is the high nibble
    value_WE = tl.gather(table, tl.reshape(q, WORDS * E).to(tl.int32), 0)
    return tl.reshape(value_WE, WORDS, E) * scale_W[:, None]


@triton.jit(do_not_specialize=["n_words", "row_words", "row_reciprocal", "row_gap"])
def _dequantize_words(
    packed,
    code,
    absmax,
    code2,
    absmax2,
    offset,
    out,
    n_words,
    row_words,
    row_reciprocal,
    row_stride,
    row_gap,
    BLOCK: tl.constexpr,
    BLOCK2: tl.constexpr,
    WORDS: tl.constexpr,
    E: tl.constexpr,
    NESTED: tl.constexpr,
    EVEN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """W = WORDS words of E = 8 (16 bits) or 4 (fp32) elements a program: word W, element E, flat element WE.

    Rows are `row_words` words long and `row_stride` elements apart in `out`, which leaves a gap of `row_gap` words.
    """
    BLOCKS: tl.constexpr = WORDS * E // BLOCK
    program = tl.program_id(0).to(tl.int64)
    first = program * WORDS
    word_W = tl.max_contiguous(tl.arange(0, WORDS), 1)
    element_WE = tl.arange(0, WORDS * E)
    block_W = tl.reshape(tl.broadcast_to(tl.arange(0, BLOCKS)[:, None], (BLOCKS, BLOCK // E)), WORDS)
    if EVEN:
        mask_W = None
        mask_WE = None
    else:
        left = tl.minimum(n_words - first, WORDS).to(tl.int32)
        mask_W = word_W < left
        mask_WE = element_WE < left * E

    words = packed.to(tl.pointer_type(tl.uint32 if E == 8 else tl.uint16), bitcast=True)
    word = tl.load(words + first + word_W, mask=mask_W).to(tl.uint32)
    absmax_W = tl.load(absmax + program * BLOCKS + block_W, mask=mask_W)
    scale_W = _scales(code2, absmax2, offset, absmax_W, program * BLOCKS // BLOCK2, NESTED)
    table = tl.load(code + tl.arange(0, 16))
    w_WE = tl.reshape(_weights(table, word, scale_W, WORDS, E), WORDS * E).to(out.dtype.element_ty)

    if CONTIGUOUS:
        tl.store(out + first * E + element_WE, w_WE, mask=mask_WE)
    else:
        row = first.to(tl.uint32) // row_words.to(tl.uint32)
        column = (first.to(tl.uint32) - row * row_words.to(tl.uint32)).to(tl.int32)
        in_row_W = column + tl.arange(0, WORDS)
        down_W = tl.umulhi(in_row_W, row_reciprocal)  # in_row_W // row_words
        shift_W = (in_row_W + down_W * row_gap) * E
        shift_WE = tl.reshape(shift_W[:, None] + tl.arange(0, E)[None, :], WORDS * E)
        shift_WE = tl.max_contiguous(tl.multiple_of(shift_WE, E), E)
        row_start = tl.multiple_of(row.to(tl.int64) * row_stride, E)
        tl.store(out + row_start + shift_WE, w_WE, mask=mask_WE)


@triton.jit
def _dequantize_elements(
    packed,
    code,
    absmax,
    code2,
    absmax2,
    offset,
    out,
    columns,
    chunks,
    row_stride,
    BLOCK: tl.constexpr,
    BLOCK2: tl.constexpr,
    ELEMENTS: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Up to ELEMENTS elements of one row a program, `chunks` programs a row, whatever the sizes and alignment."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = column < columns
    # Unsigned, so that the divisions below are shifts; masked-off elements would look behind the ends.
    element = tl.where(mask, row * columns + column, 0).to(tl.uint64)
    byte = tl.load(packed + element // 2).to(tl.int32)
    q = tl.where(element % 2 == 0, byte >> 4, byte & 15)
    block = element // BLOCK
    scale = _scales(code2, absmax2, offset, tl.load(absmax + block), block // BLOCK2, NESTED)
    w = (tl.load(code + q) * scale).to(out.dtype.element_ty)
    tl.store(out + row * row_stride + column, w, mask=mask)


def _fits_words(
    rows: int, columns: int, row_stride: int, per_word: int, nested_span: int | None, packed_address: int
) -> bool:
    """Whether `_dequantize_words` can write a weight (rows, columns) with rows `row_stride` elements apart.

    A word must not straddle the end, nor two rows that are apart; one second absmax (of `nested_span` elements, None
    for plain scales) must serve a program; words are read aligned; and the 32-bit arithmetic on rows must be exact.
    """
    per_program = WORDS * per_word
    if rows * columns % per_word or packed_address % 4 or (nested_span is not None and nested_span % per_program):
        return False
    if row_stride == columns:
        return True
    if columns % per_word or row_stride % per_word:
        return False
    row_words, gap = columns // per_word, (row_stride - columns) // per_word
    farthest = row_words + WORDS + (WORDS // row_words + 2) * gap
    # in_row < row_words + WORDS, and the reciprocal is exact below 2**32 / row_words.
    return 4 <= row_words < 2**15 and rows * row_words < 2**31 and farthest * per_word < 2**31


def _launch(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    blocksize2: int,
    out: Tensor,
) -> None:
    """Fills `out` (N, K), rows contiguous, from checked arguments, with the faster kernel that fits."""
    rows, columns = out.shape
    elements = rows * columns
    if elements == 0:
        return
    tensors = (packed, code, absmax, code2, absmax2, offset, out)
    nested = code2 is not None
    row_stride = out.stride(0) if rows > 1 else columns
    per_word = 4 if out.dtype == torch.float32 else 8
    common = {"BLOCK": blocksize, "BLOCK2": blocksize2, "NESTED": nested, "num_warps": 4, "enable_fp_fusion": False}
    span = blocksize * blocksize2 if nested else None
    if _fits_words(rows, columns, row_stride, per_word, span, packed.data_ptr()):
        words, row_words, contiguous = elements // per_word, columns // per_word, row_stride == columns
        rows_apart = (0, 0, 0, 0)
        if not contiguous:
            rows_apart = (row_words, -(-(2**32) // row_words), row_stride, (row_stride - columns) // per_word)
        _dequantize_words[(-(-words // WORDS),)](
            *tensors,
            words,
            *rows_apart,
            WORDS=WORDS,
            E=per_word,
            EVEN=words % WORDS == 0,
            CONTIGUOUS=contiguous,
            **common,
        )
    else:
        chunks = -(-columns // ELEMENTS)
        _dequantize_elements[(rows * chunks,)](*tensors, columns, chunks, row_stride, ELEMENTS=ELEMENTS, **common)


# A `torch.library.custom_op` costs 96 us a call here, a plain definition 7: small models are bound by such costs.
_library = torch.library.Library("fastprice", "FRAGMENT")
_library.define(
    "dequantize_nf4(Tensor packed, Tensor code, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, "
    "int blocksize, int blocksize2, Tensor(a!) out) -> ()"
)


@torch.library.impl(_library, "dequantize_nf4", "CUDA")
def _on_cuda(packed: Tensor, *arguments: Any) -> None:
    with torch.cuda.device(packed.device):  # Triton launches on the current device
        _launch(packed, *arguments)


@torch.library.impl(_library, "dequantize_nf4", "CPU")
def _on_cpu(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    blocksize2: int,
    out: Tensor,
) -> None:
    shape = (out.shape[0], out.shape[1])
    w_NK = nf4_reference(packed, code, absmax, code2, absmax2, offset, blocksize, blocksize2, shape, out.dtype)
    out.copy_(w_NK)


@torch.library.register_fake("fastprice::dequantize_nf4", lib=_library)
def _fake(*arguments: Any) -> None:
    """Writes into `out` and returns nothing: there is no shape to work out."""


def dequantize_nf4(
    packed: Tensor, quant_state: Any, *, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The weight (N, K) of an NF4 tensor of bitsandbytes, bit for bit as bitsandbytes gives it.

    Args:
        packed: uint8, ceil(N * K / 2) bytes in bitsandbytes' order, whatever their shape, on CUDA (one Triton launch)
            or on the CPU (plain PyTorch).
        quant_state: bitsandbytes' `QuantState`, or anything with its attributes; plain or nested.
        out: (N, K) to write into, rows contiguous; it may be a view of a buffer with more columns.
        dtype: fp32, fp16 or bf16; by default that of `out`, else that of the quant state.

    Returns:
        `out`, or a new contiguous tensor.

    Raises:
        ValueError: the state is not NF4, or packed, state, out and dtype do not fit together.
    """
    state = read_state(packed, quant_state)
    if dtype is None:
        dtype = state.dtype if out is None else out.dtype
    if dtype not in DTYPES:
        raise ValueError(f"a weight in {dtype} is asked for, this kernel writes {', '.join(map(str, DTYPES))}")
    if out is None:
        out = torch.empty((state.n, state.k), dtype=dtype, device=packed.device)
    else:
        check_out(out, (state.n, state.k), dtype, packed.device)
    torch.ops.fastprice.dequantize_nf4.default(
        packed.contiguous(),
        state.code,
        state.absmax,
        state.code2,
        state.absmax2,
        state.offset,
        state.blocksize,
        state.blocksize2,
        out,
    )
    return out


# A word of fp32 holds four elements, so addresses and masks weigh twice as much as in 16 bits.
_FP32_EXCEPTION = (
    "at most 12 instructions an element in place of 8: fp32 moves 4.5 bytes an element, at an H200's 4.3 TB/s 4.1 "
    "elements a cycle and SM, so memory stays the limit up to 31"
)


def compile_cases() -> list[CompileCase]:
    """Every way the two kernels are launched, with the bars of the word kernel.

    8 instructions an output element on sm_90 hold in 16 bits in every form and in fp32 in whole programs of 4,096
    elements. fp32 with a masked tail or with rows apart is an exception, see `_FP32_EXCEPTION`.
    """
    cases = []
    for type_, per_word in (("bf16", 8), ("fp16", 8), ("fp32", 4)):
        for nested in (True, False):
            for form in ("even", "tail", "rows apart", "odd") if nested else ("even", "rows apart"):
                by_words = form != "odd"
                excepted = type_ == "fp32" and form in ("tail", "rows apart")
                pointers = ["packed", "code", "absmax", "out", *(["code2", "absmax2", "offset"] if nested else [])]
                constexprs: dict[str, Any] = {"BLOCK": 64, "BLOCK2": 256 if nested else 1, "NESTED": nested}
                if not nested:
                    constexprs |= {"code2": None, "absmax2": None, "offset": None}
                if by_words:
                    constexprs |= {"WORDS": WORDS, "E": per_word}
                    constexprs |= {"EVEN": form != "tail", "CONTIGUOUS": form != "rows apart"}
                    numbers = {"n_words": "i32", "row_words": "i32", "row_reciprocal": "i32", "row_gap": "i32"}
                else:
                    constexprs |= {"ELEMENTS": ELEMENTS}
                    numbers = {"columns": "i32", "chunks": "i32"}
                types = {"packed": "*u8", "absmax": "*u8" if nested else "*fp32", "out": f"*{type_}"}
                cases.append(
                    CompileCase(
                        name=f"dequantize_nf4/{type_}/{'nested' if nested else 'plain'}/{form}",
                        fn=_dequantize_words if by_words else _dequantize_elements,
                        signature={p: types.get(p, "*fp32") for p in pointers} | numbers | {"row_stride": "i32"},
                        constexprs=constexprs,
                        aligned=("packed", "out") if by_words else (),
                        enable_fp_fusion=False,
                        elements=WORDS * per_word if by_words else ELEMENTS,
                        bars=Bars(
                            store_bits=128 if by_words else None,
                            shared_stores=1 if by_words else 0,  # the table of sixteen values
                            fma=False,
                            instructions_per_element={90: 12.0 if excepted else 8.0} if by_words else {},
                            exception=_FP32_EXCEPTION if excepted else "",
                        ),
                    )
                )
    return cases
