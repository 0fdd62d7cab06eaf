"""What bitsandbytes does wrong on some CPUs does not reach a model with kernels. Both kinds of CPU, on any machine."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.cpu_kinds import emulate
from tests.kernels.adapted_models import COMMON, assert_close, batch, gradients, make

from fastprice_kernels import dequantize_nf4
from fastprice_kernels.patching import cpu_faults
from fastprice_kernels.patching.install import install, uninstall

bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def wide(monkeypatch):
    """Widths that bitsandbytes can repack: columns are whole blocks, rows a multiple of 32."""
    for name, size in {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}.items():
        monkeypatch.setitem(COMMON, name, size)


@pytest.fixture
def narrow(monkeypatch):
    """Widths with which bitsandbytes takes wrong scales."""
    for name, size in {"hidden_size": 32, "head_dim": 8, "intermediate_size": 48}.items():
        monkeypatch.setitem(COMMON, name, size)


def four_bit(model):
    return [module for module in model.modules() if type(module) is bnb.nn.Linear4bit]


def as_users_load_it(**options):
    """A model whose 4-bit layers bitsandbytes is free to repack."""
    model = make(**options)
    for layer in four_bit(model):
        layer.support_avx512bf16_for_cpu = True
    return model


def evaluate(model):
    inputs = batch()
    del inputs["labels"]
    was_training = model.training
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    model.train(was_training)
    return logits


def flat_gradient(model):
    """That of all adapters; zero where none arrives."""
    model.zero_grad()
    model(**batch()).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])


@pytest.mark.parametrize(
    ("columns", "blocksize", "at_risk"),
    [(32, 64, True), (288, 64, True), (64, 128, True), (48, 64, True), (40, 64, False), (56, 64, False),
     (64, 64, False), (896, 64, False), (32, 2048, True)],
)  # fmt: skip
def test_stock_weights_are_exact_except_for_some_widths_on_one_kind_of_cpu(cpu_kind, columns, blocksize, at_risk):
    packed, state = bnb.functional.quantize_4bit(torch.randn(96, columns), blocksize=blocksize, quant_type="nf4")
    exact = torch.equal(bnb.functional.dequantize_4bit(packed, state), dequantize_nf4(packed, state))
    assert exact == (cpu_kind == "avx2" or not at_risk or blocksize == 2048)
    assert cpu_faults.stock_is_exact(columns, blocksize) == exact
    assert cpu_faults.is_at_risk(state) == at_risk


def test_this_cpu_is_one_of_the_two_kinds():
    packed, state = bnb.functional.quantize_4bit(torch.randn(96, 288), quant_type="nf4")
    here = bnb.functional.dequantize_4bit(packed, state)
    results = {}
    for kind in ("avx2", "avx512_bf16"):
        with emulate(kind):
            results[kind] = bnb.functional.dequantize_4bit(packed, state)
    assert not torch.equal(*results.values())
    assert any(torch.equal(here, emulated) for emulated in results.values())
    assert torch.equal(bnb.functional.dequantize_4bit(packed, state), here), "the emulation has ended"


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize("nested", [True, False])
def test_a_model_that_was_evaluated_first_trains_on_right_weights(wide, nested):
    model = as_users_load_it()
    if not nested:
        for layer in four_bit(model):
            dense = dequantize_nf4(layer.weight, layer.weight.quant_state)
            layer.weight = bnb.nn.Params4bit(dense, compress_statistics=False, quant_type="nf4", module=layer).to("cpu")
    stock, before = copy.deepcopy(model), copy.deepcopy(model)
    want = flat_gradient(before)
    with emulate("avx512_bf16"):
        stock_logits = evaluate(model)
        assert all(map(cpu_faults.is_repacked, four_bit(model)))
        evaluate(stock)
        with pytest.warns(UserWarning, match="28 4-bit layers had been repacked"):
            report = install(model)
        assert not report.skipped
        got = flat_gradient(model)
        torch.testing.assert_close(evaluate(model), stock_logits, rtol=0.02, atol=0.02)  # the inference kernel is bf16
        assert not any(map(cpu_faults.is_repacked, four_bit(model)))
        uninstall(model)
        assert_close([flat_gradient(model)], [got], 2e-5)
        cosine = torch.nn.functional.cosine_similarity
        assert cosine(got, want, dim=0) > 0.9999
        assert cosine(flat_gradient(stock), want, dim=0) < 0.9, "what the stock path does with repacked weights"
    for now, then in zip(four_bit(model), four_bit(before), strict=True):
        assert torch.equal(now.weight.data, then.weight.data)
        scales = then.weight.quant_state.absmax
        if nested:
            scales = bnb.functional.dequantize_blockwise(scales, then.weight.quant_state.state2)
            scales = scales + then.weight.quant_state.offset
        assert torch.equal(now.weight.quant_state.absmax, scales.bfloat16().float())


def test_an_unknown_layout_is_refused(wide):
    model = as_users_load_it()
    with emulate("avx512_bf16"):
        evaluate(model)
        state = four_bit(model)[3].weight.quant_state
        state.absmax = state.absmax.t()[:1]
        with pytest.raises(RuntimeError, match="unknown layout: load the model again"):
            install(model)


@pytest.mark.filterwarnings("ignore:fastprice_kernels leaves these on the stock path:UserWarning")
def test_layers_that_stay_stock_are_not_repacked_either(wide, cpu_kind):
    model = as_users_load_it(lora_dropout=0.1)
    torch.manual_seed(1)
    want = gradients(model)
    assert not {"lora_qkv", "lora_mlp", "lora_linear"} & set(install(model).replaced.values())
    evaluate(model)
    torch.manual_seed(1)
    assert_close(gradients(model), want, 2e-5)
    uninstall(model)
    assert all(layer.support_avx512bf16_for_cpu for layer in four_bit(model))


@pytest.mark.parametrize("length", [1, 12])
def test_kernels_run_where_stock_weights_may_be_wrong(narrow, cpu_kind, length):
    """Few rows without gradient otherwise go to bitsandbytes."""
    model = make().eval()
    inputs = {"input_ids": batch()["input_ids"][:1, :length]}
    with emulate("avx2"), torch.no_grad():
        want = model(**inputs).logits
    install(model, loss_head=True)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, want)


def test_the_report_names_stock_layers_with_wrong_weights(narrow, cpu_kind):
    fault = r"LoRA dropout of 0.1 \(and bitsandbytes computes rows of 32 4-bit weights with wrong scales on this CPU\)"
    with pytest.warns(UserWarning, match="leaves these on the stock path"):
        report = install(make(lora_dropout=0.1))
    assert (fault.replace("\\", "") in str(report)) == (cpu_kind == "avx512_bf16")
