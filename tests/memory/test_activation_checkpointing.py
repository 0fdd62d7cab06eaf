"""What a layer keeps: equal losses and gradients at every level, the model as it was afterwards, bytes as estimated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastprice.errors import ConfigError
from fastprice.memory.activation_checkpointing import Keeping, decoder_layers, keeping
from fastprice.memory.recompute_levels import LEVELS, check_keep, parse_levels, write_levels
from fastprice.models.adapters import lora_config
from fastprice.models.packed_attention import PACKED_ATTENTION, register_packed_attention

LAYERS = 4
COMMON = {
    "vocab_size": 97, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 10, "attn_logit_softcapping": 50.0},
}
PLANS = {level: (level,) * LAYERS for level in LEVELS} | {
    "mixed": ("host", "input", "costly", "all"),
    "backwards": ("all", "costly", "host", "input"),
    "apart": ("host", "all", "host", "costly"),
}


def make(family: str = "llama", *, nf4: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]}))
    model = model.to(dtype).requires_grad_(False)
    if nf4:
        _to_nf4(model)
    model = get_peft_model(model, lora_config(rank=4, alpha=6, dropout=dropout))
    with torch.no_grad():  # a fresh B is zero, and hides whatever goes wrong with A
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    register_packed_attention()
    model.get_base_model().set_attn_implementation(PACKED_ATTENTION)
    return model.train()


def _to_nf4(model: Any) -> None:
    import bitsandbytes as bnb

    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                four = bnb.nn.Linear4bit(child.in_features, child.out_features, child.bias is not None, torch.float32,
                                         quant_type="nf4")  # fmt: skip
                four.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
                four.bias = child.bias
                four.support_avx512bf16_for_cpu = False
                setattr(parent, name, four)


def batch(seed: int = 0) -> dict[str, Any]:
    """Two texts in a pack, of 9 and 15 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (1, 24), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) > 0.4, -100)
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "pack_lengths": (9, 15), "use_cache": False}


def step(model: Any, *, micro_batches: int = 2, autocast: bool = False) -> list[Tensor]:
    """Losses of so many micro-batches, then the gradients that gathered."""
    model.zero_grad()
    torch.manual_seed(7)
    losses = []
    for seed in range(micro_batches):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = model(**batch(seed)).loss
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_equal(got: list[Tensor], want: list[Tensor], levels: Sequence[str] = ()) -> None:
    """Bit for bit. But a norm's input gets its two gradients in one sum at "costly" and one after the other else, where
    the norm makes no fp32 copy of it (in an fp32 model): there only the last bits may differ."""
    for a, b in zip(got, want, strict=True):
        if "costly" in levels:
            assert (a - b).abs().max() <= 2e-6 * b.abs().max()
        else:
            assert torch.equal(a, b)


@contextmanager
def kernels(model: Any, on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    from fastprice_kernels import installed

    with installed(model, loss_head=True, last_layer="Gemma" not in type(model.get_base_model()).__name__):
        yield


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "kernels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_plan_gives_the_same_losses_and_gradients(family: str, ours: bool) -> None:
    model = make(family)
    with kernels(model, ours):
        want = step(model)
        for levels in PLANS.values():
            with keeping(model, levels):
                assert_equal(step(model), want, levels)
        assert_equal(step(model), want)


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "kernels"])
def test_the_same_with_a_4_bit_base(ours: bool) -> None:
    model = make("llama", nf4=True)
    with kernels(model, ours):
        want = step(model)
        for levels in PLANS.values():
            with keeping(model, levels):
                assert_equal(step(model), want, levels)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_same_bit_for_bit_under_autocast_with_a_16_bit_base(family: str) -> None:
    model = make(family, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    want = step(model, autocast=True)
    for levels in PLANS.values():
        with keeping(model, levels):
            assert_equal(step(model, autocast=True), want)


def test_dropout_draws_the_same_numbers_again() -> None:
    model = make(dropout=0.3)
    want = step(model)
    assert not torch.equal(want[0], step(make())[0])
    for levels in PLANS.values():
        with keeping(model, levels):
            assert_equal(step(model), want, levels)


def test_every_weight_may_train_norms_included() -> None:
    model = make().get_base_model()
    model.requires_grad_(True)
    want = step(model)
    for levels in PLANS.values():
        with keeping(model, levels):
            assert_equal(step(model), want, levels)


def _state(model: nn.Module) -> list[Any]:
    """All that a module's dictionary holds, hooks and replaced forwards included."""
    return [
        (module, {key: dict(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()})
        for module in model.modules()
    ]


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "kernels"])
def test_the_model_is_left_as_it_was(ours: bool) -> None:
    model = make()
    with kernels(model, ours):
        before = _state(model)
        with keeping(model, PLANS["mixed"]) as kept:
            step(model)
            kept.set(PLANS["backwards"])
            step(model)
            kept.set(PLANS["apart"])
        assert _state(model) == before
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    before = _state(model)
    kept = Keeping(model, PLANS["costly"])
    kept.remove()
    kept.remove()
    assert _state(model) == before


def test_a_layer_that_raises_leaves_nothing_behind() -> None:
    model = make()
    want = step(model)
    layers = decoder_layers(model)
    with keeping(model, PLANS["mixed"]):
        hook = layers[2].mlp.register_forward_pre_hook(_raise)  # type: ignore[union-attr,arg-type]
        with pytest.raises(ZeroDivisionError):
            step(model)
        hook.remove()
        x = torch.ones(3, requires_grad=True)
        y = x.exp()
        assert y.grad_fn._saved_result.data_ptr() == y.data_ptr()  # type: ignore[union-attr]
        assert_equal(step(model), want, PLANS["mixed"])


def _raise(*_: Any) -> None:
    raise ZeroDivisionError


def test_evaluation_and_prediction_go_on_as_without() -> None:
    model = make().eval()
    with torch.no_grad():
        want = model(**batch()).logits
        with keeping(model, PLANS["mixed"]):
            assert torch.equal(model(**batch()).logits, want)


_NO_INPUT_GRADIENT = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


@_NO_INPUT_GRADIENT
def test_a_recomputed_layer_runs_its_hooks_again_and_a_costly_one_does_not() -> None:
    model = make()
    calls: list[str] = []
    with keeping(model, PLANS["mixed"]):
        hooks = []
        for name, layer in zip("0123", decoder_layers(model), strict=True):
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
def test_weights_exchanged_in_place_are_read_as_they_are_then() -> None:
    """A streamed layer: its weights are there from a pre-hook on until the layer is done, and rubbish otherwise."""
    model = make("llama", nf4=True)
    layers = decoder_layers(model)
    want = step(model)
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
        for ours in (False, True):
            with kernels(model, ours):
                for levels in PLANS.values():
                    with keeping(model, levels):
                        got = step(model)
                    if ours:
                        torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-6)
                    else:
                        assert_equal(got, want, levels)
    finally:
        for hook in hooks:
            hook.remove()
        for home in homes:
            for weight, content in home:
                weight.data.copy_(content)


def test_a_second_backward_pass_is_refused_by_name() -> None:
    model = make()
    with keeping(model, PLANS["costly"]):
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="retain_graph needs recompute='all'"):
            loss.backward()


@pytest.mark.parametrize(
    ("levels", "said"),
    [(("all",) * 3, "3 levels for a model of 4 layers"), (("all", "all", "all", "inputs"), "did you mean 'input'")],
)
def test_levels_that_do_not_fit_are_refused(levels: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Keeping(make(), levels)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be told apart"):
        Keeping(nn.Linear(2, 2), ())


@given(st.lists(st.sampled_from(LEVELS), min_size=1, max_size=40))
def test_levels_are_read_as_they_are_written(levels: list[str]) -> None:
    assert parse_levels(write_levels(levels), len(levels)) == tuple(levels)


@given(st.text(max_size=30), st.integers(1, 8))
def test_any_text_is_levels_or_a_config_error(text: str, layers: int) -> None:
    with suppress(ConfigError):
        assert len(parse_levels(text, layers)) == layers
        assert check_keep(text) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [("some", "neither one of all"), ("inputs", "did you mean 'input'"), ("", "neither"), ("4input", "neither"),
     ("3 input", "does not name the model's 4 layers"), ("9 input", "does not name"), ("4 input, all", "neither"),
     ("2 input, 2 cheap", "'cheap' is not one of")],
)  # fmt: skip
def test_impossible_levels_are_told_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_levels(text, 4)
