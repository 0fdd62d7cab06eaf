"""What the kernels replace in a model, and what they leave to the stock path, with its reason."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from tests.kernels.adapted_models import CONFIGS, WIDTH, assert_close, batch, gradients, make, to_nf4
from torch import nn

from fastprice_kernels.patching.install import InstallReport, install, installed, uninstall
from fastprice_kernels.patching.linear_layers import read_layer
from fastprice_kernels.patching.structure import activation_of, is_gated_mlp

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_adapters_that_are_disabled_or_merged():
    model = make(nf4=False).eval()
    inputs = batch()
    inputs.pop("labels")
    with torch.no_grad():
        on, merged_model = model(**inputs).logits, copy.deepcopy(model)
        with model.disable_adapter():
            off = model(**inputs).logits
        install(model)
        with model.disable_adapter():
            torch.testing.assert_close(model(**inputs).logits, off)
        torch.testing.assert_close(model(**inputs).logits, on)
        install(merged_model)
        merged_model.merge_adapter()
        torch.testing.assert_close(merged_model(**inputs).logits, on, rtol=1e-4, atol=1e-5)
        merged_model.unmerge_adapter()
        torch.testing.assert_close(merged_model(**inputs).logits, on, rtol=1e-4, atol=1e-5)


def test_adapters_on_some_projections_only():
    model = make(target_modules=["q_proj", "down_proj"])
    want = gradients(model)
    install(model)
    assert_close(gradients(model), want, 2e-5)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"lora_dropout": 0.1}, "LoRA dropout of 0.1"), ({"use_dora": True}, "a variant of LoRA"),
     ({"lora_bias": True}, "an adapter with a bias")],
)  # fmt: skip
def test_unsupported_layers_stay_stock_with_one_warning(settings, reason):
    model = make(nf4=False, **settings)
    torch.manual_seed(1)
    want = gradients(model)
    with pytest.warns(UserWarning, match=f"leaves these on the stock path: .*{reason}") as caught:
        report = install(model)
    assert len(caught) == 1
    assert set(report.replaced.values()) == {"norm", "rotary embedding", "residual additions"}
    assert set(report.skipped.values()) == {next(iter(report.skipped.values()))}
    assert reason in str(report)
    torch.manual_seed(1)
    assert_close(gradients(model), want, 2e-5)  # other norms, the same random masks


def test_a_later_dropout_runs_the_stock_path_with_one_warning():
    model = make()
    install(model)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.5)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="stock path: LoRA dropout of 0.5") as caught:
        got = gradients(model)
    assert len(caught) == 1
    uninstall(model)
    torch.manual_seed(3)
    assert_close(got, gradients(model), 2e-5)


def test_a_second_adapter_runs_the_stock_path():
    model = make(nf4=False)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    install(model)
    model.base_model.set_adapter(["default", "other"])
    with pytest.warns(UserWarning, match="several adapters active at once"):
        got = gradients(model)
    uninstall(model)
    assert_close(got, gradients(model), 2e-5)  # the layers with one adapter run on the kernels


def test_hooks_inside_an_mlp_still_run():
    model = make()
    install(model)
    seen = []
    model.get_base_model().model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="hooks on the layers of an MLP"):
        gradients(model)
    assert seen == [1]


def test_repacked_weights_are_refused():
    model = make()
    base = next(m for m in model.modules() if type(m) is bnb.nn.Linear4bit)
    base.weight.quant_state.packing_format_for_cpu = True
    assert "repacked" in read_layer(base)


def test_plain_four_bit_models_without_adapters():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    model.requires_grad_(False)
    to_nf4(model)
    embeddings = torch.randn(2, 5, WIDTH, requires_grad=True)
    (want,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits.sum(), embeddings)
    with installed(model) as report:
        (got,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits.sum(), embeddings)
    assert {"lora_qkv", "lora_mlp", "lora_linear"} <= set(report.replaced.values())
    assert_close([got], [want], 1e-5)


def test_modules_are_recognized_by_what_they_compute():
    class Doubled(nn.Module):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(self.up_proj(x)))

    class Turned(nn.Module):
        def forward(self, x):
            return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))

    class Other(nn.Module):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)).square() * self.up_proj(x))

    assert is_gated_mlp(Turned)
    assert not is_gated_mlp(Doubled)
    assert not is_gated_mlp(Other)
    activations = transformers.activations.ACT2FN
    names = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": None,
             "quick_gelu": None, "gelu_10": None}  # fmt: skip
    for name, kind in names.items():
        assert activation_of(SimpleNamespace(act_fn=activations[name])) == kind, name


def test_report_counts():
    report = InstallReport({"a": "lora_mlp", "b": "lora_mlp"}, {"c": "LoRA dropout of 0.1"})
    assert str(report) == "2 x lora_mlp\n1 x stock: LoRA dropout of 0.1"
    assert str(InstallReport()) == "nothing to replace"
