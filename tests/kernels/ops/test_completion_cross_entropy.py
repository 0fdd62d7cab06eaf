"""Completion-only cross-entropy against full logits in float64: values, gradients, memory, and the kernel."""

from __future__ import annotations

import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastprice_kernels import reference
from fastprice_kernels.ops import completion_cross_entropy as loss_module
from fastprice_kernels.ops import softmax_rows as softmax_module
from fastprice_kernels.ops.completion_cross_entropy import (
    completion_cross_entropy,
    cross_entropy_sums,
    labeled_positions,
    mean_loss,
    shift_labels,
)
from fastprice_kernels.ops.softmax_rows import SoftmaxOptions, softmax_rows

# Relative to the largest entry. 16 bits: logits are rounded once, their gradient once, the product once.
BANDS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(BANDS)


def make(
    *shape: int, vocabulary: int, dtype: torch.dtype, labeled: float = 0.5, bias: bool = False, seed: int = 0
) -> SimpleNamespace:
    """Hidden states (*shape), weight and labels (*shape[:-1]) with about that share labeled."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, vocabulary, shape[:-1], generator=generator)
    labels[torch.rand(shape[:-1], generator=generator) >= labeled] = -100
    return SimpleNamespace(
        hidden=draw(*shape).requires_grad_(),
        weight=(draw(vocabulary, shape[-1]) / math.sqrt(shape[-1])).requires_grad_(),
        bias=draw(vocabulary).requires_grad_() if bias else None,
        labels=labels,
    )


def parts(case: SimpleNamespace) -> list[torch.Tensor]:
    return [case.hidden, case.weight] + ([case.bias] if case.bias is not None else [])


def run(function, case: SimpleNamespace, **options) -> list[torch.Tensor]:
    """Loss, and gradients of hidden, head and bias for a loss that is scaled by 3."""
    loss = function(case.hidden, case.weight, case.labels, bias=case.bias, **options)
    return [loss, *torch.autograd.grad(loss * 3, parts(case))]


def truth(case: SimpleNamespace, **options) -> list[torch.Tensor]:
    double = SimpleNamespace(
        **{name: part.detach().double().requires_grad_() if part is not None and part.is_floating_point() else part
           for name, part in vars(case).items()}
    )  # fmt: skip
    return run(reference.completion_cross_entropy, double, **options)


def assert_near(got: torch.Tensor, want: torch.Tensor, band: float) -> None:
    assert got.shape == want.shape
    assert got.isfinite().all()
    if got.numel():
        worst = (got.double() - want.double()).abs().max().item()
        assert worst <= band * max(want.abs().max().item(), 1e-9), f"off by {worst}, largest entry {want.abs().max()}"


def assert_agrees(case: SimpleNamespace, chunk: int | None = None, **options) -> None:
    got, want = run(completion_cross_entropy, case, chunk=chunk, **options), truth(case, **options)
    assert got[0].dtype == (torch.float64 if case.hidden.dtype == torch.float64 else torch.float32)
    for value, other, leaf in zip(got, want, [None, *parts(case)], strict=True):
        assert leaf is None or value.dtype == leaf.dtype
        assert_near(value, other, BANDS[case.hidden.dtype])


def test_tensors_that_are_not_contiguous():
    case = make(7, 9, 16, vocabulary=23, dtype=torch.float64)
    case.hidden = case.hidden.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    case.weight = case.weight.detach().T.contiguous().T.requires_grad_()
    case.labels = case.labels.repeat_interleave(2, 1)[:, ::2]
    assert not any(part.is_contiguous() for part in (case.hidden, case.weight, case.labels))
    assert_agrees(case, chunk=4)


def test_positions_may_be_padded_with_any_that_predict_nothing():
    case = make(3, 9, 16, vocabulary=23, dtype=torch.float64)
    found = labeled_positions(case.labels)
    padded = torch.cat([found, found.new_full((5,), 26)])  # the last position predicts nothing
    want = run(completion_cross_entropy, case, chunk=4)
    for value, other in zip(run(completion_cross_entropy, case, positions=padded, chunk=4), want, strict=True):
        assert_near(value, other, 1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("bias", [False, True])
def test_agrees_with_full_logits(dtype, chunk, bias):
    assert_agrees(make(9, 7, 41, vocabulary=53, dtype=dtype, bias=bias), chunk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"num_items": 17.0},
        {"num_items": torch.tensor(17)},
        {"softcap": 2.0},
        {"logit_scale": 0.0625, "softcap": 0.1},
        {"logit_scale": 3.0},
        {"shift": False},
        {"ignore_index": 5},
    ],
    ids=str,
)
def test_options(dtype, options):
    case = make(2, 11, 16, vocabulary=37, dtype=dtype, bias=True)
    if "ignore_index" in options:
        case.labels[case.labels == -100] = 5
    assert_agrees(case, 4, **options)


@pytest.mark.parametrize("shape", [(3, 16), (16,), (2, 0, 16), (0, 4, 16), (2, 2, 3, 16)])
def test_shapes(shape):
    case = make(*shape, vocabulary=37, dtype=torch.float64) if len(shape) > 1 else None
    if case is None:  # one position, its label already in place
        case = make(1, 16, vocabulary=37, dtype=torch.float64, labeled=1.0)
        case.hidden, case.labels = case.hidden.detach()[0].requires_grad_(), case.labels[0]
        assert_agrees(case, shift=False)
    else:
        assert_agrees(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"num_items": 5}, {"num_items": torch.tensor(0)}], ids=str
)
def test_without_labels_loss_and_gradients_are_zero(dtype, options):
    case = make(2, 5, 8, vocabulary=13, dtype=dtype, labeled=0.0, bias=True)
    with torch.no_grad():
        case.hidden[0, 0, 0] = float("nan")  # padding may hold anything
    for value in run(completion_cross_entropy, case, **options):
        assert torch.equal(value, torch.zeros_like(value))


def test_hidden_states_at_unlabeled_positions_have_no_effect():
    case = make(2, 9, 8, vocabulary=13, dtype=torch.float32)
    want = run(completion_cross_entropy, case)
    unlabeled = torch.ones(18, dtype=torch.bool)
    unlabeled[labeled_positions(case.labels)] = False
    with torch.no_grad():
        case.hidden[unlabeled.view(2, 9)] = float("inf")
    for value, other in zip(run(completion_cross_entropy, case), want, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulated_micro_batches_equal_one_batch(dtype):
    """8 x 1 with `num_items` is 1 x 8: the losses add up, and so do the gradients."""
    case = make(8, 9, 16, vocabulary=37, dtype=dtype)
    items = labeled_positions(case.labels).numel()
    want = truth(case)
    losses, d_hidden, d_weight = [], [], torch.zeros_like(want[2])
    for hidden, labels in zip(case.hidden.split(1), case.labels.split(1), strict=True):
        piece = SimpleNamespace(hidden=hidden, weight=case.weight, bias=None, labels=labels)
        loss, dh, dw = run(completion_cross_entropy, piece, num_items=torch.tensor(items))
        losses.append(loss)
        d_hidden.append(dh)
        d_weight += dw.double()
    for got, other in zip((sum(losses), torch.cat(d_hidden), d_weight), want, strict=True):
        assert_near(got, other, BANDS[dtype])


def test_labels_of_any_integer_dtype():
    case = make(2, 9, 8, vocabulary=13, dtype=torch.float64)
    want = truth(case)
    for dtype in (torch.int32, torch.int8):
        narrow = SimpleNamespace(**{**vars(case), "labels": case.labels.to(dtype)})
        for value, other in zip(run(completion_cross_entropy, narrow), want, strict=True):
            assert_near(value, other, 1e-13)


def test_given_positions_equal_found_ones():
    case = make(3, 9, 8, vocabulary=13, dtype=torch.float64)
    found = labeled_positions(case.labels)
    unlabeled = torch.tensor([8, 17, 26])  # the last of each row predicts nothing
    want = run(completion_cross_entropy, case)
    for positions in (found, torch.cat([unlabeled, found.flip(0)])):
        for value, other in zip(run(completion_cross_entropy, case, positions=positions, chunk=4), want, strict=True):
            assert_near(value, other, 1e-13)


def test_only_inputs_that_require_a_gradient_get_one():
    case = make(2, 9, 8, vocabulary=13, dtype=torch.float64, bias=True)
    _, dh, dw, db = truth(case, reduction="sum")
    for wanted, gradient in (("hidden", dh), ("weight", dw), ("bias", db)):
        alone = SimpleNamespace(**{k: v if k in (wanted, "labels") else v.detach() for k, v in vars(case).items()})
        loss = completion_cross_entropy(alone.hidden, alone.weight, alone.labels, bias=alone.bias, reduction="sum")
        (got,) = torch.autograd.grad(loss * 3, getattr(alone, wanted))
        assert_near(got, gradient, 1e-13)
    with torch.no_grad():
        loss = completion_cross_entropy(case.hidden, case.weight, case.labels, bias=case.bias, reduction="sum")
    assert not loss.requires_grad


def test_fp16_does_not_lose_small_gradients_of_a_mean():
    """A gradient of 1e-5 / 4,096 is below fp16; a loss scale of 2^16, as GradScaler uses, must restore it."""
    case = make(1, 4097, 8, vocabulary=64, dtype=torch.float16, labeled=1.0)
    loss = completion_cross_entropy(case.hidden, case.weight.detach(), case.labels)
    (got,) = torch.autograd.grad(loss * 2.0**16, case.hidden)
    want = truth(case)[1] / 3 * 2.0**16
    assert_near(got, want, BANDS[torch.float16])
    small = (want.abs() > 1e-3) & (want.abs() < 0.05)
    assert small.any()
    assert (got[small] != 0).all()


def test_statistics():
    case = make(3, 9, 16, vocabulary=37, dtype=torch.float32)
    with torch.no_grad():
        case.weight.mul_(8)
    sums = cross_entropy_sums(
        case.hidden, case.weight, shift_labels(case.labels), bias=None, ignore_index=-100, softcap=20.0,
        logit_scale=1.0, positions=None, chunk=5,
    )  # fmt: skip
    logits = 20 * torch.tanh(case.hidden @ case.weight.T / 20)
    labels = torch.nn.functional.pad(case.labels[:, 1:], (0, 1), value=-100)
    logits, labels = logits[labels != -100], labels[labels != -100]
    assert sums.labeled == labels.numel()
    assert sums.correct == (logits.argmax(-1) == labels).sum()
    torch.testing.assert_close(sums.entropy, torch.distributions.Categorical(logits=logits).entropy().sum().detach())
    torch.testing.assert_close(mean_loss(sums), torch.nn.functional.cross_entropy(logits, labels))
    assert not any(value.requires_grad for value in sums[1:])


def test_gradcheck():
    """Of the loss alone, on fresh graphs: a graph's backward runs once."""
    case = make(2, 5, 6, vocabulary=7, dtype=torch.float64, bias=True, labeled=0.8)
    leaves = parts(case)
    grads = torch.autograd.grad(
        completion_cross_entropy(*leaves[:2], case.labels, bias=leaves[2], softcap=3.0, logit_scale=1.5), leaves
    )
    for leaf, grad in zip(leaves, grads, strict=True):
        direction = torch.randn_like(leaf)
        ends = []
        for sign in (1, -1):
            moved = [x + sign * 1e-6 * direction if x is leaf else x for x in leaves]
            ends.append(completion_cross_entropy(*moved[:2], case.labels, bias=moved[2], softcap=3.0, logit_scale=1.5))
        slope = ((ends[0] - ends[1]) / 2e-6).item()
        assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-7, abs=1e-9)


def test_a_second_backward_raises():
    case = make(2, 5, 6, vocabulary=7, dtype=torch.float32)
    loss = completion_cross_entropy(case.hidden, case.weight, case.labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_casts_as_linear_does():
    case = make(2, 9, 16, vocabulary=37, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(completion_cross_entropy, case)
    for value, other in zip(got, truth(case), strict=True):
        assert value.dtype == torch.float32
        assert_near(value, other, BANDS[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(("rows", "vocabulary"), [(9, 41), (3, 4096), (2, 9001), (1, 1)])
@pytest.mark.interpreter
def test_kernel_agrees_with_the_cpu_path(rows, vocabulary, gradient, softcap, dtype):
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(rows, vocabulary, generator=generator) * 4).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[-1] = logits[-1].argmax()
    if rows > 2:
        labels[1] = -100
        logits[2, : vocabulary // 2] = logits[2].max()  # a tie: the first of the largest counts
        labels[2] = 0
    wide = torch.full((rows, vocabulary + 3), float("nan"), dtype=dtype)
    got, want = wide[:, :vocabulary].copy_(logits), logits.clone()
    statistics = [torch.full((rows, 3), float("nan")) for _ in range(2)]
    options = SoftmaxOptions(softcap=softcap, scale=0.5, gradient=gradient)
    softmax_module._launch(got, labels, statistics[0], options)
    softmax_rows(want, labels, statistics[1], options)
    torch.testing.assert_close(statistics[0], statistics[1], rtol=1e-5, atol=1e-5)
    assert wide[:, vocabulary:].isnan().all()
    if gradient:
        torch.testing.assert_close(got, want, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)
    else:
        assert torch.equal(got, logits)


@pytest.mark.interpreter
def test_a_label_outside_the_vocabulary_has_the_loss_nan():
    statistics = torch.zeros(2, 3)
    softmax_module._launch(torch.zeros(2, 5), torch.tensor([5, -1]), statistics, SoftmaxOptions())
    assert statistics[:, 0].isnan().all()


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of every storage that is made inside and still alive, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def own_storages(counter: PeakBytes, *tensors: torch.Tensor) -> None:
    for t in tensors:
        counter.seen.add(t.untyped_storage()._cdata)


@pytest.mark.parametrize(
    ("labeled", "share", "dtype"),
    [(1.0, 0.05, torch.float32), (0.02, 0.012, torch.float32), (0.02, 0.012, torch.bfloat16)],
)
def test_peak_memory_of_a_step_measured(labeled, share, dtype):
    """4,096 tokens, head and vocabulary of a 1B model made 32 times smaller; everything that is allocated counts."""
    tokens, vocabulary, width = 4096, 4008, 64
    case = make(1, tokens, width, vocabulary=vocabulary, dtype=dtype, labeled=labeled)
    head, counter = case.weight.detach(), PeakBytes()
    own_storages(counter, case.hidden, head, case.labels)
    with counter:
        # The op's body, since a dispatch mode does not look inside an op.
        positions = labeled_positions(case.labels)
        flat = shift_labels(case.labels).flatten()
        totals, dh, _, _ = loss_module._compute(
            case.hidden.detach()[0], head, None, flat, positions, -100, None, 1.0, 0, True, False, False
        )
        dh.mul_(1 / totals[1])
    excess = counter.peak - (dh.nbytes if labeled < 0.5 else 0)
    assert excess <= share * tokens * vocabulary * dtype.itemsize
    want = torch.autograd.grad(reference.completion_cross_entropy(case.hidden, head, case.labels), case.hidden)[0]
    assert_near(dh[None], want, BANDS[dtype])


@pytest.mark.parametrize(("labeled", "share"), [(4096, 0.05), (82, 0.012)])
@pytest.mark.parametrize("width", [2048, 4096])
def test_peak_memory_at_full_size(labeled, share, width, monkeypatch):
    """4,096 x 128,256 in bf16 under fake tensors; the result dH counts where everything is labeled.

    As on CUDA: there the kernel works in place, so it is left out, and a logit needs no bytes but its own.
    """
    monkeypatch.setattr(loss_module, "softmax_rows", lambda *arguments: None)
    chunk_rows = loss_module._chunk_rows
    monkeypatch.setattr(loss_module, "_chunk_rows", lambda *a: chunk_rows(*a[:5], 0, *a[6:]))
    with FakeTensorMode():
        hidden = torch.empty(4096, width, dtype=torch.bfloat16)
        weight = torch.empty(128256, width, dtype=torch.bfloat16)
        labels = torch.empty(4096, dtype=torch.long)
        positions = torch.empty(labeled, dtype=torch.long)
        counter = PeakBytes()
        own_storages(counter, hidden, weight, labels, positions)
        with counter:
            _, dh, _, _ = loss_module._sums_in_chunks(
                hidden, weight, None, labels, positions, SoftmaxOptions(), 0, (True, False, False)
            )
            dh.mul_(0.5)
        excess = counter.peak - (dh.nbytes if labeled < 4096 else 0)
    full = 4096 * 128256 * 2
    print(f"D {width}, {labeled} labeled: {counter.peak / 2**20:.1f} MiB, {counter.peak / full:.2%} of all logits")
    assert 0 < excess <= share * full


MEBI = 2**20


@pytest.mark.parametrize(
    ("labeled", "free", "rows"),
    [
        (180, 0, 32),
        (180, 8 * MEBI, 32),  # no more than those
        (180, 128 * MEBI, 180),  # W is read once a product
        (600, 128 * MEBI, 300),  # 491 rows would fit: two chunks of equal size, and not one of 109 after one of 491
        (4096, 128 * MEBI, 456),
        (0, 128 * MEBI, 1),
    ],
)
def test_rows_of_a_chunk_by_free_memory(labeled, free, rows):
    assert loss_module._chunk_rows(4096, labeled, 128256, 4096, 2, 0, False, free) == rows


@given(st.integers(0, 5000), st.integers(0, 2**28), st.booleans())
def test_free_memory_is_never_exceeded_and_never_makes_a_chunk_smaller(labeled, free, trains):
    sizes = (5000, labeled, 1000, 64, 2, 0, trains)
    before, rows = (loss_module._chunk_rows(*sizes, given) for given in (0, free))
    row = 1000 * 2 + 2 * 64 * 2
    assert before <= rows
    assert rows * row <= max(free, before * row)
    assert -(-labeled // rows) <= max(1, -(-labeled // max(1, free // row)))


def test_peak_memory_with_free_memory(monkeypatch):
    """As above: 180 of 4,096 rows at once; the chunk's logits, rows and dH are within what is free."""
    monkeypatch.setattr(loss_module, "softmax_rows", lambda *arguments: None)
    free, labeled = 64 * MEBI, 180
    chunk = loss_module._chunk_rows(4096, labeled, 128256, 4096, 2, 0, False, free)
    assert chunk == labeled
    with FakeTensorMode():
        hidden = torch.empty(4096, 4096, dtype=torch.bfloat16)
        weight = torch.empty(128256, 4096, dtype=torch.bfloat16)
        labels = torch.empty(4096, dtype=torch.long)
        positions = torch.empty(labeled, dtype=torch.long)
        counter = PeakBytes()
        own_storages(counter, hidden, weight, labels, positions)
        with counter:
            _, dh, _, _ = loss_module._sums_in_chunks(
                hidden, weight, None, labels, positions, SoftmaxOptions(), chunk, (True, False, False)
            )
    assert 2 * labeled * 128256 <= counter.peak - dh.nbytes <= free


def test_op_passes_opcheck():
    case = make(6, 8, vocabulary=13, dtype=torch.float32, bias=True)
    for wants in ((True, True, True), (False, False, False)):
        for positions in (None, torch.tensor([0, 3])):
            torch.library.opcheck(
                torch.ops.fastprice.completion_cross_entropy.default,
                (case.hidden.detach(), case.weight.detach(), case.bias.detach(), case.labels, positions,
                 -100, 2.0, 1.0, 0, *wants),
            )  # fmt: skip


def test_compiles_without_graph_breaks():
    case = make(2, 9, 8, vocabulary=13, dtype=torch.float32, bias=True)

    def step(hidden, weight, bias):
        return completion_cross_entropy(hidden * 2, weight, case.labels, bias=bias, num_items=torch.tensor(4.0)) + 1

    want = torch.autograd.grad(step(*parts(case)), parts(case))
    got = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(*parts(case)), parts(case))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": torch.full((2, 5), 13)}, "label 13 is neither -100 nor one of the 13 tokens"),
        ({"labels": torch.full((2, 5), -1)}, "label -1 is neither"),
        ({"labels": torch.zeros(2, 4, dtype=torch.long)}, r"\(2, 5, 8\) has other positions than labels \(2, 4\)"),
        ({"labels": torch.zeros(2, 5)}, "labels are torch.float32"),
        ({"lm_head_weight": torch.zeros(13, 9)}, r"hidden is 8 wide, lm_head_weight is \(13, 9\)"),
        ({"lm_head_weight": torch.zeros(13, 8, dtype=torch.float16)}, "hidden is torch.float32, .* torch.float16"),
        ({"bias": torch.zeros(12)}, r"bias \(12,\) does not fit a vocabulary of 13 tokens"),
        ({"reduction": "none"}, "'none' is neither 'mean' nor 'sum'"),
        ({"softcap": 0.0}, "softcap 0.0 is not positive"),
        ({"chunk": 0}, "chunk 0 is not positive"),
        ({"lm_head_weight": torch.zeros(13, 8, device="meta")}, "lm_head_weight is on meta, hidden is on cpu"),
    ],
)
def test_refuses_what_does_not_fit(change, words):
    arguments = {
        "hidden": torch.zeros(2, 5, 8),
        "lm_head_weight": torch.zeros(13, 8),
        "labels": torch.zeros(2, 5, dtype=torch.long),
        **change,
    }
    with pytest.raises(ValueError, match=words):
        completion_cross_entropy(**arguments)
