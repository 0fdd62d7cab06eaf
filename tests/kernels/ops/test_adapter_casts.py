"""Casts of adapters are shared by all uses of a step, and no way of changing a weight leaves one behind."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.kernels.adapted_models import batch, gradients, make
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastprice_kernels.ops import adapter_casts
from fastprice_kernels.ops.lora import apply_projections
from fastprice_kernels.ops.lora_products import Projection, ProjectionGroup
from fastprice_kernels.patching.install import install, uninstall
from fastprice_kernels.patching.installation import PATCH, Patch

pytest.importorskip("bitsandbytes")


@pytest.fixture
def refreshes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry, the number of tensors, for each refresh."""
    made: list[int] = []
    copy_all = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: made.append(len(to)) or copy_all(to, of))
    return made


def adapters(rank: int = 3) -> list[nn.Parameter]:
    """A, B, A, B in fp32."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rank, 16), (8, rank), (rank, 16), (12, rank)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def group_of(parts: list[nn.Parameter], dtype: torch.dtype = torch.bfloat16) -> ProjectionGroup:
    weights = [torch.ones(8, 16, dtype=dtype), torch.ones(12, 16, dtype=dtype)]
    return ProjectionGroup([Projection(w, *parts[2 * i : 2 * i + 2], 2.0) for i, w in enumerate(weights)])


def run(group: ProjectionGroup, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.arange(48, dtype=dtype).view(3, 16) / 48
    return torch.cat(apply_projections(x, group), 1)


def truth(parts: list[nn.Parameter], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """By a new group, which has no casts yet."""
    return run(group_of(parts, dtype), dtype)


def test_one_refresh_serves_forward_recomputation_and_backward_of_all_micro_batches(refreshes) -> None:
    parts = adapters()
    group, optimizer = group_of(parts), torch.optim.AdamW(parts, lr=0.1)
    for step in range(3):
        for _ in range(2):
            x = torch.ones(3, 16, dtype=torch.bfloat16, requires_grad=True)
            checkpoint(
                lambda x: sum(y.float().sum() for y in apply_projections(x, group)), x, use_reentrant=False
            ).backward()
        assert refreshes == [4] * (step + 1)  # two A and two B by one operation
        optimizer.step()
        optimizer.zero_grad()


class RawOptimizer(torch.optim.Optimizer):
    """Writes past the version counters, as bitsandbytes' kernels do."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1.0)


def swap(parts: list[nn.Parameter]) -> None:
    for each in parts:
        each.data = each.data + 1.0


def swap_twice(parts: list[nn.Parameter]) -> None:
    """The second storage may get the address of the first."""
    for each in parts:
        each.data = each.data.clone()
        each.data = each.data + 1.0


def by_hand(parts: list[nn.Parameter]) -> None:
    for each in parts:
        each.data.add_(1.0)
        each.grad = None


def in_place(parts: list[nn.Parameter]) -> None:
    with torch.no_grad():
        torch._foreach_add_(parts, 1.0)


def in_other_dtype(parts: list[nn.Parameter]) -> None:
    for each in parts:
        each.data = (each.data + 1.0).double()


@pytest.mark.parametrize(
    "change",
    [swap, swap_twice, by_hand, in_place, in_other_dtype, lambda parts: RawOptimizer(parts).step()],
    ids=["data swapped", "data swapped twice", "data by hand", "in place", "another dtype", "raw optimizer"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_changed_weights_are_cast_again(change: Callable[[list[nn.Parameter]], None], dtype: torch.dtype) -> None:
    parts = adapters()
    group = group_of(parts, dtype)
    run(group, dtype).sum().backward()  # so that there are gradients, as in a later micro-batch
    before = run(group, dtype)
    change(parts)
    after = run(group, dtype)
    assert not torch.equal(after, before)
    assert torch.equal(after, truth(parts, dtype))
    after.sum().backward()  # with the casts of that forward


def test_weights_without_gradients_are_cast_at_each_forward() -> None:
    parts = adapters()
    group = group_of(parts)
    for _ in range(2):
        with torch.no_grad():
            run(group)
            for each in parts:
                each.data.add_(1.0)
            assert torch.equal(run(group), truth(parts))
        with torch.inference_mode():
            assert torch.equal(run(group), truth(parts))
        run(group).sum().backward()


def test_a_group_casts_to_several_dtypes() -> None:
    parts = adapters()
    weights = [torch.ones(8, 16), torch.ones(12, 16)]
    group = ProjectionGroup([Projection(w, *parts[2 * i : 2 * i + 2], 2.0) for i, w in enumerate(weights)])
    x = torch.arange(48.0).view(3, 16) / 48
    alone = apply_projections(x, group)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = apply_projections(x.bfloat16(), group)
    again = apply_projections(x, group)
    for y, y16, y32 in zip(alone, half, again, strict=True):
        assert y16.dtype == torch.bfloat16
        assert torch.equal(y, y32)
        torch.testing.assert_close(y16.float(), y, rtol=0.03, atol=0.2)


def test_an_optimizer_step_between_forward_and_backward_raises() -> None:
    parts = adapters()
    group, optimizer = group_of(parts), torch.optim.SGD(parts, lr=0.1)
    run(group).sum().backward()
    y = run(group).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_dispatch_mode_sees_a_refresh_in_every_forward(refreshes) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    group = group_of(adapters())
    run(group).sum().backward()
    run(group)
    assert len(refreshes) == 1
    refreshes.clear()
    with Passes():
        run(group)
    assert len(refreshes) == 1


def test_adapters_in_the_dtype_of_the_products_are_not_copied(refreshes) -> None:
    a, b = adapters()[:2]
    group = ProjectionGroup([Projection(torch.ones(8, 16), a, b)])
    apply_projections(torch.ones(2, 16), group)[0].sum().backward()
    assert refreshes == []
    stacked, (own,) = group.adapters(torch.float32, in_backward=False)
    assert (stacked.data_ptr(), own.data_ptr()) == (a.data_ptr(), b.data_ptr())


def test_a_model_refreshes_each_group_once_a_step_and_frees_its_casts(refreshes) -> None:
    model = make(compute=torch.bfloat16)
    install(model)
    layers = len(model.get_decoder().layers)
    for _ in range(2):
        for micro_batch in range(2):
            model(**batch(micro_batch)).loss.backward()
        assert len(refreshes) == 4 * layers  # qkv, o, gate and up, down
        refreshes.clear()
        model.zero_grad()
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float("nan"))
    assert all(value.isfinite().all() for value in gradients(model))
    patches = [patch for each in model.modules() if isinstance(patch := each.__dict__.get(PATCH), Patch)]
    groups = [weakref.ref(group) for patch in patches for _, group in patch.groups.values()]
    assert len(set(groups)) == 4 * layers
    del patches
    uninstall(model)
    gc.collect()
    assert not any(group() for group in groups)


def test_the_count_of_optimizer_steps_grows() -> None:
    before = adapter_casts._steps
    RawOptimizer(adapters()).step()
    assert adapter_casts._steps == before + 1
