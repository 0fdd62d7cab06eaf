"""Activation checkpointing: equal losses and gradients at every recompute level, and the model restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tests.memory.small_models import FAMILIES, LAYERS, make_batch, make_model
from torch import Tensor, nn

from fastprice.errors import ConfigError
from fastprice.memory.activation_checkpointing import ActivationCheckpointing, checkpointable_layers
from fastprice.memory.recompute_levels import RECOMPUTE_LEVELS

LEVELS_BY_NAME = {level: (level,) * LAYERS for level in RECOMPUTE_LEVELS} | {
    "mixed": ("offload", "full", "selective", "none"),
    "backwards": ("none", "selective", "offload", "full"),
    "with mlp": ("full", "mlp", "selective", "mlp"),
    "apart": ("offload", "none", "offload", "selective"),
}


def step(model: Any, *, micro_batches: int = 2, autocast: bool = False) -> list[Tensor]:
    """Losses of the micro-batches, then the accumulated gradients."""
    model.zero_grad()
    torch.manual_seed(7)
    losses = []
    for seed in range(micro_batches):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = model(**make_batch(seed)).loss
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_equal(actual: list[Tensor], expected: list[Tensor], levels: Sequence[str] = ()) -> None:
    """Bit for bit, except at "selective" and "mlp" in an fp32 model: a norm makes no fp32 copy of its input there and
    so adds the input's two gradients before and not after the residual's, by which the last bits may differ."""
    for a, b in zip(actual, expected, strict=True):
        if "selective" in levels or "mlp" in levels:
            assert (a - b).abs().max() <= 4e-6 * b.abs().max()  # measured: 2.2e-6
        else:
            assert torch.equal(a, b)


@contextmanager
def kernels(model: Any, on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    from fastprice_kernels import installed

    with installed(model, loss_head=True, last_layer=True):
        yield


@pytest.mark.parametrize("use_kernels", [False, True], ids=["stock", "kernels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_equal_at_all_levels(family: str, use_kernels: bool) -> None:
    model = make_model(family)
    with kernels(model, use_kernels):
        expected = step(model)
        for levels in LEVELS_BY_NAME.values():
            with ActivationCheckpointing(model, levels):
                assert_equal(step(model), expected, levels)
        assert_equal(step(model), expected)


@pytest.mark.parametrize("use_kernels", [False, True], ids=["stock", "kernels"])
def test_losses_and_gradients_are_equal_with_a_4_bit_base(use_kernels: bool) -> None:
    model = make_model("llama", nf4=True)
    with kernels(model, use_kernels):
        expected = step(model)
        for levels in LEVELS_BY_NAME.values():
            with ActivationCheckpointing(model, levels):
                assert_equal(step(model), expected, levels)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_losses_and_gradients_are_equal_under_autocast_with_a_16_bit_base(family: str) -> None:
    model = make_model(family, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    expected = step(model, autocast=True)
    for levels in LEVELS_BY_NAME.values():
        with ActivationCheckpointing(model, levels):
            assert_equal(step(model, autocast=True), expected)


def test_recomputation_draws_the_same_dropout() -> None:
    model = make_model(dropout=0.3)
    expected = step(model)
    assert not torch.equal(expected[0], step(make_model())[0])
    for levels in LEVELS_BY_NAME.values():
        with ActivationCheckpointing(model, levels):
            assert_equal(step(model), expected, levels)


def test_gradients_of_all_weights_are_equal() -> None:
    model = make_model().get_base_model()
    model.requires_grad_(True)
    expected = step(model)
    for levels in LEVELS_BY_NAME.values():
        with ActivationCheckpointing(model, levels):
            assert_equal(step(model), expected, levels)


def _state(model: nn.Module) -> list[Any]:
    """The contents of every module's dictionary, hooks and replaced forwards included."""
    return [
        (module, {key: dict(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()})
        for module in model.modules()
    ]


@pytest.mark.parametrize("use_kernels", [False, True], ids=["stock", "kernels"])
def test_the_model_is_restored(use_kernels: bool) -> None:
    model = make_model()
    with kernels(model, use_kernels):
        before = _state(model)
        with ActivationCheckpointing(model, LEVELS_BY_NAME["mixed"]) as checkpointing:
            step(model)
            checkpointing.set_levels(LEVELS_BY_NAME["backwards"])
            step(model)
            checkpointing.set_levels(LEVELS_BY_NAME["apart"])
        assert _state(model) == before
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    before = _state(model)
    checkpointing = ActivationCheckpointing(model, LEVELS_BY_NAME["selective"])
    checkpointing.remove()
    checkpointing.remove()
    assert _state(model) == before


def test_a_layer_that_raises_leaves_no_hook_active() -> None:
    model = make_model()
    expected = step(model)
    layers = checkpointable_layers(model)
    with ActivationCheckpointing(model, LEVELS_BY_NAME["mixed"]):
        hook = layers[2].mlp.register_forward_pre_hook(_raise)  # type: ignore[union-attr,arg-type]
        with pytest.raises(ZeroDivisionError):
            step(model)
        hook.remove()
        x = torch.ones(3, requires_grad=True)
        y = x.exp()
        assert y.grad_fn._saved_result.data_ptr() == y.data_ptr()  # type: ignore[union-attr]
        assert_equal(step(model), expected, LEVELS_BY_NAME["mixed"])


def _raise(*_: Any) -> None:
    raise ZeroDivisionError


def test_evaluation_is_unaffected() -> None:
    model = make_model().eval()
    with torch.no_grad():
        expected = model(**make_batch()).logits
        with ActivationCheckpointing(model, LEVELS_BY_NAME["mixed"]):
            assert torch.equal(model(**make_batch()).logits, expected)


_NO_INPUT_GRADIENT = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


@_NO_INPUT_GRADIENT
def test_full_recomputation_runs_hooks_again_and_selective_does_not() -> None:
    model = make_model()
    calls: list[str] = []
    with ActivationCheckpointing(model, LEVELS_BY_NAME["mixed"]):
        hooks = []
        for name, layer in zip("0123", checkpointable_layers(model), strict=True):
            hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: calls.append(f"forward {name}")))
            hooks.append(layer.register_full_backward_pre_hook(lambda *_, name=name: calls.append(f"backward {name}")))
        step(model, micro_batches=1)
        for hook in hooks:
            hook.remove()
    assert calls == [
        "forward 0", "forward 1", "forward 2", "forward 3", "backward 3", "backward 2",
        "backward 1", "forward 1", "backward 0", "forward 0",
    ]  # fmt: skip


@_NO_INPUT_GRADIENT
def test_weights_swapped_in_place_are_read_when_they_are_used() -> None:
    """As in an offloaded layer: weights are valid from a pre-hook until the layer is done, and poisoned otherwise."""
    model = make_model("llama", nf4=True)
    layers = checkpointable_layers(model)
    expected = step(model)
    homes = []
    for layer in layers:
        packed = [m.weight for m in layer.modules() if type(m).__name__ == "Linear4bit"]
        homes.append([(weight, weight.data.clone()) for weight in packed])

    def fill(number: int) -> None:
        for at, home in enumerate(homes):
            for weight, content in home:
                weight.data.copy_(content if at == number else torch.full_like(content, 255))

    hooks = []
    for number, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(lambda *_, number=number: fill(number)))
        hooks.append(layer.register_full_backward_pre_hook(lambda *_, number=number: fill(number)))
    try:
        for use_kernels in (False, True):
            with kernels(model, use_kernels):
                for levels in LEVELS_BY_NAME.values():
                    with ActivationCheckpointing(model, levels):
                        actual = step(model)
                    if use_kernels:
                        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=1e-6)
                    else:
                        assert_equal(actual, expected, levels)
    finally:
        for hook in hooks:
            hook.remove()
        for home in homes:
            for weight, content in home:
                weight.data.copy_(content)


def test_a_second_backward_pass_is_refused() -> None:
    model = make_model()
    with ActivationCheckpointing(model, LEVELS_BY_NAME["selective"]):
        loss = model(**make_batch()).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="retain_graph needs recompute='none'"):
            loss.backward()


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (("none",) * 3, "3 levels given for a model of 4 layers"),
        (("none", "none", "none", "fulls"), "did you mean 'full'"),
    ],
)
def test_levels_that_do_not_match_the_model_are_refused(levels: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActivationCheckpointing(make_model(), levels)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no list of decoder layers"):
        ActivationCheckpointing(nn.Linear(2, 2), ())
