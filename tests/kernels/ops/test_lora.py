"""LoRA products against float64 autograd: dtypes, both forms, 4-bit weights, odd shapes, compile, checkpointing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastprice_kernels import reference
from fastprice_kernels.ops import lora_products
from fastprice_kernels.ops.lora import Projection, apply_projections, lora_linear, lora_projections, lora_qkv
from fastprice_kernels.ops.lora_mlp import lora_mlp
from fastprice_kernels.ops.lora_products import ProjectionGroup
from fastprice_kernels.ops.nf4_dequantize import dequantize_nf4

bnb = pytest.importorskip("bitsandbytes")

# Relative to the largest entry of what is compared: products of up to 64 terms, rounded to the dtype a few times.
BANDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 6e-3, torch.bfloat16: 4e-2}
DTYPES = list(BANDS)
FORMS = pytest.mark.parametrize("augmented", [False, True], ids=["separate", "augmented"])


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).div_(math.sqrt(shape[-1])).to(dtype)


def make(
    n: int,
    k: int,
    rank: int,
    seed: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    nf4: bool = False,
    scale: float = 1.7,
) -> Projection:
    weight, state = draw(n, k, seed=seed, dtype=dtype), None
    if nf4:
        source = weight.float() if dtype == torch.float64 else weight
        weight, state = bnb.functional.quantize_4bit(source, compress_statistics=True, quant_type="nf4")
    a = draw(rank, k, seed=seed + 1, dtype=dtype).requires_grad_() if rank else None
    b = draw(n, rank, seed=seed + 2, dtype=dtype).requires_grad_() if rank else None
    vector = draw(n, seed=seed + 3, dtype=dtype).requires_grad_() if bias else None
    return Projection(weight, a, b, scale, vector, state)


def dense(p: Projection) -> torch.Tensor:
    weight = p.weight if p.quant_state is None else dequantize_nf4(p.weight, p.quant_state, dtype=torch.float32)
    return weight.double()


def truth(p: Projection, x: torch.Tensor) -> torch.Tensor:
    return reference.lora_linear(
        x,
        dense(p),
        *(None if v is None else v.double() for v in (p.lora_a, p.lora_b)),
        p.scale,
        None if p.bias is None else p.bias.double(),
    )


def leaves(x: torch.Tensor, *projections: Projection) -> list[torch.Tensor]:
    return [x, *(v for p in projections for v in (p.lora_a, p.lora_b, p.bias) if v is not None)]


def assert_near(got: torch.Tensor, want: torch.Tensor, band: float) -> None:
    assert got.shape == want.shape
    assert got.isfinite().all()
    if got.numel():
        worst = (got.double() - want.double()).abs().max().item()
        assert worst <= band * max(want.abs().max().item(), 1e-3), f"off by {worst}, largest entry {want.abs().max()}"


def compare(got: torch.Tensor, want: torch.Tensor, inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Outputs, and gradients of all inputs for a random cotangent."""
    cotangent = draw(*want.shape, seed=99, dtype=dtype)
    assert got.dtype == dtype
    assert_near(got, want, BANDS[dtype])
    grads = torch.autograd.grad(got, inputs, cotangent)
    expected = torch.autograd.grad(want, inputs, cotangent.double())
    for leaf, grad, other in zip(inputs, grads, expected, strict=True):
        assert grad.dtype == leaf.dtype
        assert_near(grad, other, BANDS[dtype])


@FORMS
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "n", "rank", "bias"),
    [((9, 7, 41), 13, 5, False), ((9, 7, 41), 13, 5, True), ((64,), 64, 8, False), ((0, 41), 13, 5, True),
     ((2, 0, 41), 13, 5, False), ((3, 128), 1, 16, True), ((5, 41), 13, 0, True)],
)  # fmt: skip
def test_linear(shape, n, rank, bias, dtype, nf4, augmented):
    p = make(n, shape[-1], rank, 1, dtype, bias=bias, nf4=nf4)
    x = draw(*shape, seed=7, dtype=dtype).requires_grad_()
    y = lora_linear(
        x, p.weight, p.lora_a, p.lora_b, p.scale, bias=p.bias, quant_state=p.quant_state, augmented=augmented
    )
    compare(y, truth(p, x.double()), leaves(x, p), dtype)


@FORMS
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_inputs_weights_and_gradients_that_are_not_contiguous(nf4, augmented):
    p = make(13, 41, 5, 1, torch.float64, nf4=nf4)
    if not nf4:
        p = replace(p, weight=p.weight.T.contiguous().T)
    a, b = (part.detach().T.contiguous().T.requires_grad_() for part in (p.lora_a, p.lora_b))
    p = replace(p, lora_a=a, lora_b=b)
    x = draw(41, 9, 7, seed=7, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    y = lora_projections(x, [p], augmented=augmented)[0].transpose(0, 1)  # so its gradient comes transposed
    compare(y, truth(p, x).transpose(0, 1), leaves(x, p), torch.float64)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("missing", [(), ("k",), ("q", "k", "v")])
def test_qkv(missing, dtype, augmented):
    shapes = {"q": (24, 4), "k": (8, 5), "v": (8, 16)}
    ps = {
        name: make(n, 41, 0 if name in missing else rank, 10 * i, dtype, bias=name != "v", nf4=name == "q")
        for i, (name, (n, rank)) in enumerate(shapes.items())
    }
    x = draw(3, 6, 41, seed=5, dtype=dtype).requires_grad_()
    got = lora_qkv(x, ps["q"], ps["k"], ps["v"], augmented=augmented)
    want = [truth(p, x.double()) for p in ps.values()]
    compare(torch.cat(got, -1), torch.cat(want, -1), leaves(x, *ps.values()), dtype)


@FORMS
def test_unused_results_do_not_contribute_to_the_gradient(augmented):
    ps = [make(8, 16, 4, 10 * i, torch.float64) for i in range(3)]
    x = draw(5, 16, seed=5).requires_grad_()
    _, k, _ = lora_projections(x, ps, augmented=augmented)
    dx, da, db = torch.autograd.grad(k.sum(), (x, ps[1].lora_a, ps[1].lora_b))
    for got, want in zip(
        (dx, da, db),
        torch.autograd.grad(truth(ps[1], x).sum(), (x, ps[1].lora_a, ps[1].lora_b)),
        strict=True,
    ):
        assert_near(got, want, 1e-13)


def mlp(dtype: torch.dtype, *, nf4: bool = False, bias: bool = False) -> list[Projection]:
    sizes = [(29, 41, 5), (29, 41, 3), (23, 29, 4)]
    return [make(n, k, r, 10 * i, dtype, nf4=nf4, bias=bias) for i, (n, k, r) in enumerate(sizes)]


def mlp_truth(x: torch.Tensor, ps: list[Projection], kind: str) -> torch.Tensor:
    gate, up, down = ps
    return truth(down, reference.glu(truth(gate, x.double()), truth(up, x.double()), kind))


@FORMS
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("nf4", "bias", "shape"), [(False, True, (9, 7, 41)), (True, False, (41,)), (True, True, (0, 41))]
)
def test_mlp(nf4, bias, shape, dtype, kind, augmented):
    ps = mlp(dtype, nf4=nf4, bias=bias)
    x = draw(*shape, seed=5, dtype=dtype).requires_grad_()
    compare(lora_mlp(x, *ps, activation=kind, augmented=augmented), mlp_truth(x, ps, kind), leaves(x, *ps), dtype)


@FORMS
def test_gradcheck(augmented):
    """Of the projections; an MLP's backward runs once a graph, gradcheck needs two."""
    ps = mlp(torch.float64, bias=True)[:2]

    def run(x, *parts):
        triples = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
        made = [replace(p, lora_a=a, lora_b=b, bias=c) for p, (a, b, c) in zip(ps, triples, strict=True)]
        return lora_projections(x, made, augmented=augmented)

    assert torch.autograd.gradcheck(run, leaves(draw(3, 41, seed=5).requires_grad_(), *ps), fast_mode=True)


@FORMS
def test_only_inputs_that_require_a_gradient_get_one(augmented):
    ps = mlp(torch.float64)
    frozen_x = draw(4, 41, seed=5)
    y = lora_mlp(frozen_x, *ps, augmented=augmented)
    want = mlp_truth(frozen_x, ps, "silu")
    for got, expected in zip(
        *(torch.autograd.grad(v.sum(), leaves(frozen_x, *ps)[1:]) for v in (y, want)), strict=True
    ):
        assert_near(got, expected, 1e-13)

    still = [replace(p, lora_a=p.lora_a.detach(), lora_b=p.lora_b.detach()) for p in ps]
    x = frozen_x.clone().requires_grad_()
    assert_near(*(torch.autograd.grad(v.sum(), x)[0] for v in
                  (lora_mlp(x, *still, augmented=augmented), mlp_truth(x, still, "silu"))), 1e-13)  # fmt: skip


@FORMS
def test_inputs_that_are_not_contiguous(augmented):
    p = make(13, 41, 5, 1, torch.float32, nf4=True)
    base = draw(41, 7, 9, seed=7, dtype=torch.float32).requires_grad_()
    x = base.permute(2, 1, 0)
    y = lora_linear(x, p.weight, p.lora_a, p.lora_b, p.scale, quant_state=p.quant_state, augmented=augmented)
    got = y.permute(2, 0, 1)  # so that the cotangent arrives with odd strides as well
    compare(got, truth(p, x.double()).permute(2, 0, 1), [base, p.lora_a, p.lora_b], torch.float32)


def test_columns_outside_a_view_are_not_written():
    """The augmented form writes next to x only in its own buffers."""
    p = make(13, 32, 16, 1, torch.float32)
    wide = torch.full((6, 48), float("nan"))
    wide[:, :32] = draw(6, 32, seed=3, dtype=torch.float32)
    y = lora_linear(wide[:, :32], p.weight, p.lora_a, p.lora_b, p.scale, augmented=True)
    assert_near(y, truth(p, wide[:, :32].double()), BANDS[torch.float32])
    assert wide[:, 32:].isnan().all()


@pytest.mark.parametrize("augmented", [False, True])
def test_results_do_not_depend_on_uninitialized_memory(monkeypatch, augmented):
    """Every buffer the products allocate is poisoned with NaN first."""
    ps = mlp(torch.float32, nf4=True)
    x = draw(6, 41, seed=5, dtype=torch.float32).requires_grad_()
    want = mlp_truth(x, ps, "silu")
    poison_new_buffers(monkeypatch)
    compare(lora_mlp(x, *ps, augmented=augmented), want, leaves(x, *ps), torch.float32)


def poison_new_buffers(monkeypatch) -> None:
    for name in ("empty", "empty_like"):
        make_empty = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _f=make_empty, **k: poison(_f(*a, **k)))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def poison(t: torch.Tensor) -> torch.Tensor:
    return t.fill_(float("nan")) if t.is_floating_point() else t


def saved_bytes(run) -> dict[int, int]:
    """Storage -> bytes of everything that autograd saves for `run`'s backward."""
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return saved


def test_linear_saves_only_x_and_the_product_of_rank_r():
    p = make(256, 128, 8, 1, torch.float32, nf4=True)
    x = draw(32, 128, seed=7, dtype=torch.float32).requires_grad_()
    saved = saved_bytes(lambda: lora_linear(x, p.weight, p.lora_a, p.lora_b, 1.0, quant_state=p.quant_state))
    for own in (x, p.lora_a, p.lora_b):
        saved.pop(own.untyped_storage().data_ptr())
    assert list(saved.values()) == [32 * 8 * 4]


def test_dense_weights_are_saved_from_recomputation_to_backward(monkeypatch):
    """Under checkpointing `keep_dense` dequantizes twice a step instead of three times, with equal gradients."""
    ps = mlp(torch.float32, nf4=True)
    x = draw(6, 41, seed=5, dtype=torch.float32).requires_grad_()
    calls, dequantize = [], lora_products.dequantize_nf4
    monkeypatch.setattr(lora_products, "dequantize_nf4", lambda *a, **k: calls.append(1) or dequantize(*a, **k))

    def step(keep_dense: bool, *, reentrant: bool) -> list[torch.Tensor]:
        calls.clear()
        y = checkpoint(lambda v: lora_mlp(v, *ps, keep_dense=keep_dense), x, use_reentrant=reentrant)
        for leaf in leaves(x, *ps):
            leaf.grad = None
        y.square().sum().backward()
        return [leaf.grad for leaf in leaves(x, *ps)]

    for reentrant in (False, True):
        plain, n_plain = step(False, reentrant=reentrant), len(calls)
        dense, n_dense = step(True, reentrant=reentrant), len(calls)
        assert (n_plain, n_dense) == (9, 6)
        assert all(torch.equal(a, b) for a, b in zip(plain, dense, strict=True))


def test_a_second_backward_of_the_mlp_raises():
    ps = mlp(torch.float32)
    x = draw(6, 41, seed=5, dtype=torch.float32).requires_grad_()
    y = lora_mlp(x, *ps).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_an_optimizer_step_before_the_backward_is_detected():
    p = make(13, 41, 5, 1, torch.float32)
    y = lora_linear(draw(6, 41, seed=5, dtype=torch.float32), p.weight, p.lora_a, p.lora_b, 1.0)
    with torch.no_grad():
        p.lora_b.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_of_gradients_are_refused():
    p = make(13, 41, 5, 1, torch.float64)
    x = draw(6, 41, seed=5).requires_grad_()
    y = lora_linear(x, p.weight, p.lora_a, p.lora_b, 1.0).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_computes_as_linear_does(backward_inside):
    p = make(13, 41, 5, 1, torch.float32, bias=True)
    x = draw(6, 41, seed=5, dtype=torch.float32).requires_grad_()
    inputs = leaves(x, p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, p.weight, p.lora_a, p.lora_b, p.scale, bias=p.bias)
        stock = reference.lora_linear(x, p.weight, p.lora_a, p.lora_b, p.scale, p.bias)
        assert y.dtype == stock.dtype == torch.bfloat16
        if backward_inside:
            grads = torch.autograd.grad(y.sum(), inputs)
    if not backward_inside:
        grads = torch.autograd.grad(y.sum(), inputs)
    want = truth(p, x.double())
    assert_near(y, want, BANDS[torch.bfloat16])
    for grad, other in zip(grads, torch.autograd.grad(want.sum(), inputs), strict=True):
        assert grad.dtype == torch.float32
        assert_near(grad, other, BANDS[torch.bfloat16])


def test_adapters_in_another_dtype_get_gradients_in_their_own():
    p = make(13, 41, 5, 1, torch.bfloat16)
    p = replace(p, lora_a=p.lora_a.detach().float().requires_grad_(), lora_b=p.lora_b.detach().float().requires_grad_())
    x = draw(6, 41, seed=5, dtype=torch.bfloat16).requires_grad_()
    y = lora_linear(x, p.weight, p.lora_a, p.lora_b, p.scale)
    compare(y, truth(p, x.double()), leaves(x, p), torch.bfloat16)


@FORMS
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_compiles_without_graph_breaks(nf4, augmented):
    ps = mlp(torch.float32, nf4=nf4, bias=True)
    x = draw(6, 41, seed=5, dtype=torch.float32).requires_grad_()

    def run(x):
        y = lora_mlp(x * 2, *ps, augmented=augmented)
        return y.sum() + sum(v.sum() for v in lora_projections(x, ps[:2], augmented=augmented))

    want = torch.autograd.grad(run(x), leaves(x, *ps))
    got = torch.autograd.grad(torch.compile(run, backend="aot_eager", fullgraph=True)(x), leaves(x, *ps))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(13, 40)}, r"input is 41 wide, the weight is \(13, 40\)"),
        ({"weight": torch.zeros(13, 41, dtype=torch.float16)}, "weight is torch.float16, the input torch.float32"),
        ({"weight": torch.zeros(13, 41, requires_grad=True)}, "requires a gradient"),
        ({"lora_a": None}, "lora_b is given without the other"),
        ({"lora_a": torch.zeros(4, 41)}, r"lora_a \(4, 41\) and lora_b \(13, 5\) do not fit a weight \(13, 41\)"),
        ({"bias": torch.zeros(12)}, r"bias \(12,\) does not fit a weight \(13, 41\)"),
        ({"weight": torch.zeros(13, 41, device="meta")}, "a part is on meta, the input on cpu"),
    ],
)
def test_refuses_what_does_not_fit(change, words):
    p = replace(make(13, 41, 5, 1, torch.float32), **change)
    with pytest.raises(ValueError, match=words):
        lora_projections(torch.zeros(2, 41), [p])


def test_refuses_an_mlp_that_does_not_fit():
    gate, up, down = mlp(torch.float32)
    with pytest.raises(ValueError, match="gate gives 29 columns, up gives 29 and down takes 41"):
        lora_mlp(torch.zeros(2, 41), gate, up, replace(gate))
    with pytest.raises(ValueError, match="'relu' is not one of"):
        lora_mlp(torch.zeros(2, 41), gate, up, down, activation="relu")


# The MLP that recomputes gate and up, and the tiled one


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("kind", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputing_gate_and_up_gives_the_same_bits(dtype, kind, nf4):
    ps = mlp(dtype, nf4=nf4, bias=True)
    x = draw(9, 7, 41, seed=5, dtype=dtype).requires_grad_()
    results = []
    for options in ({}, {"recompute": True}, {"tile": 63}, {"tile": 1000}):
        y = lora_mlp(x, *ps, activation=kind, **options)
        results.append([y.detach(), *torch.autograd.grad(y, leaves(x, *ps), draw(9, 7, 23, seed=9, dtype=dtype))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tile", "shape"), [(1, (3, 41)), (4, (9, 41)), (5, (2, 5, 41)), (7, (9, 7, 41)), (3, (0, 41))]
)
def test_tiles_compute_the_whole(tile, shape, dtype):
    ps = mlp(dtype, nf4=True, bias=True)
    x = draw(*shape, seed=5, dtype=dtype).requires_grad_()
    compare(lora_mlp(x, *ps, tile=tile), mlp_truth(x, ps, "silu"), leaves(x, *ps), dtype)


def test_tiles_of_a_frozen_input_and_of_frozen_adapters():
    ps = mlp(torch.float64)
    still = [replace(ps[0], lora_a=ps[0].lora_a.detach(), lora_b=ps[0].lora_b.detach()), *ps[1:]]
    x = draw(9, 41, seed=5)
    inputs = leaves(x, *ps[1:])[1:]
    got, want = (
        torch.autograd.grad(y.square().sum(), inputs)
        for y in (lora_mlp(x, *still, tile=4), mlp_truth(x, still, "silu"))
    )
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, 1e-13)
    with pytest.raises(ValueError, match="tiles of 0 rows"):
        lora_mlp(x, *ps, tile=0)


def test_a_recomputing_mlp_saves_neither_gate_nor_up():
    ps = mlp(torch.float32, nf4=True)
    x = draw(64, 41, seed=5, dtype=torch.float32).requires_grad_()
    ranks, width = 4 * 64 * (5 + 3 + 4), 4 * 64 * 29
    for options, extra in (({}, 2 * width), ({"recompute": True}, 0), ({"tile": 16}, 0)):
        saved = saved_bytes(lambda options=options: lora_mlp(x, *ps, **options))
        for own in leaves(x, *ps):
            saved.pop(own.untyped_storage().data_ptr(), None)
        assert sum(saved.values()) == ranks + extra, options


def test_a_direction_dequantizes_each_weight_once(monkeypatch):
    ps = mlp(torch.float32, nf4=True)
    x = draw(12, 41, seed=5, dtype=torch.float32).requires_grad_()
    calls, dequantize = [], lora_products.dequantize_nf4
    monkeypatch.setattr(lora_products, "dequantize_nf4", lambda *a, **k: calls.append(1) or dequantize(*a, **k))
    for options in ({}, {"recompute": True}, {"tile": 5}):
        y = lora_mlp(x, *ps, **options).sum()
        assert len(calls) == 3, options
        y.backward()
        assert len(calls) == 6, options
        calls.clear()


@pytest.mark.parametrize("options", [{"recompute": True}, {"tile": 4}])
def test_tiles_do_not_depend_on_uninitialized_memory(monkeypatch, options):
    ps = mlp(torch.float32, nf4=True)
    x = draw(6, 41, seed=5, dtype=torch.float32).requires_grad_()
    want = mlp_truth(x, ps, "silu")
    poison_new_buffers(monkeypatch)
    compare(lora_mlp(x, *ps, **options), want, leaves(x, *ps), torch.float32)


@pytest.mark.parametrize("options", [{"recompute": True}, {"tile": 4}])
def test_a_recomputing_mlp_compiles(options):
    ps = mlp(torch.float32, nf4=True)
    x = draw(6, 41, seed=5, dtype=torch.float32).requires_grad_()

    def run(x):
        return lora_mlp(x * 2, *ps, **options).sum()

    want = torch.autograd.grad(run(x), leaves(x, *ps))
    got = torch.autograd.grad(torch.compile(run, backend="aot_eager", fullgraph=True)(x), leaves(x, *ps))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


# Scales, and the branches that only CUDA takes


@FORMS
def test_projections_of_different_scales(augmented):
    ps = [make(8, 41, 4, 1, torch.float64, scale=0.5), make(8, 41, 3, 20, torch.float64, scale=3.0)]
    x = draw(5, 41, seed=5).requires_grad_()
    got = torch.cat(lora_projections(x, ps, augmented=augmented), -1)
    compare(got, torch.cat([truth(p, x) for p in ps], -1), leaves(x, *ps), torch.float64)


def test_gradients_come_in_fp32_out_of_16_bit_products_where_the_device_has_them(monkeypatch):
    """CUDA's `out_dtype`, stood in for by fp32 products, as it accumulates: no gradient is rounded or cast."""
    p = make(13, 41, 5, 1, torch.bfloat16)
    p = replace(p, lora_a=p.lora_a.detach().float().requires_grad_(), lora_b=p.lora_b.detach().float().requires_grad_())
    x = draw(64, 41, seed=5, dtype=torch.bfloat16)
    mm, wide = torch.mm, []

    def mm_of_cuda(a, b, out_dtype=None):
        if out_dtype is None:
            return mm(a, b)
        wide.append(tuple(a.shape))
        return mm(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(lora_products, "_gives_fp32", lambda a: True)
    monkeypatch.setattr(torch, "mm", mm_of_cuda)
    y = lora_linear(x, p.weight, p.lora_a, p.lora_b, p.scale)
    cotangent = draw(64, 13, seed=9, dtype=torch.bfloat16)
    da, db = torch.autograd.grad(y, [p.lora_a, p.lora_b], cotangent)
    assert wide == [(5, 64), (13, 64)]
    assert da.dtype == db.dtype == torch.float32
    t = (p.scale * x.float() @ p.lora_a.bfloat16().float().T).bfloat16().float()
    torch.testing.assert_close(db, cotangent.float().T @ t, rtol=1e-2, atol=1e-3)
    assert not torch.equal(db, db.bfloat16().float()), "it was rounded to 16 bits on the way"


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_resident_weights_joined_as_on_cuda(monkeypatch, scale):
    """The joined product: results that may be changed in place, bands of the separate products, no dequantization."""
    ps = [make(n, 41, r, 10 * n, torch.float32, nf4=True, scale=scale) for n, r in ((24, 4), (8, 5), (8, 0))]
    x = draw(3, 6, 41, seed=5, dtype=torch.float32).requires_grad_()
    group = ProjectionGroup(ps)
    group.resident = torch.cat([dense(p).float() for p in ps])
    monkeypatch.setattr(lora_products, "dequantize_nf4", None)
    for joins in (True, False):
        monkeypatch.setattr(lora_products, "_joins", lambda x, joins=joins: joins)
        ys = apply_projections(x, group)
        for y in ys:
            y.mul_(2.0)  # RoPE changes queries and keys in place
        assert (ys[0].untyped_storage().data_ptr() == ys[1].untyped_storage().data_ptr()) is joins
        want = [2 * truth(p, x.double()) for p in ps]
        compare(torch.cat(ys, -1), torch.cat(want, -1), leaves(x, *ps), torch.float32)
