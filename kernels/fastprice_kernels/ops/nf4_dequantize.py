"""NF4 weights dequantized in one launch, plain and nested scales.

    q         = packed[i // 2] >> 4 if i is even else packed[i // 2] & 15          for each flat element i
    scale[b]  = code2[absmax[b]] * absmax2[b // 256] + offset      nested, rounded twice;   absmax[b] if plain
    w[i]      = round_to(dtype, code[q] * scale[i // blocksize])   one multiplication in fp32, one rounding

That is bit for bit what bitsandbytes computes on a GPU, as long as no multiply-add is fused (`enable_fp_fusion=False`).

Bytes to move: 0.516 read for an element (half a byte of codes, 1/64 of absmax, 4/16384 of second absmax) and its own
size written: 2.516 in 16 bits, 42.2 MB for a 4096 x 4096 weight. `_dequantize_words` issues 6.4 instructions for an
element on sm_90. Why it is written as it is, and what was tried: docs/explanation/kernels.md.

Shapes: N rows and K columns of a weight; W words of a program, E elements of a word, WE = W * E.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprice_kernels.codegen.machine_code import CompileCase, Requirements
from fastprice_kernels.ops._launching import launch
from fastprice_kernels.ops._library import define_op
from fastprice_kernels.ops.nf4_weight import DTYPES, SCHEMA, NF4Weight, check_out, read_weight
from fastprice_kernels.reference import nf4 as reference

__all__ = ["compile_cases", "dequantize_nf4"]

WORDS = 1024  # words of one program of `_dequantize_words`; four warps, eight words a thread
ELEMENTS = 1024  # elements of one program of `_dequantize_elements`


@triton.jit
def nf4_scales(
    code2: tl.tensor,
    absmax2: tl.tensor,
    offset: tl.tensor,
    absmax_W: tl.tensor,
    block2: tl.tensor,
    NESTED: tl.constexpr,
) -> tl.tensor:
    """The fp32 scales of loaded absmax values; `block2` is the index, or indices, of their second absmax."""
    scale_W = absmax_W
    if NESTED:
        scale_W = tl.load(code2 + absmax_W.to(tl.uint32)) * tl.load(absmax2 + block2) + tl.load(offset)
    return scale_W


@triton.jit
def unpack_words(
    table: tl.tensor, word_W: tl.tensor, scale_W: tl.tensor, WORDS: tl.constexpr, E: tl.constexpr
) -> tl.tensor:
    """The fp32 weights (WORDS, E) of words of E nibbles, each word's elements in the thread that loaded it."""
    q = tl.join(word_W, word_W >> 8)
    if E == 8:
        q = tl.join(word_W, word_W >> 16)
        q = tl.join(q, q >> 8)
    q = tl.join(q >> 4, q) & 15  # the even element is the high nibble
    value_WE = tl.gather(table, tl.reshape(q, WORDS * E).to(tl.int32), 0)
    return tl.reshape(value_WE, WORDS, E) * scale_W[:, None]


@triton.jit(do_not_specialize=["n_words", "row_words", "row_reciprocal", "row_gap"])
def _dequantize_words(
    packed: tl.tensor, code: tl.tensor, absmax: tl.tensor, code2: tl.tensor, absmax2: tl.tensor, offset: tl.tensor,
    out: tl.tensor, n_words: tl.tensor, row_words: tl.tensor, row_reciprocal: tl.tensor, row_stride: tl.tensor,
    row_gap: tl.tensor,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, WORDS: tl.constexpr, E: tl.constexpr, NESTED: tl.constexpr,
    EVEN: tl.constexpr, CONTIGUOUS: tl.constexpr,
) -> None:  # fmt: skip
    """One program writes WORDS words of E = 8 (16 bits) or 4 (fp32) elements.

    Rows are `row_words` words long and `row_stride` elements apart in `out`, which leaves a gap of `row_gap` words.
    """
    BLOCKS: tl.constexpr = WORDS * E // BLOCK
    program = tl.program_id(0).to(tl.int64)
    first = program * WORDS
    # Triton would load four words a thread and move them between threads through shared memory;
    # `max_contiguous(..., 1)` makes a thread load one word and store its elements in one instruction.
    word_W = tl.max_contiguous(tl.arange(0, WORDS), 1)
    element_WE = tl.arange(0, WORDS * E)
    # A broadcast where a division would say the same: the compiler does not simplify the division, and computes eight
    # addresses in place of one.
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
    scale_W = nf4_scales(code2, absmax2, offset, absmax_W, program * BLOCKS // BLOCK2, NESTED)
    table = tl.load(code + tl.arange(0, 16))
    w_WE = tl.reshape(unpack_words(table, word, scale_W, WORDS, E), WORDS * E).to(out.dtype.element_ty)

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
    packed: tl.tensor, code: tl.tensor, absmax: tl.tensor, code2: tl.tensor, absmax2: tl.tensor, offset: tl.tensor,
    out: tl.tensor, columns: tl.tensor, chunks: tl.tensor, row_stride: tl.tensor,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, ELEMENTS: tl.constexpr, NESTED: tl.constexpr,
) -> None:  # fmt: skip
    """One program writes up to ELEMENTS elements of one row, `chunks` programs a row, for any sizes and alignment.

    No layer of a language model needs it: odd counts, rows that start in the middle of a byte, unaligned views.
    """
    row = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = column < columns
    # Unsigned, so that the divisions below are shifts; masked elements would read past the ends.
    element = tl.where(mask, row * columns + column, 0).to(tl.uint64)
    byte = tl.load(packed + element // 2).to(tl.int32)
    q = tl.where(element % 2 == 0, byte >> 4, byte & 15)
    block = element // BLOCK
    scale = nf4_scales(code2, absmax2, offset, tl.load(absmax + block), block // BLOCK2, NESTED)
    w = (tl.load(code + q) * scale).to(out.dtype.element_ty)
    tl.store(out + row * row_stride + column, w, mask=mask)


def _fits_words(
    rows: int, columns: int, row_stride: int, per_word: int, nested_span: int | None, packed_address: int
) -> bool:
    """Whether `_dequantize_words` can write a weight (rows, columns) with rows `row_stride` elements apart.

    No word may cross the end, nor the end of a row that is followed by a gap; one second absmax (of `nested_span`
    elements, None for plain scales) must serve a whole program; words are read aligned; and the 32-bit arithmetic on
    rows must be exact.
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


def _launch(weight: NF4Weight, out: Tensor) -> None:
    """Fills `out` (N, K), its rows contiguous, from checked arguments, with the faster kernel that fits."""
    *tensors, blocksize, blocksize2 = weight
    rows, columns = out.shape
    elements = rows * columns
    if elements == 0:
        return
    nested = weight.code2 is not None
    row_stride = out.stride(0) if rows > 1 else columns
    per_word = 4 if out.dtype == torch.float32 else 8
    common = {"BLOCK": blocksize, "BLOCK2": blocksize2, "NESTED": nested, "num_warps": 4, "enable_fp_fusion": False}
    span = blocksize * blocksize2 if nested else None
    if _fits_words(rows, columns, row_stride, per_word, span, weight.packed.data_ptr()):
        words, row_words, contiguous = elements // per_word, columns // per_word, row_stride == columns
        layout = (0, 0, 0, 0)
        if not contiguous:
            layout = (row_words, -(-(2**32) // row_words), row_stride, (row_stride - columns) // per_word)
        launch(
            _dequantize_words,
            (-(-words // WORDS),),
            *tensors,
            out,
            words,
            *layout,
            WORDS=WORDS,
            E=per_word,
            EVEN=words % WORDS == 0,
            CONTIGUOUS=contiguous,
            **common,
        )
    else:
        chunks = -(-columns // ELEMENTS)
        grid = (rows * chunks,)
        launch(_dequantize_elements, grid, *tensors, out, columns, chunks, row_stride, ELEMENTS=ELEMENTS, **common)


def _on_cuda(*arguments: Any) -> None:
    *weight, out = arguments
    _launch(NF4Weight(*weight), out)


def _on_cpu(*arguments: Any) -> None:
    *weight, out = arguments
    out.copy_(reference.dequantize_nf4(*NF4Weight(*weight), (out.shape[0], out.shape[1]), out.dtype))


def _fake(*arguments: Any) -> None:
    """Nothing is returned, so there is no shape to compute."""


_dequantize_op = define_op(f"dequantize_nf4({SCHEMA}, Tensor(a!) out) -> ()", cpu=_on_cpu, cuda=_on_cuda, fake=_fake)


def dequantize_nf4(
    packed: Tensor, quant_state: Any, *, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The weight (N, K) of a bitsandbytes NF4 tensor: NF4[q] * scale in fp32, rounded once.

    Args:
        packed: uint8, ceil(N * K / 2) bytes in bitsandbytes' order, of any shape, on CUDA (one Triton launch) or on
            the CPU (plain PyTorch).
        quant_state: bitsandbytes' `QuantState`, or an object with its attributes; plain or nested.
        out: (N, K) to write into, its rows contiguous; it may be a view of a buffer with more columns.
        dtype: fp32, fp16 or bf16; by default that of `out`, or else that of the quant state.

    Returns:
        `out`, or a new contiguous tensor.

    Raises:
        ValueError: the state is not NF4, or packed, state, out and dtype do not fit together.
    """
    weight, shape, state_dtype = read_weight(packed, quant_state)
    if dtype is None:
        dtype = state_dtype if out is None else out.dtype
    if dtype not in DTYPES:
        raise ValueError(f"a weight in {dtype} is requested, this kernel writes {', '.join(map(str, DTYPES))}")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=weight.packed.device)
    else:
        check_out(out, shape, dtype, weight.packed.device)
    _dequantize_op(*weight, out)
    return out


# A word of fp32 holds four elements, so addresses and masks cost twice as much for each as in 16 bits.
_FP32_EXCEPTION = (
    "at most 12 instructions an element in place of 8: fp32 moves 4.5 bytes an element, at an H200's 4.3 TB/s 4.1 "
    "elements a cycle and SM, so memory stays the limit up to 31"
)


def compile_cases() -> list[CompileCase]:
    """Every form in which the two kernels are launched, with the requirements on the word kernel.

    At most 8 instructions an output element on sm_90 in 16 bits, in every form, and in fp32 where programs are whole
    (4,096 elements). fp32 with a masked tail or with gaps between rows is an exception, see `_FP32_EXCEPTION`.
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
                        requirements=Requirements(
                            store_bits=128 if by_words else None,
                            shared_stores=1 if by_words else 0,  # the table of sixteen values
                            fma=False,
                            instructions_per_element={90: 12.0 if excepted else 8.0} if by_words else {},
                            exception=_FP32_EXCEPTION if excepted else "",
                        ),
                    )
                )
    return cases
