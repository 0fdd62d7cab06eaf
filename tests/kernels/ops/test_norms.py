"""Norms against float64 autograd: the torch path, the kernel bodies in the interpreter, autograd, the ops."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastprice_kernels import reference
from fastprice_kernels.codegen.machine_code import compile_case, unmet_requirements
from fastprice_kernels.ops import norms
from fastprice_kernels.ops.norms import NORMS, add_norm, norm, norm_dtype

SHAPES = [(3, 41), (1, 1), (5, 128), (2, 1030), (33, 16), (0, 7)]
EPS = 1e-2  # large enough to be seen
# About two units in the last place of the results; "rms" rounds once more in between.
BANDS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class Case:
    """x, a residual, weight, bias (for "layer") and the gradients of sum and norm, with their float64 truth."""

    def __init__(self, shape, kind, dtype, *, residual=True, weight_dtype=None):
        generator = torch.Generator().manual_seed(0)

        def draw(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        x, r, dtotal, dy = (draw(*shape).to(dtype) for _ in range(4))
        weight = draw(shape[1]).to(weight_dtype or dtype)
        bias = draw(shape[1]).to(weight_dtype or dtype) if kind == "layer" else None
        self.x, self.residual, self.weight, self.bias = x, r if residual else None, weight, bias
        self.dtotal, self.dy = dtotal if residual else None, dy
        total = x + r if residual else x  # rounded, as the stock code does
        leaf = total.double().requires_grad_()
        w, b = weight.double().requires_grad_(), None if bias is None else bias.double().requires_grad_()
        y = reference.norm(leaf, w, EPS, kind, b)
        dx, dw, *db = torch.autograd.grad(y, (leaf, w, *([] if b is None else [b])), dy.double())
        self.total, self.y, self.dweight, self.dbias = total, y.detach(), dw, db[0] if db else None
        self.dx = dx + self.dtotal.double() if residual else dx


def assert_close(got, want, band):
    scale = max(1.0, float(want.double().abs().max()) if want.numel() else 1.0)
    torch.testing.assert_close(got.double(), want.double(), rtol=band, atol=band * scale)


def poisoned(shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


def test_without_a_residual_the_rows_themselves_go_on_and_their_gradients_are_added():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, dtype=torch.float64)
    total, y = add_norm(x, None, weight, EPS)
    assert total.data_ptr() == x.data_ptr()
    dtotal, dy = torch.randn(2, 3, 8, dtype=torch.float64)
    (got,) = torch.autograd.grad((total, y), x, (dtotal, dy))
    (want,) = torch.autograd.grad(reference.norm(x, weight, EPS, "rms"), x, dy)
    torch.testing.assert_close(got, want + dtotal)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64_in_both_directions(shape, kind, dtype, residual):
    case = Case(shape, kind, dtype, residual=residual)
    leaves = [None if each is None else each.requires_grad_() for each in (case.x, case.residual)]
    parameters = [each.requires_grad_() for each in (case.weight, case.bias) if each is not None]
    if residual:
        total, y = add_norm(*leaves, case.weight, EPS, kind=kind, bias=case.bias)
        assert torch.equal(total, case.total)
        torch.autograd.backward((total, y), (case.dtotal, case.dy))
        assert torch.equal(case.residual.grad, case.x.grad)
    else:
        y = norm(case.x, case.weight, EPS, kind=kind, bias=case.bias)
        y.backward(case.dy)
    band = BANDS[dtype]
    assert_close(y, case.y, band)
    assert_close(case.x.grad, case.dx, band)
    assert_close(case.weight.grad, case.dweight, band * max(1, shape[0]) ** 0.5)
    if kind == "layer":
        assert_close(parameters[1].grad, case.dbias, band * max(1, shape[0]) ** 0.5)


@pytest.mark.interpreter
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_agree_with_float64(shape, kind, dtype, residual):
    case = Case(shape, kind, dtype, residual=residual)
    y, dx = poisoned(shape, dtype), poisoned(shape, dtype)
    total = poisoned(shape, dtype) if residual else None
    statistics = poisoned((2 if kind == "layer" else 1, shape[0]), torch.float32)
    norms._forward_cuda(case.x, case.residual, case.weight, case.bias, y, total, statistics, EPS, kind)
    assert_close(y, case.y, BANDS[dtype])
    if residual:
        assert torch.equal(total, case.total)
        alone, again = poisoned(shape, dtype), torch.empty_like(statistics)
        norms._forward_cuda(total, None, case.weight, case.bias, alone, None, again, EPS, kind)
        assert torch.equal(y, alone)  # the norm is that of the sum as it was rounded
    parameters = poisoned((3, 2, shape[1]), torch.float32)  # 3 programs: some get several tiles, some none
    for sums in (None, parameters):
        norms._backward_cuda(case.dy, case.total, case.dtotal, case.weight, statistics, dx, sums, kind)
        assert_close(dx, case.dx, BANDS[dtype])
    dweight, dbias = parameters.sum(0)
    assert_close(dweight, case.dweight, BANDS[dtype] * max(1, shape[0]) ** 0.5)
    if kind == "layer":
        assert_close(dbias, case.dbias, BANDS[dtype] * max(1, shape[0]) ** 0.5)


@pytest.mark.interpreter
def test_kernels_take_weights_of_another_dtype():
    """fp32 weights beside 16-bit rows, as QLoRA recipes leave norms: the stock result is fp32."""
    case = Case((4, 40), "rms", torch.float16, weight_dtype=torch.float32)
    y, total = poisoned((4, 40), torch.float32), poisoned((4, 40), torch.float16)
    statistics = poisoned((1, 4), torch.float32)
    norms._forward_cuda(case.x, case.residual, case.weight, None, y, total, statistics, EPS, "rms")
    rounded = (case.total.double() * statistics[0, :, None].double()).half().double()
    torch.testing.assert_close(y.double(), rounded * case.weight.double(), rtol=1e-3, atol=1e-3)
    stock = norm(case.total, case.weight, EPS)
    assert stock.dtype is torch.float32 is norm_dtype(torch.float16, torch.float32, "rms")
    torch.testing.assert_close(y, stock, rtol=2e-3, atol=2e-3)


def test_rows_of_a_view_are_normalized_as_they_are():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    heads = x.transpose(1, 2)  # not contiguous
    weight = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(norm(heads, weight, EPS), reference.norm(heads, weight, EPS, "rms"))


def test_an_unused_norm_passes_the_gradient_of_the_sum_on():
    x, r = torch.randn(2, 3, 8, dtype=torch.float64).requires_grad_().unbind(0)
    total, _ = add_norm(x, r, torch.ones(8, dtype=torch.float64), EPS)
    gradients = torch.autograd.grad(total, (x, r), torch.ones_like(total))
    assert all(torch.equal(gradient, torch.ones_like(total)) for gradient in gradients)


def test_gradients_by_finite_differences():
    x, r = (torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for kind in NORMS:
        bias = b if kind == "layer" else None
        function = partial(add_norm, eps=EPS, kind=kind, bias=bias)
        assert torch.autograd.gradcheck(lambda x, r, w, f=function: f(x, r, w), (x, r, w))


def test_saves_the_rows_and_one_number_a_row():
    saved = []
    x = torch.randn(16, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm(x, torch.ones(64), EPS)
    assert sorted(each.numel() for each in saved) == [16, 64, 16 * 64]


def test_ops_pass_opcheck():
    case = Case((4, 6), "layer", torch.float32)
    y, total, statistics = torch.empty(4, 6), torch.empty(4, 6), torch.empty(2, 4)
    arguments = (case.x, case.residual, case.weight, case.bias, y, total, statistics, EPS, "layer")
    torch.library.opcheck(torch.ops.fastprice.norm_forward.default, arguments)
    norms._forward_cpu(*arguments)
    torch.library.opcheck(
        torch.ops.fastprice.norm_backward.default,
        (case.dy, total, case.dtotal, case.weight, statistics, torch.empty(4, 6), torch.empty(1, 2, 6), "layer"),
    )


def test_compiles_without_graph_breaks():
    x, r, w = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6)

    def function(x, r):
        total, y = add_norm(*add_norm(x * 2, None, w, EPS), w, EPS)
        return total + y * r

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for each in (x, r):
        each.requires_grad_()
    torch.testing.assert_close(compiled(x, r), function(x, r))
    got, want = (torch.autograd.grad(f(x, r).sum(), (x, r)) for f in (compiled, function))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "batch"}, "'batch' is not one of rms, rms_plus_one, layer"),
        ({"bias": torch.zeros(4)}, "kind 'rms' has no bias"),
        ({"weight": torch.zeros(5)}, r"weight is \(5,\) on cpu, the rows are 4 wide"),
        ({"residual": torch.zeros(3, 4, dtype=torch.float16)}, r"residual is \(3, 4\) torch.float16"),
        ({"x": torch.zeros(3, 0)}, "rows of 0 columns, 1 to 8,192"),
        ({"x": torch.zeros(1, 9000)}, "rows of 9000 columns"),
    ],
)
def test_refuses_what_does_not_fit(change, words):
    arguments = {"x": torch.zeros(3, 4), "residual": torch.zeros(3, 4), "weight": torch.zeros(4), "eps": EPS, **change}
    with pytest.raises(ValueError, match=words):
        add_norm(**arguments)


@pytest.mark.parametrize("case", [c for c in norms.compile_cases() if "4096/bf16" in c.name], ids=lambda c: c.name)
def test_machine_code_meets_its_requirements(case):
    assert unmet_requirements(case, compile_case(case, 90)) == []
