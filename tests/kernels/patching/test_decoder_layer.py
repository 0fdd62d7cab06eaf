"""Norms, residual additions and rotary embeddings on real model classes, and what is recognized as one."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.kernels.adapted_models import CONFIGS, LAYERS, WIDTH, assert_close, batch, gradients, make
from torch import nn

from fastprice_kernels.patching.install import install, installed, uninstall
from fastprice_kernels.patching.rotary import unsupported_attention
from fastprice_kernels.patching.structure import layer_norms, norm_kind, rotary_form

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def decoder(model):
    return model.get_base_model().model


@pytest.mark.parametrize(
    ("kind", "norms", "additions"),
    [
        ("llama", 2 * LAYERS + 1, LAYERS),
        ("qwen2", 2 * LAYERS + 1, LAYERS),
        ("qwen3", 4 * LAYERS + 1, LAYERS),
        ("mistral", 2 * LAYERS + 1, LAYERS),
        ("gemma2", 4 * LAYERS + 1, LAYERS),
        ("cohere", LAYERS + 1, 0),
        ("granite", 2 * LAYERS + 1, 0),
    ],
)
@pytest.mark.filterwarnings("ignore:fastprice_kernels leaves:UserWarning")
def test_what_is_replaced_in_each_family(kind, norms, additions):
    kernels = list(install(make(kind)).replaced.values())
    assert [kernels.count(each) for each in ("norm", "rotary embedding", "residual additions")] == [
        norms,
        LAYERS,
        additions,
    ]


def test_no_norm_and_no_rotation_is_left_to_stock_code(monkeypatch):
    """Their stock code would not run to the end."""
    from transformers.models.qwen3 import modeling_qwen3

    model = make("qwen3")
    want = gradients(model)
    install(model)

    def unexpected(*args, **kwargs):
        raise AssertionError("stock code ran")

    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", unexpected)
    monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", unexpected)
    monkeypatch.setattr(modeling_qwen3.Qwen3DecoderLayer, "forward", unexpected)
    assert_close(gradients(model), want, 2e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_compute_the_same(kind, reentrant):
    model = make(kind)
    install(model, loss_head=True, last_layer=True)
    want = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(gradients(model), want, 0.0 if not reentrant else 1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_norms_that_train_get_their_gradients(kind):
    model = make(kind)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_()
    want = gradients(model)
    with installed(model, loss_head=True):
        assert_close(gradients(model), want, 2e-5)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.filterwarnings("ignore:fastprice_kernels leaves:UserWarning")
def test_generation_with_a_cache_gives_the_same_tokens(kind):
    model = make(kind).eval()
    ids = batch()["input_ids"][:1]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = model.generate(input_ids=ids, **options)
    install(model)
    assert torch.equal(model.generate(input_ids=ids, **options), want)


def test_hooks_of_norms_still_run():
    model = make()
    install(model)
    seen = []
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = getattr(decoder(model).layers[0], name)
        norm.register_forward_hook(lambda module, inputs, output, name=name: seen.append((name, output.shape)))
    model(**batch())
    assert seen == [("input_layernorm", (3, 12, WIDTH)), ("post_attention_layernorm", (3, 12, WIDTH))]


def test_under_autocast_norms_with_fp32_weights_write_the_dtype_that_projections_read():
    """As `prepare_model_for_kbit_training` leaves them: the stock norm writes fp32, which each projection casts."""
    model = make(dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    dtypes = []
    layer = decoder(model).layers[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = gradients(model)
        install(model, loss_head=True)
        for module in (layer.self_attn, layer.mlp):
            module.register_forward_pre_hook(
                lambda module, args, kwargs: dtypes.append((args[0] if args else kwargs["hidden_states"]).dtype),
                with_kwargs=True,
            )
        got = gradients(model)
        assert decoder(model).norm(torch.ones(1, WIDTH, dtype=torch.bfloat16)).dtype is torch.float32  # as stock
    assert dtypes == [torch.bfloat16] * 2
    assert_close(got, want, 6e-2)


def test_a_layer_that_something_else_replaced_is_left_alone():
    model = make()
    layer = decoder(model).layers[1]
    mine = layer.forward
    layer.forward = lambda *args, **kwargs: mine(*args, **kwargs)
    attention = decoder(model).layers[2].self_attn
    theirs = attention.forward
    attention.forward = lambda *args, **kwargs: theirs(*args, **kwargs)
    want = gradients(model)
    with pytest.warns(UserWarning, match="a forward that something else replaced"):
        report = install(model)
    reasons = {name.split("layers.")[1]: reason for name, reason in report.skipped.items()}
    assert reasons == {
        "1": "residual additions: a forward that something else replaced",
        "2.self_attn": "rotary embedding: a forward that something else replaced",
    }
    assert_close(gradients(model), want, 2e-5)


def test_a_deep_copy_runs_on_its_own_layers():
    model = make()
    install(model, loss_head=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in decoder(model).layers.parameters():
            parameter.zero_() if parameter.is_floating_point() else None
    assert_close(gradients(other), gradients(make()), 2e-5)


def test_scaled_rotary_embeddings_and_packed_positions():
    """Positions that begin anew in each text; the angles of Llama-3's and YaRN's scalings."""
    for parameters in (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
    ):  # fmt: skip
        model = make()
        config = copy.deepcopy(decoder(model).config)
        config.rope_parameters = parameters
        decoder(model).rotary_emb = type(decoder(model).rotary_emb)(config)
        inputs = {**batch(), "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None].expand(3, -1)}
        want = gradients(model, inputs)
        with installed(model, loss_head=True):
            assert_close(gradients(model, inputs), want, 2e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Glm", {"partial_rotary_factor": 0.5, "pad_token_id": 0}),  # interleaved pairs, part of each head
        ("StableLm", {"partial_rotary_factor": 0.5}),  # the rotated part cut out by the layer's own code; LayerNorm
        ("Phi", {"partial_rotary_factor": 0.5}),
    ],
)
@pytest.mark.filterwarnings("ignore:fastprice_kernels leaves:UserWarning")
def test_partial_rotary_embeddings(name, settings):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=97, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=5,
        num_key_value_heads=5, **({"head_dim": 8} if name == "Glm" else {}), **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    want = gradients(model)
    with installed(model) as report:
        assert list(report.replaced.values()).count("rotary embedding") == 2
        assert_close(gradients(model), want, 2e-5)


class _Norm(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6


class RMSNorm(_Norm):
    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class RoundsOnceNorm(_Norm):  # as OLMo's
    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * y).to(x.dtype)


class WithoutEpsNorm(_Norm):
    def forward(self, x):
        return self.weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True))).to(x.dtype)


class NeedsMoreNorm(_Norm):
    def forward(self, x, gate):
        return x * gate


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (RMSNorm(), ("rms", "eps")),
        (nn.LayerNorm(8), ("layer", "eps")),
        (nn.LayerNorm(8, bias=False), ("layer", "eps")),
        (nn.LayerNorm((2, 8)), None),
        (RoundsOnceNorm(), None),
        (WithoutEpsNorm(), None),
        (NeedsMoreNorm(), None),
        (nn.Linear(8, 8), None),
        (nn.BatchNorm1d(8), None),
    ],
    ids=lambda each: type(each).__name__,
)
def test_norms_are_recognized_by_their_values(module, kind):
    assert norm_kind(module) == kind


def test_rotary_functions_are_recognized_by_their_values():
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

    assert [rotary_form(each) for each in (llama, cohere, glm)] == ["half", "interleaved", "interleaved_half"]
    assert rotary_form(lambda q, k, cos, sin: (q, k)) is None
    assert rotary_form(lambda q, k, freqs: (q, k)) is None


def test_classes_without_the_function_or_the_form_are_not_supported():
    class Attention(nn.Module):
        def forward(self, x):
            return x

    class Wrapped(nn.Module):
        pass

    assert unsupported_attention(Attention) == "its code calls no apply_rotary_pos_emb"
    assert unsupported_attention(Wrapped) == "its forward is not a plain function"
    assert layer_norms(Attention) is None


def test_uninstall_leaves_no_trace_in_the_library():
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama)), modeling_llama.LlamaAttention.forward
    model = make()
    install(model)
    assert (dict(vars(modeling_llama)), modeling_llama.LlamaAttention.forward) == before
    uninstall(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
