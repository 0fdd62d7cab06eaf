"""The kernels under Unsloth, which loads no model without a GPU: modules of its shape, then its own names."""

from __future__ import annotations

import os
import subprocess
import sys
from types import MethodType, ModuleType, SimpleNamespace

import pytest
import torch
from tests.kernels.adapted_models import LAYERS, WIDTH, assert_close, batch, gradients, make
from torch import nn

from fastprice_kernels.patching.install import install, installed, uninstall
from fastprice_kernels.patching.installation import PATCH

bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def called(name):
    """Stands for a function of Unsloth's: says that it ran, and does what it should on a layer."""

    def stock(self, X, *rest):
        self.__dict__.setdefault("ran", []).append(name)
        return self.stock[name](X)

    return stock


@pytest.fixture
def unsloth_modules(monkeypatch):
    """Modules of Unsloth's shape: where functions are made, and others that imported them by name."""

    def fast_dequantize(W, quant_state=None, out=None, use_global_buffer=False):
        return "stock"

    def apply_lora_qkv(self, X, inplace=True):
        return called("qkv")(self, X)

    def apply_lora_o(self, X):
        return called("o")(self, X)

    def apply_lora_mlp_swiglu(self, X, inplace=True):
        return called("mlp")(self, X)

    def apply_lora_mlp_geglu_exact(self, X, inplace=True):
        raise AssertionError

    def apply_lora_mlp_geglu_approx(self, X):
        raise AssertionError

    def fast_rms_layernorm(layernorm, X, gemma=False, save_output=False, reuse_grad=False):
        return type(layernorm).forward(layernorm, X)

    def original_apply_o(self, X):
        return self.o_proj(X)

    def resolve_logit_transforms(config):
        return getattr(config, "final_logit_softcapping", 0), 0, getattr(config, "logits_scaling", 0)

    modules = {}
    for name in (
        "unsloth", "unsloth.kernels", "unsloth.kernels.utils", "unsloth.kernels.fast_lora", "unsloth.save",
        "unsloth.models", "unsloth.models.llama", "unsloth_compiled_module_x",
    ):  # fmt: skip
        modules[name] = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
    modules["unsloth"].__version__ = "2099.1.1"
    lora = [
        apply_lora_qkv,
        apply_lora_o,
        apply_lora_mlp_swiglu,
        apply_lora_mlp_geglu_exact,
        apply_lora_mlp_geglu_approx,
    ]
    for name, functions in {
        "unsloth.kernels.utils": [fast_dequantize],
        "unsloth.kernels.fast_lora": [fast_dequantize, *lora],
        "unsloth.models.llama": [
            fast_dequantize,
            fast_rms_layernorm,
            original_apply_o,
            resolve_logit_transforms,
            *lora,
        ],
        "unsloth_compiled_module_x": [fast_dequantize],
    }.items():
        for function in functions:
            setattr(modules[name], function.__name__, function)
    modules["unsloth.save"].fast_dequantize = lambda *a: "someone else's"
    return modules


# Of the shape of Unsloth's: functions of one module, which put on classes call others of it by name.
FORWARDS = """
def attention(self, hidden_states, **kwargs):
    q, k, v = (part.view(*hidden_states.shape[:-1], -1, self.head_dim).transpose(1, 2)
               for part in self.apply_qkv(self, hidden_states))
    y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return getattr(self, "apply_o", original_apply_o)(self, y.transpose(1, 2).flatten(2)), None, None

def layer(self, hidden_states, causal_mask=None, *args, **kwargs):
    residual = hidden_states
    hidden_states = fast_rms_layernorm(self.input_layernorm, hidden_states, save_output=True, reuse_grad=True)
    hidden_states, weights, cache = self.self_attn(hidden_states=hidden_states, causal_mask=causal_mask, **kwargs)
    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = fast_rms_layernorm(self.post_attention_layernorm, hidden_states, save_output=True, reuse_grad=True)
    hidden_states = self.mlp(hidden_states)
    return (residual + hidden_states,)

def decoder(self, input_ids=None, causal_mask=None, output_hidden_states=None, **kwargs):
    hidden_states = self.embed_tokens(input_ids)
    for one in self.layers:
        hidden_states = one(hidden_states, causal_mask=causal_mask, **kwargs)[0]
    hidden_states = fast_rms_layernorm(self.norm, hidden_states)
    return Output(last_hidden_state=hidden_states, past_key_values=None, hidden_states=None, attentions=None)

def causal(self, input_ids=None, labels=None, num_logits_to_keep=0, logits_to_keep=0, **kwargs):
    softcap, multiply, divide = resolve_logit_transforms(self.config)
    logits = self.lm_head(self.model(input_ids).last_hidden_state)
    loss = None
    if labels is not None:
        flat = labels[:, 1:].flatten()
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), flat, reduction="sum") / kwargs["num_items_in_batch"]
    return Output(loss=loss, logits=logits)
"""


def unsloth_model(modules, **options) -> nn.Module:
    """A model that Unsloth patched: its forwards are on the classes, its fused functions on the modules."""
    model = make(**options)
    names = modules["unsloth.models.llama"]
    names.__dict__.update(
        Output=SimpleNamespace,
        scaled_dot_product_attention=nn.functional.scaled_dot_product_attention,
        cross_entropy=nn.functional.cross_entropy,
    )
    exec(FORWARDS, vars(names))
    causal = model.get_base_model()
    for layer in causal.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.stock = {"qkv": lambda x, a=attention: (a.q_proj(x), a.k_proj(x), a.v_proj(x)), "o": attention.o_proj}
        attention.apply_qkv, attention.apply_o = names.apply_lora_qkv, names.apply_lora_o
        mlp.stock = {"mlp": lambda x, m=mlp: type(m).forward(m, x)}
        mlp.forward = MethodType(names.apply_lora_mlp_swiglu, mlp)
        put(attention, names.attention)
        put(layer, names.layer)
    put(causal.model, names.decoder)
    put(causal, names.causal)
    return model


def put(module, forward) -> None:
    """`forward` on the class of the module, which becomes one of its own."""
    module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})


def everything_of(modules):
    return {(name, key): value for name, module in modules.items() for key, value in vars(module).items()}


@pytest.mark.parametrize("nf4", [True, False])
def test_an_unsloth_model_runs_on_the_kernels_and_is_restored(unsloth_modules, nf4):
    model = unsloth_model(unsloth_modules, nf4=nf4)
    layers = model.get_base_model().model.layers
    before = everything_of(unsloth_modules)
    dicts = [dict(module.__dict__) for module in model.modules()]
    report = install(model, loss_head=True)
    kernels = list(report.replaced.values())
    assert [kernels.count(k) for k in ("lora_qkv", "lora_mlp", "lora_linear")] == [3 * LAYERS, 3 * LAYERS, LAYERS]
    assert not report.skipped
    assert kernels.count("completion_cross_entropy") == 1
    # Unsloth finds its fused layers by comparing what is attached to them with the names in its modules.
    assert layers[0].self_attn.apply_qkv is unsloth_modules["unsloth.models.llama"].apply_lora_qkv
    assert layers[0].self_attn.apply_qkv is unsloth_modules["unsloth.kernels.fast_lora"].apply_lora_qkv
    assert unsloth_modules["unsloth.save"].fast_dequantize() == "someone else's"
    inputs = {key: value for key, value in batch().items() if key != "attention_mask"}
    got = gradients(model, inputs, num_items_in_batch=torch.tensor(7))
    assert not any("ran" in module.__dict__ for module in model.modules())
    uninstall(model)
    assert everything_of(unsloth_modules) == before
    for module, was in zip(model.modules(), dicts, strict=True):
        assert module.__dict__.keys() == was.keys()
        assert all(module.__dict__[key] is was[key] for key in ("apply_qkv", "apply_o", "forward") if key in was)

    want = gradients(model, inputs, num_items_in_batch=torch.tensor(7))
    assert layers[0].self_attn.ran == ["qkv", "o"]
    assert layers[0].mlp.ran == ["mlp"]
    assert_close(got, want, 2e-5)


def test_unsloth_functions_are_restored_with_the_last_model(unsloth_modules):
    home, user = unsloth_modules["unsloth.kernels.utils"], unsloth_modules["unsloth.models.llama"]
    before, stock = everything_of(unsloth_modules), home.fast_dequantize
    first, second = unsloth_model(unsloth_modules), unsloth_model(unsloth_modules)
    install(first)
    later = unsloth_model(unsloth_modules)  # gets ours, which must run Unsloth's: no kernels were put under this one
    x = torch.randn(1, 20, WIDTH)
    attention = later.get_base_model().model.layers[0].self_attn
    attention.apply_qkv(attention, x)
    assert attention.ran == ["qkv"]
    install(second)
    uninstall(first)
    assert user.fast_dequantize is home.fast_dequantize is not stock
    newcomer = ModuleType("unsloth.models.new")
    newcomer.fast_dequantize = home.fast_dequantize
    sys.modules["unsloth.models.new"] = newcomer

    dense = torch.randn(24, 64)
    packed, state = bnb.functional.quantize_4bit(dense, compress_statistics=True, quant_type="nf4")
    want = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(home.fast_dequantize(packed, state), want)
    assert torch.equal(home.fast_dequantize(packed.t(), state, use_global_buffer=True), want.t())
    assert home.fast_dequantize(dense) == "stock"
    assert home.fast_dequantize(packed, state, torch.empty_like(dense)) == "stock"
    fp4, fp4_state = bnb.functional.quantize_4bit(dense, quant_type="fp4")
    assert home.fast_dequantize(fp4, fp4_state) == "stock"

    uninstall(second)
    try:
        assert newcomer.fast_dequantize is user.fast_dequantize is home.fast_dequantize is stock
    finally:
        del sys.modules["unsloth.models.new"]
    assert {key: value for key, value in everything_of(unsloth_modules).items() if key in before} == before


def test_unsupported_layers_run_the_functions_of_unsloth(unsloth_modules):
    model = unsloth_model(unsloth_modules)
    install(model)
    layer = model.get_base_model().model.layers[1]
    for part in (layer.self_attn.k_proj, layer.mlp.up_proj):
        part.lora_dropout["default"] = nn.Dropout(0.5)
    x = torch.randn(1, 20, WIDTH)
    with pytest.warns(UserWarning, match="stock path: LoRA dropout of 0.5"):
        layer.self_attn.apply_qkv(layer.self_attn, x)
    layer.mlp(x)
    assert layer.self_attn.ran == ["qkv"]
    assert layer.mlp.ran == ["mlp"]
    uninstall(model)


@pytest.mark.parametrize("output_adapted", [True, False])
def test_the_last_layer_of_an_unsloth_model_runs_at_labeled_positions(unsloth_modules, output_adapted):
    model = unsloth_model(unsloth_modules, nf4=False)
    last = model.get_base_model().model.layers[-1]
    if not output_adapted:  # nothing of Unsloth's is attached then: attention calls its function by name
        del last.self_attn.apply_o
    inputs = {key: value for key, value in batch().items() if key != "attention_mask"}
    labeled = int((inputs["labels"][:, 1:] != -100).sum())
    rows = []
    hook = last.mlp.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[:2]))
    want = gradients(model, inputs, num_items_in_batch=7)
    with installed(model, loss_head=True, last_layer=True) as report:
        assert not report.skipped
        assert "last layer at labeled positions" in report.replaced.values()
        got = gradients(model, inputs, num_items_in_batch=7)
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"]).logits
    assert rows == [(3, 12), (1, labeled), (3, 12)]
    assert logits.shape[:2] == (3, 12)
    assert_close(got, want, 2e-5)
    assert ("apply_o" in last.self_attn.__dict__) is output_adapted
    hook.remove()


@pytest.mark.filterwarnings("ignore:fastprice_kernels leaves:UserWarning")
def test_an_unsloth_model_of_another_kind_keeps_its_loss_and_last_layer(unsloth_modules):
    """Each with its reason; the loss is Unsloth's own then."""
    names = unsloth_modules["unsloth.models.llama"]

    def reasons(change) -> str:
        model = unsloth_model(unsloth_modules)
        causal = model.get_base_model()
        change(causal)
        with installed(model, loss_head=True, last_layer=True) as report:
            return "; ".join(report.skipped.values())

    def without_attention(causal):
        put(causal.model.layers[-1], lambda self, x, **_: (x + fast(self.input_layernorm, x),))

    def fast(norm, x):
        return names.fast_rms_layernorm(norm, x)

    def without_output(causal):
        del causal.model.layers[-1].self_attn.apply_o
        del names.original_apply_o

    assert reasons(lambda causal: None) == ""
    assert "not x + attention(norm(x))" in reasons(without_attention)
    assert "its attention does not call apply_o" in reasons(without_output)
    assert "not a plain Linear" in reasons(lambda causal: setattr(causal, "lm_head", nn.Identity()))
    names.resolve_logit_transforms = halve
    assert "scales its logits by (None, 0.5)" in reasons(lambda causal: None)
    del names.resolve_logit_transforms
    assert "does not call resolve_logit_transforms" in reasons(lambda causal: None)


def halve(config):
    return 0, 0, 2.0


def test_an_unsloth_with_other_functions_is_refused_and_not_changed(unsloth_modules):
    model = unsloth_model(unsloth_modules)
    home, lora = (unsloth_modules[f"unsloth.kernels.{name}"] for name in ("utils", "fast_lora"))
    home.fast_dequantize = lambda W, state: None
    del lora.apply_lora_o
    before = everything_of(unsloth_modules)
    with pytest.raises(RuntimeError, match=r"Unsloth 2099.1.1: .* takes \['W', 'state'\].*apply_lora_o does not exist"):
        install(model)
    assert everything_of(unsloth_modules) == before
    assert not any(PATCH in module.__dict__ for module in model.modules())


@pytest.mark.slow
def test_the_installed_unsloth_has_the_functions_that_are_replaced(tmp_path):
    pytest.importorskip("importlib.util").find_spec("unsloth") or pytest.skip("unsloth is not installed")
    script = """
import sys, warnings
from types import MethodType
warnings.simplefilter("ignore")
import unsloth
import torch, peft, transformers
from fastprice_kernels import install, uninstall
from fastprice_kernels.patching import unsloth_functions
import unsloth.models.llama as llama
from unsloth.models.llama import FastLlamaModel
names = [(m, n, vars(m)[n]) for m in list(sys.modules.values()) for n in unsloth_functions._FUNCTIONS
         if getattr(m, "__name__", "").startswith("unsloth") and n in vars(m)]
torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8)
model = transformers.AutoModelForCausalLM.from_config(config).float()
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
FastLlamaModel.pre_patch()  # its forwards, on classes; its rotary embedding is made on a GPU
layers = model.get_base_model().model.layers
for layer in layers:  # as Unsloth's patch_peft_model does
    layer.self_attn.apply_qkv, layer.self_attn.apply_o = llama.apply_lora_qkv, llama.apply_lora_o
    layer.mlp.forward = MethodType(llama.apply_lora_mlp_swiglu, layer.mlp)
x = torch.randn(2, 20, 32, requires_grad=True)
attention, mlp = layers[0].self_attn, layers[0].mlp

def results():
    model.zero_grad()
    x.grad = None
    outs = [*attention.apply_qkv(attention, x.clone()), attention.apply_o(attention, x.clone())]
    sum((each.square()).sum() for each in outs).backward()
    return [*outs, x.grad.clone(), *(p.grad.clone() for p in attention.parameters() if p.grad is not None)]

want = results()
want_mlp = type(mlp).forward(mlp, x)
report = install(model, loss_head=True)
assert not report.skipped, report.skipped
left = [(m.__name__, n) for m, n, stock in names if vars(m)[n] is stock]
assert not left, left
assert len(llama._fused_lora_modules(model)) >= len(layers), "Unsloth finds its fused attention"
for a, b in zip(results(), want, strict=True):  # sums of large terms: rounding goes by the largest
    assert (a - b).abs().max() <= 1e-5 * b.abs().max(), (a - b).abs().max()
torch.testing.assert_close(mlp(x), want_mlp, rtol=1e-4, atol=1e-5)
uninstall(model)
assert all(vars(m)[n] is stock for m, n, stock in names)
assert all(torch.equal(a, b) for a, b in zip(results(), want, strict=True))
print("\\nREPLACED", *report.replaced)
"""
    environment = {
        **os.environ,
        "UNSLOTH_ALLOW_CPU": "1",
        "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    replaced = done.stdout.split("REPLACED")[1].split()
    for place in (
        "kernels.utils.fast_dequantize", "kernels.fast_lora.fast_dequantize", "models.llama.apply_lora_qkv",
        "kernels.fast_lora.apply_lora_mlp_swiglu", "save.fast_dequantize",
    ):  # fmt: skip
        assert f"unsloth.{place}" in replaced
