"""The product of at most 16 rows with an NF4 weight, dequantized inside the product: for generation.

    y = x W^T + bias        x (T, K), T <= 16 rows;  W (N, K) in NF4;  y (T, N)

Bytes to move: W's codes and scales once, 0.516 for an element, 8.65 MB for 4096 x 4096. The kernel issues 9.7
instructions for an element on sm_90, so an H200 is limited by instructions and an RTX 4090 by memory; the arithmetic is
in docs/explanation/kernels.md. It has not been timed on a GPU: with `backend="auto"` CUDA calls go to bitsandbytes' own
fused product where bitsandbytes is installed, until `OWN_IS_FASTER` is set by a measurement.

One program multiplies ROWS rows of W with x^T on tensor cores and moves along K; the rows of x are padded to 16. W is
rounded to x's dtype before the product, as if it had been dequantized first. Where N gives too few programs to fill the
GPU, K is split between programs and a second kernel adds the partial sums in a fixed order, so that equal inputs give
equal bits; atomic additions would not.

Shapes: T rows of x, K columns, N rows of W; F words in a tile of W, in row-major order.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprice_kernels.codegen.machine_code import TARGETS, CompileCase, Requirements
from fastprice_kernels.ops._launching import launch
from fastprice_kernels.ops._library import define_op
from fastprice_kernels.ops.nf4_dequantize import dequantize_nf4, nf4_scales, unpack_words
from fastprice_kernels.ops.nf4_weight import DTYPES, SCHEMA, NF4Weight, read_weight
from fastprice_kernels.reference import nf4 as reference

__all__ = ["MAX_ROWS", "compile_cases", "nf4_matmul_small"]

MAX_ROWS = 16
OWN_IS_FASTER = False  # than bitsandbytes, on CUDA: not measured, hence not claimed
_HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None

ROWS = 64  # rows of W a program
WORDS = 16  # words of eight elements along K a step
COLUMNS = 1024  # outputs of one program of `_add_parts`


@triton.jit(do_not_specialize=["tokens"])
def _product(
    x: tl.tensor, packed: tl.tensor, code: tl.tensor, absmax: tl.tensor, code2: tl.tensor, absmax2: tl.tensor,
    offset: tl.tensor, bias: tl.tensor, out: tl.tensor, tokens: tl.tensor, n: tl.tensor, row_words: tl.tensor,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    NESTED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """One program multiplies ROWS rows of W in STEPS steps of K = 8 * WORDS columns.

    STEPS is a constant because Triton's interpreter takes no other bound of a loop under numpy 2.4 and later. With
    PARTS, program (i, part) writes its fp32 sums to `out` (part, tokens, n), without bias.
    """
    K: tl.constexpr = WORDS * 8
    tile_F = tl.max_contiguous(tl.arange(0, ROWS * WORDS), 1)
    row_F = tl.program_id(0) * ROWS + tile_F // WORDS
    row_N = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token_T = tl.arange(0, 16)
    words = packed.to(tl.pointer_type(tl.uint32), bitcast=True)
    table = tl.load(code + tl.arange(0, 16))
    sum_N_T = tl.zeros((ROWS, 16), tl.float32)
    for i in range(STEPS):
        step = tl.program_id(1) * STEPS + i
        word_F = step * WORDS + tile_F % WORDS
        index_F = (row_F * row_words + word_F).to(tl.uint32)
        k_K = step * K + tl.arange(0, K)
        mask_T_K = (token_T < tokens)[:, None]
        mask_F = None
        if not EVEN:
            mask_F = (row_F < n) & (word_F < row_words)
            index_F = tl.where(mask_F, index_F, 0)
            mask_T_K = mask_T_K & (k_K < row_words * 8)[None, :]
        block_F = index_F // (BLOCK // 8)
        scale_F = nf4_scales(code2, absmax2, offset, tl.load(absmax + block_F), block_F // BLOCK2, NESTED)
        if not EVEN:
            scale_F = tl.where(mask_F, scale_F, 0.0)
        word = tl.load(words + index_F, mask=mask_F)
        x_T_K = tl.load(x + (token_T * row_words * 8)[:, None] + k_K[None, :], mask=mask_T_K, other=0.0)
        w_N_K = tl.reshape(unpack_words(table, word, scale_F, ROWS * WORDS, 8).to(x.dtype.element_ty), ROWS, K)
        sum_N_T = tl.dot(w_N_K, tl.trans(x_T_K), sum_N_T, input_precision="ieee")

    index_N_T = (token_T * n)[None, :] + row_N[:, None]
    mask_N_T = (row_N < n)[:, None] & (token_T < tokens)[None, :]
    if PARTS:
        tl.store(out + tl.program_id(1) * tokens * n + index_N_T, sum_N_T, mask=mask_N_T)
    else:
        if bias is not None:
            sum_N_T += tl.load(bias + row_N, mask=row_N < n, other=0.0).to(tl.float32)[:, None]
        tl.store(out + index_N_T, sum_N_T.to(out.dtype.element_ty), mask=mask_N_T)


@triton.jit(do_not_specialize=["size"])
def _add_parts(
    parts: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    n: tl.tensor,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """out (size,) = sum over the PARTS of `parts` (PARTS, size), in order, + bias (n,) repeated."""
    index = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = index < size
    total = tl.zeros((COLUMNS,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * size + index, mask=mask, other=0.0)
    if bias is not None:
        total += tl.load(bias + index % n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=mask)


def _fits(n: int, k: int, packed_address: int, dtype: torch.dtype, capability: int) -> bool:
    """Whether `_product` can compute it: 16 bits from Ampere on, rows of whole words, word indices in 32 bits.

    Triton 3.6 has no tensor-core product for Turing (it spills registers instead), and on sm_100 it multiplies fp32 in
    TF32 whatever `input_precision` says.
    """
    by_tensor_cores = dtype != torch.float32 and capability >= 8
    return by_tensor_cores and k % 8 == 0 and packed_address % 4 == 0 and n * (k // 8) < 2**31


def _parts(n: int, k: int, processors: int) -> tuple[int, int]:
    """(parts, steps): how many programs share a row's K, and the steps of each.

    Each of the GPU's `processors` should have three programs. `parts` is a power of two of at most 16, so that few
    variants of `_add_parts` are compiled.
    """
    all_steps, programs = -(-k // (WORDS * 8)), -(-n // ROWS)
    parts = 1
    while parts < 16 and parts * 2 <= all_steps and programs * parts < 3 * processors:
        parts *= 2
    return parts, -(-all_steps // parts)


def _launch(processors: int, x_TK: Tensor, weight: NF4Weight, bias: Tensor | None, n: int) -> Tensor:
    """`_product` and, where K is split, `_add_parts`; x contiguous, everything checked."""
    *tensors, blocksize, blocksize2 = weight
    tokens, k = x_TK.shape
    parts, steps = _parts(n, k, processors)
    out_TN = torch.empty((tokens, n), dtype=x_TK.dtype, device=x_TK.device)
    sums = out_TN if parts == 1 else torch.empty((parts, tokens, n), dtype=torch.float32, device=x_TK.device)
    launch(
        _product,
        (-(-n // ROWS), parts),
        x_TK,
        *tensors,
        bias if parts == 1 else None,
        sums,
        tokens,
        n,
        k // 8,
        STEPS=steps,
        BLOCK=blocksize,
        BLOCK2=blocksize2,
        ROWS=ROWS,
        WORDS=WORDS,
        NESTED=weight.code2 is not None,
        EVEN=n % ROWS == 0 and k == parts * steps * WORDS * 8,
        PARTS=parts > 1,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=False,  # so that W is bit for bit what `dequantize_nf4` gives
    )
    if parts > 1:
        grid = (-(-tokens * n // COLUMNS),)
        launch(_add_parts, grid, sums, bias, out_TN, tokens * n, n, PARTS=parts, COLUMNS=COLUMNS, num_warps=4)
    return out_TN


def _on_cuda(x_TK: Tensor, *arguments: Any) -> Tensor:
    *weight, bias, n = arguments
    processors = torch.cuda.get_device_properties(x_TK.device).multi_processor_count
    return _launch(processors, x_TK, NF4Weight(*weight), bias, n)


def _on_cpu(x_TK: Tensor, *arguments: Any) -> Tensor:
    *weight, bias, n = arguments
    w_NK = reference.dequantize_nf4(*NF4Weight(*weight), (n, x_TK.shape[1]), x_TK.dtype)
    return reference.matmul_fp32(x_TK, w_NK, bias)


def _fake(x_TK: Tensor, *arguments: Any) -> Tensor:
    return x_TK.new_empty((x_TK.shape[0], arguments[-1]))


_matmul_op = define_op(
    f"nf4_matmul_small(Tensor x, {SCHEMA}, Tensor? bias, int n) -> Tensor", cpu=_on_cpu, cuda=_on_cuda, fake=_fake
)


def nf4_matmul_small(
    x: Tensor, packed: Tensor, quant_state: Any, *, bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """`x W^T + bias` for at most 16 rows of x and a bitsandbytes NF4 weight W (N, K); no gradients.

    Args:
        x: (..., K) in fp32, fp16 or bf16, at most 16 rows over all leading dimensions, on `packed`'s device.
        packed, quant_state: the weight, as `dequantize_nf4` takes it.
        bias: (N,) in x's dtype, or None.
        backend: "triton" (this module's kernel), "bitsandbytes" (its fused product) or "auto": bitsandbytes on CUDA
            where it is installed and `OWN_IS_FASTER` is False, else this kernel. Where the kernel cannot compute it
            (fp32, GPUs before Ampere, K not a multiple of 8) the weight is dequantized first and multiplied by
            PyTorch. On the CPU everything is plain PyTorch.

    Returns:
        (..., N) in x's dtype: products and sums in fp32, rounded once.

    Raises:
        ValueError: more than 16 rows, an input that requires a gradient, or dtypes, devices, shapes or a backend that
            do not fit.
    """
    weight, (n, k), _ = read_weight(packed, quant_state)
    _check(x, packed, (n, k), bias, backend)
    if backend == "bitsandbytes" or (backend == "auto" and packed.is_cuda and not OWN_IS_FASTER and _HAS_BITSANDBYTES):
        import bitsandbytes

        y: Tensor = bitsandbytes.matmul_4bit(x, packed, quant_state, bias=bias)
        return y
    x_TK = x.reshape(-1, k).contiguous()
    if x_TK.shape[0] == 0 or n == 0:
        y = x.new_empty((x_TK.shape[0], n))
    elif packed.is_cuda and not _fits(n, k, weight.packed.data_ptr(), x.dtype, _capability(packed)):
        y = torch.nn.functional.linear(x_TK, dequantize_nf4(packed, quant_state, dtype=x.dtype), bias)
    else:
        y = _matmul_op(x_TK, *weight, bias, n)
    return y.view(*x.shape[:-1], n)


def _capability(tensor: Tensor) -> int:
    return torch.cuda.get_device_capability(tensor.device)[0]


def _check(x: Tensor, packed: Tensor, shape: tuple[int, int], bias: Tensor | None, backend: str) -> None:
    n, k = shape
    if backend not in ("auto", "triton", "bitsandbytes"):
        raise ValueError(f"backend is {backend!r}, there are 'auto', 'triton' and 'bitsandbytes'")
    if backend == "bitsandbytes" and not _HAS_BITSANDBYTES:
        raise ValueError("backend is 'bitsandbytes', which is not installed")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}, this product takes {', '.join(map(str, DTYPES))}")
    if x.device != packed.device:
        raise ValueError(f"x is on {x.device}, packed is on {packed.device}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}, the weight has ({n}, {k})")
    rows = x.numel() // max(k, 1)
    if rows > MAX_ROWS:
        raise ValueError(f"x has {rows} rows, this product takes {MAX_ROWS}; use dequantize_nf4 and a matmul for more")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype or bias.device != x.device):
        have = f"{tuple(bias.shape)} in {bias.dtype} on {bias.device}"
        raise ValueError(f"bias is {have}, x and the weight need ({n},) in {x.dtype} on {x.device}")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("x or bias requires a gradient, this product has none; use lora_linear, or torch.no_grad()")


def compile_cases() -> list[CompileCase]:
    """The product with and without edges and split K, on the targets of `_fits`, and the sum of the parts."""
    cases = []
    for type_ in ("bf16", "fp16"):
        # The two types differ only in the rounding and the product: one form is enough for the second.
        for form in ("even", "edges", "parts", "plain scales") if type_ == "bf16" else ("even",):
            constexprs: dict[str, Any] = {"BLOCK": 64, "BLOCK2": 256, "NESTED": form != "plain scales"}
            constexprs |= {"STEPS": 4, "ROWS": ROWS, "WORDS": WORDS, "EVEN": form != "edges", "PARTS": form == "parts"}
            types = {"x": f"*{type_}", "packed": "*u8", "code": "*fp32"}
            if form == "plain scales":
                constexprs |= {"code2": None, "absmax2": None, "offset": None}
                types |= {"absmax": "*fp32"}
            else:
                types |= {"absmax": "*u8", "code2": "*fp32", "absmax2": "*fp32", "offset": "*fp32"}
            if form == "edges":
                types |= {"bias": f"*{type_}"}
            else:
                constexprs |= {"bias": None}
            types |= {"out": "*fp32" if form == "parts" else f"*{type_}"}
            types |= {"tokens": "i32", "n": "i32", "row_words": "i32"}
            cases.append(
                CompileCase(
                    name=f"nf4_matmul_small/{type_}/{form}",
                    fn=_product,
                    signature=types,
                    constexprs=constexprs,
                    aligned=("x", "packed", "out", *(("n", "row_words") if form != "edges" else ())),
                    num_stages=1,
                    enable_fp_fusion=False,
                    elements=ROWS * WORDS * 8,  # weights of one step: the loop's body is most of the code
                    targets=tuple(cc for cc in TARGETS if cc >= 80),
                    requirements=Requirements(tensor_cores=True, fma=False),
                )
            )
    cases.append(
        CompileCase(
            name="nf4_matmul_small/bf16/sum of parts",
            fn=_add_parts,
            signature={"parts": "*fp32", "bias": "*bf16", "out": "*bf16", "size": "i32", "n": "i32"},
            constexprs={"PARTS": 4, "COLUMNS": COLUMNS},
            aligned=("parts", "out"),
            elements=COLUMNS,
        )
    )
    return cases
