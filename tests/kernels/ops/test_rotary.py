"""Rotary embedding against float64 autograd: the torch path, the kernel body in the interpreter, autograd, the op."""

from __future__ import annotations

import pytest
import torch

from fastprice_kernels import reference
from fastprice_kernels.codegen.machine_code import compile_case, unmet_requirements
from fastprice_kernels.ops import rotary
from fastprice_kernels.ops.rotary import ROTARY_FORMS, rotate_

# (B, T, query heads, key heads, D, R): grouped heads, partial rotary, odd numbers of everything, one token.
SHAPES = [(1, 5, 4, 2, 16, 16), (2, 3, 5, 1, 12, 8), (1, 1, 1, 1, 2, 2), (3, 2, 3, 3, 10, 6), (1, 0, 2, 1, 4, 4)]
BANDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make(shape, dtype, *, tables=1):
    """q and k as views of (B, T, H D), as projections give them; cos and sin of any values, not of real angles."""
    batch, tokens, q_heads, k_heads, width, rotated = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    q, k = (draw(batch, tokens, heads * width).view(batch, tokens, heads, width) for heads in (q_heads, k_heads))
    cos, sin = (draw(batch if tables > 1 else 1, tokens, rotated) for _ in range(2))
    return q.transpose(1, 2), k.transpose(1, 2), cos, sin


def truth(q, k, cos, sin, form):
    return tuple(reference.rotate(x.double(), cos.double(), sin.double(), form) for x in (q, k))


def assert_close(got, want, dtype):
    torch.testing.assert_close(got.double(), want.double(), rtol=BANDS[dtype], atol=4 * BANDS[dtype])


@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("form", ROTARY_FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64_in_both_directions(shape, form, dtype, tables):
    q, k, cos, sin = make(shape, dtype, tables=tables)
    wide = [each.double().requires_grad_() for each in (q, k)]
    want = truth(*wide, cos, sin, form)
    seeds = [torch.randn_like(each) for each in want]
    want_gradients = torch.autograd.grad(want, wide, seeds)
    leaves = [each.clone().requires_grad_() for each in (q, k)]
    got = rotate_(*(each * 1 for each in leaves), cos, sin, form)
    for each, expected in zip(got, want, strict=True):
        assert_close(each, expected, dtype)
    gradients = torch.autograd.grad(got, leaves, [seed.to(dtype) for seed in seeds])
    for each, expected in zip(gradients, want_gradients, strict=True):
        assert_close(each, expected, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", ROTARY_FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_agrees_with_float64(shape, form, dtype):
    q, k, cos, sin = make(shape, dtype, tables=2)
    want = truth(q, k, cos, sin, form)
    versions = q._version, k._version
    rotary._rotate_cuda(q, k, cos, sin, form, False)
    assert q._version > versions[0]  # autograd notices that they changed
    assert k._version > versions[1]
    for each, expected in zip((q, k), want, strict=True):
        assert_close(each, expected, dtype)
    seeds = [torch.randn_like(each) for each in (q, k)]
    wide = [torch.zeros_like(each, dtype=torch.float64).requires_grad_() for each in seeds]
    expected = torch.autograd.grad(truth(*wide, cos, sin, form), wide, [seed.double() for seed in seeds])
    rotary._rotate_cuda(*seeds, cos, sin, form, True)
    for each, gradient in zip(seeds, expected, strict=True):
        assert_close(each, gradient, dtype)


@pytest.mark.interpreter
def test_kernel_writes_only_rotated_columns_of_its_rows():
    wide = torch.full((1, 3, 2, 24), float("nan"))
    view = wide[..., 4:16].transpose(1, 2)
    view.copy_(torch.randn(1, 2, 3, 12))
    before = view.clone()
    k = torch.randn(1, 1, 3, 12)
    cos, sin = torch.randn(2, 1, 3, 8).unbind(0)
    want, _ = truth(before, k, cos, sin, "half")
    rotary._rotate_cuda(view, k, cos, sin, "half", False)
    assert_close(view, want, torch.float32)
    assert torch.equal(view[..., 8:], before[..., 8:])
    assert wide[..., :4].isnan().all()
    assert wide[..., 16:].isnan().all()


def test_works_in_the_memory_of_its_arguments():
    q, k, cos, sin = make((1, 5, 4, 2, 16, 16), torch.float32)
    got_q, got_k = rotate_(q, k, cos, sin)
    assert (got_q.data_ptr(), got_k.data_ptr()) == (q.data_ptr(), k.data_ptr())


def test_code_that_saved_its_argument_gets_an_error_instead_of_wrong_gradients():
    q, k, cos, sin = make((1, 5, 4, 2, 16, 16), torch.float32)
    leaf = torch.ones_like(q).requires_grad_()
    projected = q * leaf
    squared = projected.square()  # saves it
    rotated, _ = rotate_(projected, k, cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (rotated.sum() + squared.sum()).backward()


@pytest.mark.parametrize("expand", [True, False])
def test_gradients_that_share_memory_are_copied_first(expand):
    q, k, cos, sin = (each.double() for each in make((1, 5, 4, 2, 16, 16), torch.float32))
    leaf = q.clone().requires_grad_()
    rotated, _ = rotate_(leaf * 1, k, cos, sin)
    seed = torch.ones((), dtype=torch.float64).expand_as(rotated) if expand else torch.ones_like(rotated)
    (gradient,) = torch.autograd.grad(rotated, leaf, seed)
    wide = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(truth(wide, k, cos, sin, "half")[0], wide, torch.ones_like(wide))
    torch.testing.assert_close(gradient, want)


def test_op_passes_opcheck():
    q, k, cos, sin = make((1, 5, 4, 2, 16, 16), torch.float32)
    torch.library.opcheck(torch.ops.fastprice.rotate.default, (q, k, cos, sin, "half", False))


def test_compiles_without_graph_breaks():
    q, k, cos, sin = make((1, 5, 4, 2, 16, 16), torch.float32)

    def function(q, k):
        return sum(each.sum() for each in rotate_(q * 2, k * 2, cos, sin))

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k), function(q, k))
    leaf = q.clone().requires_grad_()
    got, want = (torch.autograd.grad(f(leaf, k), leaf)[0] for f in (compiled, function))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"form": "spiral"}, "'spiral' is not one of half, interleaved, interleaved_half"),
        ({"k": torch.zeros(1, 2, 4, 8)}, r"q is \(1, 2, 3, 8\) and k \(1, 2, 4, 8\)"),
        ({"k": torch.zeros(1, 2, 3, 8, dtype=torch.float16)}, "q is torch.float32 on cpu, k torch.float16"),
        ({"cos": torch.zeros(2, 3, 8)}, r"cos is \(2, 3, 8\)"),
        ({"cos": torch.zeros(1, 3, 10), "sin": torch.zeros(1, 3, 10)}, "10 columns are to be rotated"),
    ],
)
def test_refuses_what_does_not_fit(change, words):
    tensors = {"q": torch.zeros(1, 2, 3, 8), "k": torch.zeros(1, 2, 3, 8)}
    arguments = {**tensors, "cos": torch.zeros(1, 3, 8), "sin": torch.zeros(1, 3, 8), **change}
    with pytest.raises(ValueError, match=words):
        rotate_(**arguments)


@pytest.mark.parametrize("case", [c for c in rotary.compile_cases() if "128/bf16" in c.name], ids=lambda c: c.name)
def test_machine_code_meets_its_requirements(case):
    assert unmet_requirements(case, compile_case(case, 90)) == []
