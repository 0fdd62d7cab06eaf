"""Gated activations against float64 autograd: the torch path, the kernel bodies in the interpreter, the ops."""

from __future__ import annotations

import pytest
import torch

from fastprice_kernels import reference
from fastprice_kernels.codegen.machine_code import compile_case, unmet_requirements
from fastprice_kernels.ops import gated_activations
from fastprice_kernels.ops.gated_activations import ACTIVATIONS, glu_backward_, glu_forward

SHAPES = [(9, 41), (1, 1), (3, 1024), (5, 1030), (0, 7), (4, 0)]
# Half a unit in the last place of the result, twice: the inputs are exact, the arithmetic is in float32.
BANDS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def make(shape: tuple[int, int], dtype: torch.dtype, spread: float = 3.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple((torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype) for _ in range(3))


def truth(dh: torch.Tensor, e: torch.Tensor, g: torch.Tensor, kind: str) -> tuple[torch.Tensor, ...]:
    e, g = e.double().requires_grad_(), g.double().requires_grad_()
    h = reference.glu(e, g, kind)
    de, dg = torch.autograd.grad(h, (e, g), dh.double())
    return h.detach(), de, dg


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double(), want, rtol=BANDS[dtype], atol=BANDS[dtype])


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_path_agrees_with_float64(shape, kind, dtype):
    dh, e, g = make(shape, dtype)
    h, de, dg = truth(dh, e, g, kind)
    assert_close(glu_forward(e, g, kind), h, dtype)
    buffers = dh.clone(), e.clone(), g.clone()
    results = glu_backward_(*buffers, kind)
    assert [r.data_ptr() for r in results] == [b.data_ptr() for b in buffers]
    for got, want in zip(results, (h, de, dg), strict=True):
        assert_close(got, want, dtype)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy; sigma(-100) is 0 all the same
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_agree_with_float64(shape, kind, dtype):
    dh, e, g = make(shape, dtype)
    h, de, dg = truth(dh, e, g, kind)
    wide = torch.full((shape[0], shape[1] + 5), float("nan"), dtype=dtype)
    out = wide[:, : shape[1]]
    gated_activations._launch_forward(e, g, out, kind)
    assert_close(out, h, dtype)
    assert wide[:, shape[1] :].isnan().all()
    gated_activations._launch_backward(dh, e, g, kind)
    for got, want in zip((dh, e, g), (h, de, dg), strict=True):
        assert_close(got, want, dtype)


@pytest.mark.interpreter
def test_kernels_take_rows_of_any_stride():
    dh, e, g = make((6, 33), torch.float32)
    h, de, dg = truth(dh, e, g, "silu")
    wide = [torch.full((6, 40), float("nan")) for _ in range(3)]
    views = [buffer[:, 2:35].copy_(x) for buffer, x in zip(wide, (dh, e, g), strict=True)]
    out = torch.full((6, 33), float("nan"))
    gated_activations._launch_forward(views[1], views[2], out, "silu")
    assert_close(out, h, torch.float32)
    gated_activations._launch_backward(*views, "silu")
    for got, want, buffer in zip(views, (h, de, dg), wide, strict=True):
        assert_close(got, want, torch.float32)
        assert buffer[:, :2].isnan().all()
        assert buffer[:, 35:].isnan().all()


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_extreme_inputs_stay_finite(kind):
    e = torch.tensor([[-60000.0, -90.0, -1e-4, 0.0, 1e-4, 90.0, 60000.0]])
    g, dh = torch.ones_like(e), torch.ones_like(e)
    h, de, dg = truth(dh, e, g, kind)
    for got, want in zip(glu_backward_(dh, e, g, kind), (h, de, dg), strict=True):
        assert_close(got, want, torch.float32)


def test_ops_pass_opcheck():
    dh, e, g = make((4, 6), torch.float32)
    torch.library.opcheck(torch.ops.fastprice.glu_forward.default, (e, g, torch.empty(4, 6), "silu"))
    torch.library.opcheck(torch.ops.fastprice.glu_backward.default, (dh, e, g, "gelu"))


def test_compiles_without_graph_breaks():
    _, e, g = make((4, 6), torch.float32)
    compiled = torch.compile(lambda e, g: glu_forward(e * 2, g, "gelu_tanh") + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(e, g), glu_forward(e * 2, g, "gelu_tanh") + 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "relu"}, "'relu' is not one of silu, gelu, gelu_tanh"),
        ({"g": torch.zeros(3, 5)}, r"g is \(3, 5\) torch.float32 on cpu, e is \(3, 4\)"),
        ({"g": torch.zeros(3, 4, dtype=torch.float16)}, "g is .* torch.float16 on cpu, e is .* torch.float32"),
        ({"e": torch.zeros(4, 3).T}, r"e has shape \(3, 4\) and strides \(1, 3\)"),
        ({"out": torch.zeros(2, 4)}, r"out is \(2, 4\)"),
    ],
)
def test_refuses_what_does_not_fit(change, words):
    arguments = {"e": torch.zeros(3, 4), "g": torch.zeros(3, 4), "kind": "silu", **change}
    with pytest.raises(ValueError, match=words):
        glu_forward(**arguments)


@pytest.mark.parametrize(
    "case", [c for c in gated_activations.compile_cases() if "bf16" in c.name], ids=lambda c: c.name
)
def test_machine_code_meets_its_requirements(case):
    assert unmet_requirements(case, compile_case(case, 90)) == []
