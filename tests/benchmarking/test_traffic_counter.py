"""What each operator is counted as, against bytes computed by hand."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprice_kernels.ops
from fastprice.benchmarking import traffic_counter
from fastprice.benchmarking.traffic_counter import Launch, TrafficCounter

for module in pkgutil.iter_modules(fastprice_kernels.ops.__path__):
    importlib.import_module(f"fastprice_kernels.ops.{module.name}")  # defines the operators

X, Y = torch.ones(4, 8), torch.ones(4, 8)  # 128 bytes each
HALF = torch.ones(4, 8, dtype=torch.bfloat16)
ROWS = torch.tensor([1, 3])  # 16 bytes
A, B = torch.ones(100, 200), torch.ones(200, 300)


def launches(function: Callable[[], Any]) -> list[Launch]:
    with TrafficCounter(rank=16) as counter:
        function()
    return counter.launches


def moved(function: Callable[[], Any]) -> tuple[int, int]:
    """Bytes read and written by one launch."""
    (launch,) = launches(function)
    return launch.read, launch.written


@pytest.mark.parametrize(
    ("function", "read", "written"),
    [
        (lambda: X + Y, 256, 128),
        (lambda: X.mul_(2.0), 128, 128),
        (lambda: X[:, :4] + 1, 64, 64),
        (lambda: X + torch.empty(8).expand(4, 8), 128 + 32, 128),
        (lambda: X.copy_(HALF), 64, 128),
        (lambda: torch._foreach_copy_([X, Y], [HALF, HALF]), 128, 256),
        (lambda: X.fill_(1.0), 0, 128),
        (lambda: torch.zeros_like(X), 0, 128),
        (lambda: torch.zeros(4, 8), 0, 128),
        (lambda: X.to(torch.bfloat16), 128, 64),
        (lambda: torch.cat([X, Y]), 256, 256),
        (lambda: torch.nn.functional.embedding(ROWS, X), 64 + 16, 64),
        (lambda: X[ROWS], 64 + 16, 64),
        (lambda: X.index_copy_(0, ROWS, Y[:2]), 64 + 16, 64),
        (lambda: torch.mm(A, B, out=torch.empty(100, 300)), 4 * (20_000 + 60_000), 4 * 30_000),
        (lambda: torch.empty(100, 300).addmm_(A, B), 4 * (30_000 + 20_000 + 60_000), 4 * 30_000),
        (lambda: torch.empty(100, 300).addmm_(A, B, beta=0), 4 * (20_000 + 60_000), 4 * 30_000),
        (lambda: torch.addmm(A.new_empty(()), A, B, beta=0, alpha=2.0), 4 * (20_000 + 60_000), 4 * 30_000),
        (lambda: torch.ops.aten.slice_backward(X[:, :4], [4, 8], 1, 0, 4, 1), 64, 128 + 64),
    ],
)
def test_the_bytes_of_an_operator(function: Callable[[], Any], read: int, written: int) -> None:
    assert moved(function) == (read, written)


def test_views_allocations_and_arithmetic_on_dtypes_are_free() -> None:
    assert launches(lambda: X.t()[:, 1:].unsqueeze(0).expand(3, 8, 3).detach().split(1)) == []
    assert launches(lambda: (torch.empty(4), X.new_empty(3), torch.empty_like(X))) == []
    assert launches(lambda: torch.promote_types(torch.float32, torch.bfloat16)) == []


def test_results_have_the_shapes_strides_and_dtypes_of_the_real_ones_and_are_never_computed() -> None:
    def functions() -> list[Tensor]:
        transposed = torch.ones(3, 5, 7).transpose(1, 2)
        return [transposed * 2, transposed.to(torch.float16), torch.cat([X, Y], 1), X.sum(1, keepdim=True), X @ Y.t()]

    real = functions()
    with TrafficCounter(rank=16):
        unwritten = functions()
    for one, other in zip(real, unwritten, strict=True):
        assert (one.shape, one.stride(), one.dtype, one.device) == (
            other.shape,
            other.stride(),
            other.dtype,
            other.device,
        )
    with TrafficCounter(rank=16):
        huge = torch.empty(20_000, 20_000, dtype=torch.bfloat16)  # its product would take minutes
        assert (huge @ huge).shape == huge.shape
        before = X._version
        assert X.add_(Y) is X
        assert X._version == before + 1
        with pytest.raises(RuntimeError):
            X.sum().item()
    assert torch.equal(X, torch.ones(4, 8))


def test_a_product_with_a_result_in_another_dtype_as_cuda_has_it() -> None:
    a = torch.ones(100, 200, dtype=torch.bfloat16)
    with TrafficCounter(rank=16) as counter:
        result = torch.mm(a, a.t(), out_dtype=torch.float32)
    assert (result.shape, result.dtype) == ((100, 100), torch.float32)
    assert [(each.read, each.written) for each in counter.launches] == [(2 * 2 * 20_000, 4 * 10_000)]


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda: A @ B, "frozen product"),
        (lambda: A @ torch.empty(200, 48), "LoRA product"),
        (lambda: A @ torch.empty(200, 49), "frozen product"),
        (lambda: torch.empty(100, 300).addmm_(A[:, :16], B[:16]), "LoRA product"),
        (lambda: X.to(torch.bfloat16), "cast"),
        (lambda: X * 2, "other eager"),
    ],
)
def test_the_kind_of_an_operator(function: Callable[[], Any], kind: str) -> None:
    assert [each.kind for each in launches(function)] == [kind]


def test_ours_are_one_launch_each() -> None:
    e, g, dh = (torch.ones(4, 8) for _ in range(3))
    found = launches(lambda: torch.ops.fastprice.glu_forward(e, g, torch.empty(4, 8), "silu"))
    found += launches(lambda: torch.ops.fastprice.glu_backward(dh, e, g, "silu"))
    weight = (torch.ones(256, dtype=torch.uint8), torch.ones(16), torch.ones(8), None, None, None, 64, 1)
    found += launches(lambda: torch.ops.fastprice.dequantize_nf4(*weight, torch.empty(16, 32, dtype=torch.bfloat16)))
    assert [(each.kind, each.read, each.written) for each in found] == [
        ("activation", 256, 128), ("activation", 384, 384), ("dequantization", 256 + 64 + 32, 1024),
    ]  # fmt: skip


# What they write, they read as well: gradients over their inputs, rotation in place.
IN_PLACE = {"glu_backward": {"dh", "e", "g"}, "rotate": {"q", "k"}}


def test_every_operator_of_ours_has_a_kind_and_says_what_it_only_writes() -> None:
    names = {
        name.removeprefix("fastprice::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastprice::")
    }
    assert {"dequantize_nf4", "glu_forward", "glu_backward", "completion_cross_entropy"} <= names
    for name in names:
        assert any(part in name for part, _ in traffic_counter._OURS), f"{name}: add it to _OURS"
        schema = getattr(torch.ops.fastprice, name).default._schema
        mutated = {each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write}
        known = set(traffic_counter._WRITE_ONLY.get(name, ())) | IN_PLACE.get(name, set())
        assert mutated == known, f"{name}: add what it only writes to _WRITE_ONLY, what it reads too to IN_PLACE"


@pytest.mark.parametrize("wants_hidden", [False, True])
def test_the_bytes_of_the_loss(wants_hidden: bool) -> None:
    """7 rows of 10 in chunks of 3; 20 tokens, width 6, in fp32."""
    head, row, logit_row = 4 * 20 * 6, 4 * 6, 4 * 20
    sums = lambda: torch.ops.fastprice.completion_cross_entropy(  # noqa: E731
        torch.ones(10, 6), torch.ones(20, 6), None, torch.zeros(10, dtype=torch.int64), torch.arange(7),
        -100, None, 1.0, 3, wants_hidden, False, False,
    )  # fmt: skip
    with TrafficCounter(rank=16) as counter:
        sums()
    (launch,) = [each for each in counter.launches if each.kind == "loss"]
    gather, logits = (7 * row, 7 * row), (3 * head + 7 * row, 7 * logit_row)
    softmax, results = (7 * logit_row, 0), (0, 4 * 4)
    steps = [gather, logits, softmax, results]
    if wants_hidden:  # the gradient over the logits, its product with the head, the zeroed result and the copy into it
        steps += [
            (7 * logit_row, 7 * logit_row),
            (7 * logit_row + 3 * head, 7 * row),
            (0, 10 * row),
            (7 * row, 7 * row),
        ]
    assert (launch.read, launch.written) == (sum(read for read, _ in steps), sum(written for _, written in steps))


def test_the_product_of_bitsandbytes_dequantizes_first() -> None:
    import bitsandbytes  # noqa: F401  defines the operator

    x, packed = torch.ones(100, 128, dtype=torch.bfloat16), torch.ones(128 * 64 // 2, 1, dtype=torch.uint8)
    absmax, code, offset = torch.ones(128, dtype=torch.uint8), torch.ones(256), torch.ones(())
    found = launches(
        lambda: torch.ops.bitsandbytes.gemm_4bit(
            x, packed, [64, 128], torch.empty(1), 64, "nf4",
            absmax_8bit=absmax, absmax_code=code, absmax_offset=offset,
        )
    )  # fmt: skip
    assert [(each.kind, each.read, each.written) for each in found] == [
        ("dequantization", 128 + 4, 512),
        ("dequantization", 512, 512),
        ("dequantization", 4096 + 512, 2 * 8192),
        ("frozen product", 2 * 12_800 + 2 * 8192, 2 * 6400),
    ]
