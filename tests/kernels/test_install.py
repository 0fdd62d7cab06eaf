"""The kernels under real model classes: trajectories against the stock path, exact return, what is replaced and why."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
from types import MethodType, ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from fastprice_kernels import _layers
from fastprice_kernels import last_layer as heads
from fastprice_kernels.install import InstallReport, install, installed, uninstall
from fastprice_kernels.loss_head import labelled_positions

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
VOCABULARY, WIDTH, LAYERS = 97, 32, 4
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 56,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "sdpa",
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "llama-bias": lambda: transformers.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=None),
    "gemma2": lambda: transformers.Gemma2Config(
        **{**COMMON, "attn_implementation": "eager"}, final_logit_softcapping=5.0, query_pre_attn_scalar=8
    ),
    "cohere": lambda: transformers.CohereConfig(
        **{k: v for k, v in COMMON.items() if k != "head_dim"}, logit_scale=0.25
    ),
    "granite": lambda: transformers.GraniteConfig(
        **{k: v for k, v in COMMON.items() if k != "head_dim"}, logits_scaling=3.0
    ),
}


def to_nf4(model: nn.Module, compute_dtype: torch.dtype = torch.float32) -> None:
    """Every linear layer of the decoder as bitsandbytes' NF4 with nested scales, as transformers loads it."""
    for module in list(model.get_decoder().modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                four = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None, compute_dtype, quant_type="nf4"
                )
                weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                four.weight = weight.to("cpu")
                if child.bias is not None:
                    four.bias = nn.Parameter(child.bias.data.clone(), requires_grad=False)
                four.support_avx512bf16_for_cpu = False
                setattr(module, name, four)


def make(
    kind: str = "llama", *, nf4: bool = True, seed: int = 0, dtype=torch.float32, compute=None, **lora
) -> peft.PeftModel:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.requires_grad_(False)
    if nf4:
        to_nf4(model, compute or dtype)
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        **lora,
    }
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():  # a fresh B is zero, and hides whatever goes wrong with A
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted.train()


def batch(seed: int = 0, labelled: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) >= labelled, -100).masked_fill(mask == 0, -100)
    labels[:, 8] = ids[:, 8]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model: nn.Module, steps: int = 50) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of `steps` steps of AdamW, and the gradients of the last."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=5e-3)
    losses = []
    for step in range(steps):
        optimiser.zero_grad()
        loss = model(**batch(step % 3)).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, [p.grad for p in trainable]


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor] | None = None, **options) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**(inputs or batch()), **options).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor], band: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= band * max(b.abs().max().item(), 1e-2)


MODES = {"layers": {}, "head": {"loss_head": True}, "all": {"loss_head": True, "last_layer": True}}


@pytest.mark.parametrize(("kind", "nf4"), [("llama", True), ("qwen2", False)], ids=["llama-nf4", "qwen2-dense"])
def test_fifty_steps_agree_with_the_stock_path(kind, nf4):
    stock_losses, stock_gradients = train(make(kind, nf4=nf4))
    assert stock_losses[-1] < 0.95 * stock_losses[0]
    for mode in ("layers", "all"):
        model = make(kind, nf4=nf4)
        report = install(model, **MODES[mode])
        losses, grads = train(model)
        assert losses == pytest.approx(stock_losses, rel=2e-5)
        assert_close(grads, stock_gradients, 5e-3)
        assert sum(kernel == "lora_mlp" for kernel in report.replaced.values()) == LAYERS
        assert not report.kept


@pytest.mark.parametrize(
    ("kind", "nf4", "augmented"),
    [
        *((kind, True, False) for kind in CONFIGS),
        ("llama-bias", False, False),
        ("gemma2", False, False),
        ("llama-bias", True, True),
        ("gemma2", True, True),
    ],
)
def test_gradients_agree_on_every_architecture(kind, nf4, augmented):
    model = make(kind, nf4=nf4)
    want = gradients(model)
    with installed(model, loss_head=True, augmented=augmented) as report:
        got = gradients(model)
    kernels = list(report.replaced.values())
    assert [kernels.count(k) for k in ("lora_qkv", "lora_mlp", "lora_linear")] == [3 * LAYERS, LAYERS, LAYERS]
    assert "completion_cross_entropy" in kernels
    assert not report.kept
    assert_close(got, want, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_agree_within_their_band(dtype):
    want = gradients(make(dtype=torch.float32))
    model = make(dtype=dtype)
    stock = gradients(model)
    install(model, loss_head=True, last_layer=True)
    got = gradients(model)
    for mine, theirs, true in zip(got, stock, want, strict=True):
        error, stock_error = ((x.float() - true).abs().max() for x in (mine, theirs))
        assert error <= 2 * stock_error + 2e-2 * true.abs().max()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_autocast(compute):
    model = make(compute=compute)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = gradients(model)
        install(model, loss_head=True)
        got = gradients(model)
    assert all(a.dtype == b.dtype for a, b in zip(got, want, strict=True))
    assert_close(got, want, 6e-2)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_uninstall_returns_exactly(kind):
    want, want_gradients = train(make(kind), 3)
    model = make(kind)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    install(model, loss_head=True, last_layer=kind == "llama")
    uninstall(model)
    uninstall(model)  # once more: nothing to do
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert "forward" not in module.__dict__
    losses, grads = train(model, 3)
    assert losses == want
    assert all(torch.equal(a, b) for a, b in zip(grads, want_gradients, strict=True))


def test_installing_is_idempotent_and_options_can_change():
    model = make()
    first = install(model)
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    assert install(model) is first
    assert [m.__dict__.get("forward") for m in model.modules()] == forwards
    assert "completion_cross_entropy" in install(model, loss_head=True).replaced.values()
    with installed(model, loss_head=True, augmented=True):
        pass
    assert install(model, loss_head=True).replaced
    uninstall(model)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_context_manager_takes_the_kernels_out_after_an_error():
    model = make()
    with pytest.raises(KeyError), installed(model):
        raise KeyError
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_last_layer_without_loss_head_is_refused():
    with pytest.raises(ValueError, match="needs loss_head=True"):
        install(make(), last_layer=True)


def test_uninstall_refuses_what_was_wrapped_since():
    model = make()
    install(model)
    mlp = model.get_base_model().model.layers[0].mlp
    ours = mlp.forward
    mlp.forward = lambda x: ours(x)
    with pytest.raises(RuntimeError, match="LlamaMLP was replaced after install"):
        uninstall(model)
    mlp.forward = ours
    uninstall(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("keep_dense", [False, True])
def test_gradient_checkpointing(reentrant, keep_dense, monkeypatch):
    model = make()
    want = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    install(model, loss_head=True, last_layer=True)
    dropped = gradients(model)
    install(model, loss_head=True, last_layer=True, keep_dense=keep_dense)
    from fastprice_kernels import lora

    calls, dequantize = [], lora.dequantize_nf4
    monkeypatch.setattr(lora, "dequantize_nf4", lambda *a, **k: calls.append(1) or dequantize(*a, **k))
    got = gradients(model)
    assert_close(got, want, 2e-5)
    assert all(torch.equal(a, b) for a, b in zip(got, dropped, strict=True)), "the weights are the same bits"
    # Re-entrant checkpointing runs the first forward without gradient; the last layer then has few enough labelled rows
    # in its output projection and MLP for bitsandbytes' own product.
    assert len(calls) == LAYERS * 7 * (2 if keep_dense else 3) - 4 * reentrant


def test_keep_dense_does_nothing_without_recomputation(monkeypatch):
    model = make()
    install(model, keep_dense=True)
    layer = model.get_base_model().model.layers[0]
    patch = layer.mlp.__dict__[heads.PATCH]
    assert patch.around is layer
    assert patch.arguments["keep_dense"] is False
    layer.gradient_checkpointing = True
    assert patch.arguments["keep_dense"] is True
    layer.eval()
    assert patch.arguments["keep_dense"] is False


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_generation_is_what_it_was(kind):
    model = make(kind).eval()
    prompt = {k: v for k, v in batch().items() if k != "labels"}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**prompt, **options)
    install(model, loss_head=True, last_layer=kind == "llama")
    assert torch.equal(model.generate(**prompt, **options), want)
    assert torch.equal(model.generate(**prompt, **options, use_cache=False), want)


def test_evaluation_agrees_and_logits_are_there_without_labels():
    model = make().eval()
    inputs = batch()
    labels = inputs.pop("labels")
    with torch.no_grad():
        want = model(**inputs, labels=labels)
        install(model, loss_head=True, last_layer=True)
        got = model(**inputs, labels=labels)
        torch.testing.assert_close(got.loss, want.loss)
        assert got.logits is None
        torch.testing.assert_close(model(**inputs).logits, want.logits)
        kept = model(**inputs, labels=None, logits_to_keep=2).logits
        torch.testing.assert_close(kept, want.logits[:, -2:])
        states = model(**inputs, labels=labels, output_hidden_states=True)
    assert len(states.hidden_states) == LAYERS + 1
    assert states.hidden_states[-1].shape == (3, 12, WIDTH)
    torch.testing.assert_close(states.loss, want.loss)


def test_inference_mode_gives_the_same_logits():
    model = make().eval()
    inputs = batch()
    del inputs["labels"]
    with torch.inference_mode():
        want = model(**inputs).logits
        install(model, loss_head=True, last_layer=True)
        torch.testing.assert_close(model(**inputs).logits, want)


def test_outputs_carry_what_trl_reads():
    model = make()
    inputs = batch()
    logits = model(**inputs).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    install(model, loss_head=True, last_layer=True)
    output = model(**inputs)
    known = labels != -100
    assert output.num_valid_tokens == known.sum()
    assert output.num_correct_tokens == ((logits.argmax(-1) == labels) & known).sum()
    entropy = torch.distributions.Categorical(logits=logits).entropy()[known].sum()
    torch.testing.assert_close(output.entropy_sum, entropy.detach())


@pytest.mark.parametrize("mode", MODES)
def test_losses_add_up_over_micro_batches(mode):
    model, inputs = make(), batch()
    items = (inputs["labels"][:, 1:] != -100).sum()
    want = gradients(model, num_items_in_batch=items)
    install(model, **MODES[mode])
    model.zero_grad()
    total = 0.0
    for row in range(3):
        loss = model(**{k: v[row : row + 1] for k, v in inputs.items()}, num_items_in_batch=items).loss
        loss.backward()
        total += loss.detach()
    got = [total, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert_close(got, want, 2e-5)


@pytest.mark.parametrize("mode", ["head", "all"])
def test_without_labelled_tokens_loss_and_gradients_are_zero(mode):
    model, inputs = make(), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    install(model, **MODES[mode])
    for value in gradients(model, inputs):
        assert torch.equal(value, torch.zeros_like(value))


def test_labels_that_are_shifted_already():
    model, inputs = make(), batch()
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    want = gradients(model)
    install(model, loss_head=True, last_layer=True)
    assert_close(gradients(model, {**inputs, "shift_labels": shifted}), want, 2e-5)


@pytest.mark.parametrize("mode", ["head", "all"])
def test_positions_that_come_with_the_batch(mode, monkeypatch):
    model, inputs = make(), batch()
    want = gradients(model)
    install(model, **MODES[mode])
    found = labelled_positions(inputs["labels"])
    inputs["label_positions"] = torch.cat([found, found.new_full((4,), 35)])  # the last position predicts nothing
    asked = []
    monkeypatch.setattr(heads, "labelled_positions", lambda *a, **k: asked.append(a))
    assert_close(gradients(model, inputs), want, 2e-5)
    assert not asked
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    assert logits.shape == (3, 12, VOCABULARY)


def test_the_heads_chunks_go_by_all_positions(monkeypatch):
    model, asked = make(), []
    install(model, loss_head=True, last_layer=True)
    chunk_rows = heads.chunk_rows
    monkeypatch.setattr(heads, "chunk_rows", lambda *a, **k: asked.append(a[2:]) or chunk_rows(*a, **k))
    inputs = batch()
    model(**inputs).loss.backward()
    assert asked == [(36, int((inputs["labels"][:, 1:] != -100).sum()))]


def test_last_layer_works_at_labelled_positions_alone():
    model, inputs = make(), batch(labelled=0.0)
    install(model, loss_head=True, last_layer=True)
    layers = model.get_base_model().model.layers
    seen: dict[str, torch.Size] = {}
    for name, module in (("first", layers[0].mlp), ("last", layers[-1].mlp), ("keys", layers[-1].self_attn.k_proj)):
        module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: i[0].shape}))
    model(**inputs).loss.backward()
    labelled = (inputs["labels"][:, 1:] != -100).sum()
    assert seen == {"first": (3, 12, WIDTH), "last": (1, labelled, WIDTH), "keys": (3, 12, WIDTH)}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_last_layer_is_offered_where_the_code_is_known(kind):
    assert heads.layer_trouble(make(kind).get_base_model().model.layers[-1]) is None


@pytest.mark.filterwarnings("ignore:fastprice_kernels leaves:UserWarning")
def test_last_layer_is_refused_where_the_code_is_another():
    model = make("gemma2")
    want = gradients(model)
    report = install(model, loss_head=True, last_layer=True)
    assert any("its code is not" in reason for reason in report.kept.values())
    assert_close(gradients(model), want, 2e-5)


def test_adapters_are_saved_as_without_kernels(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "stock")
    names = set(model.state_dict())
    install(model, loss_head=True, last_layer=True)
    model.save_pretrained(tmp_path / "kernels")
    assert set(model.state_dict()) == names
    a, b = ((tmp_path / which / "adapter_model.safetensors").read_bytes() for which in ("stock", "kernels"))
    assert a == b


def test_a_deep_copy_runs_on_its_own_weights():
    model = make()
    install(model, loss_head=True, last_layer=True)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    assert all(value.isfinite().all() for value in gradients(copied))
    uninstall(copied)
    assert not any("forward" in m.__dict__ for m in copied.modules())
    assert any("forward" in m.__dict__ for m in model.modules())


def test_adapters_that_are_switched_off_or_merged():
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
def test_what_the_kernels_cannot_do_stays_stock_with_one_warning(settings, reason):
    model = make(nf4=False, **settings)
    torch.manual_seed(1)
    want = gradients(model)
    with pytest.warns(UserWarning, match=f"leaves these on the stock path: .*{reason}") as caught:
        report = install(model)
    assert len(caught) == 1
    assert not report.replaced
    assert set(report.kept.values()) == {next(iter(report.kept.values()))}
    assert reason in str(report)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), want, strict=True))


def test_a_dropout_that_comes_later_goes_back_to_the_stock_path_with_one_warning():
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
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(model), strict=True))


def test_a_second_adapter_goes_back_to_the_stock_path():
    model = make(nf4=False)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    install(model)
    model.base_model.set_adapter(["default", "other"])
    with pytest.warns(UserWarning, match="several adapters active at once"):
        got = gradients(model)
    uninstall(model)
    assert_close(got, gradients(model), 2e-5)  # the layers with one adapter stay with the kernels


def test_hooks_inside_an_mlp_still_run():
    model = make()
    install(model)
    seen = []
    model.get_base_model().model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="hooks on the layers of an MLP"):
        gradients(model)
    assert seen == [1]


def test_a_head_with_an_adapter_keeps_its_loss():
    model = make(nf4=False, target_modules=["q_proj", "lm_head"])
    with pytest.warns(UserWarning, match="head and loss: its head is a Linear, not a plain Linear|its head is a"):
        report = install(model, loss_head=True)
    assert "completion_cross_entropy" not in report.replaced.values()
    assert model(**batch()).logits is not None


def test_a_model_that_bends_its_logits_otherwise_keeps_its_loss():
    model = make()
    causal = model.get_base_model()

    class Bent(type(causal)):
        def forward(self, **kwargs):
            output = super().forward(**kwargs)
            output.logits = output.logits.abs()
            return output

    causal.__class__ = Bent
    with pytest.warns(UserWarning, match="neither a scale nor a cap"):
        install(model, loss_head=True)


def test_the_forward_keeps_its_signature():
    model = make()
    causal = model.get_base_model()
    want = inspect.signature(causal.forward)
    install(model, loss_head=True)
    assert inspect.signature(causal.forward) == want
    positional = batch()
    torch.testing.assert_close(
        causal(positional["input_ids"], positional["attention_mask"], labels=positional["labels"]).loss,
        causal(**positional).loss,
    )


def test_weights_are_not_repacked_in_an_evaluation():
    model = make()
    bases = [m for m in model.modules() if type(m) is bnb.nn.Linear4bit]
    for base in bases:
        base.support_avx512bf16_for_cpu = True
    install(model)
    assert not any(base.support_avx512bf16_for_cpu for base in bases)
    uninstall(model)
    assert all(base.support_avx512bf16_for_cpu for base in bases)


def test_repacked_weights_are_refused():
    model = make()
    base = next(m for m in model.modules() if type(m) is bnb.nn.Linear4bit)
    base.weight.quant_state.packing_format_for_cpu = True
    assert "repacked" in _layers.read(base)


def test_a_trl_loss_is_taken_over_and_given_back():
    """TRL hangs its chunked loss on the model when a trainer is made; ours may come after it."""
    trl = pytest.importorskip("trl.trainer.sft_trainer")
    model = make()
    causal = model.get_base_model()
    trl._patch_chunked_ce_lm_head(causal, chunk_size=256)
    chunked = causal.__dict__["forward"]
    want = gradients(model)
    with installed(model, loss_head=True, last_layer=True) as report:
        assert "completion_cross_entropy" in report.replaced.values()
        assert_close(gradients(model), want, 2e-5)
        inputs = batch()
        inputs.pop("labels")
        assert model(**inputs).logits.shape == (3, 12, VOCABULARY)
    assert causal.__dict__["forward"] is chunked


@pytest.fixture
def fresh_accelerate():
    """Accelerate's state is one a process: whoever trained before this test has chosen another precision."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_full_fine_tuning_that_accelerate_wraps(fresh_accelerate):
    """Accelerate puts autocast around our forward; taking ours out leaves its wrapper, on stock code."""
    accelerate = fresh_accelerate
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    reference = accelerator.prepare_model(copy.deepcopy(plain))
    want = gradients(reference)
    report = install(plain, loss_head=True, last_layer=True)
    assert set(report.replaced.values()) == {"completion_cross_entropy", "last layer at labelled positions"}
    wrapped = accelerator.prepare_model(plain)
    assert_close(gradients(wrapped), want, 5e-2)
    assert wrapped(**batch()).logits is None
    uninstall(plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients(wrapped), want, strict=True))
    assert wrapped(**batch()).logits is not None


def test_plain_four_bit_models_without_adapters():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    model.requires_grad_(False)
    to_nf4(model)
    embeddings = torch.randn(2, 5, WIDTH, requires_grad=True)
    (want,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits.sum(), embeddings)
    with installed(model) as report:
        (got,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits.sum(), embeddings)
    assert set(report.replaced.values()) == {"lora_qkv", "lora_mlp", "lora_linear"}
    assert_close([got], [want], 1e-5)


def test_modules_are_told_by_what_they_do():
    class Doubled(nn.Module):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(self.up_proj(x)))

    class Turned(nn.Module):
        def forward(self, x):
            return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))

    class Other(nn.Module):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)).square() * self.up_proj(x))

    assert _layers.is_gated(Turned)
    assert not _layers.is_gated(Doubled)
    assert not _layers.is_gated(Other)
    activations = transformers.activations.ACT2FN
    names = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": None,
             "quick_gelu": None, "gelu_10": None}  # fmt: skip
    for name, kind in names.items():
        assert _layers.activation_of(SimpleNamespace(act_fn=activations[name])) == kind, name


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_model_with_kernels_compiles_into_one_graph(monkeypatch):
    monkeypatch.setitem(COMMON, "num_hidden_layers", 1)
    model = make()
    want = gradients(model)
    install(model, loss_head=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled), want, 2e-5)


def test_report_counts():
    report = InstallReport({"a": "lora_mlp", "b": "lora_mlp"}, {"c": "LoRA dropout of 0.1"})
    assert str(report) == "2 x lora_mlp\n1 x stock: LoRA dropout of 0.1"
    assert str(InstallReport()) == "nothing to replace"


# Unsloth, which loads no model without a GPU: first against modules of its shape, then against its own names.


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

    def unsloth_fused_ce_loss(
        trainer, hidden_states, lm_head_weight, lm_head_bias, labels, mask=None, n_items=None, scaling=None,
        target_gb=None, torch_compile=True, overwrite=False, shift_labels=True, **kwargs,
    ):  # fmt: skip
        return "stock loss"

    modules = {}
    for name in (
        "unsloth", "unsloth.kernels", "unsloth.kernels.utils", "unsloth.kernels.fast_lora", "unsloth.save",
        "unsloth.models", "unsloth.models.llama", "unsloth_zoo", "unsloth_zoo.loss_utils", "unsloth_compiled_module_x",
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
        "unsloth.models.llama": [fast_dequantize, unsloth_fused_ce_loss, *lora],
        "unsloth_zoo.loss_utils": [unsloth_fused_ce_loss],
        "unsloth_compiled_module_x": [unsloth_fused_ce_loss],
    }.items():
        for function in functions:
            setattr(modules[name], function.__name__, function)
    modules["unsloth.save"].fast_dequantize = lambda *a: "someone else's"
    return modules


def unsloth_model(modules, **options) -> nn.Module:
    """A model that Unsloth fused: its functions hang on the modules, its forward calls its loss by name."""
    model = make(**options)
    names = modules["unsloth.models.llama"]
    for layer in model.get_base_model().model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.stock = {"qkv": lambda x, a=attention: (a.q_proj(x), a.k_proj(x), a.v_proj(x)), "o": attention.o_proj}
        attention.apply_qkv, attention.apply_o = names.apply_lora_qkv, names.apply_lora_o
        mlp.stock = {"mlp": lambda x, m=mlp: type(m).forward(m, x)}
        mlp.forward = MethodType(names.apply_lora_mlp_swiglu, mlp)

        def attend(x, a=attention, **kwargs):
            q, k, v = (part.view(*x.shape[:-1], -1, 8).transpose(1, 2) for part in a.apply_qkv(a, x))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return a.apply_o(a, y.transpose(1, 2).flatten(2)), None

        attention.__dict__["_attend"] = attend
    causal = model.get_base_model()

    class Fused(type(causal)):
        pass

    # A function whose globals are Unsloth's module, as its own forward is.
    source = """
def forward(self, input_ids=None, labels=None, n_items=None, **kwargs):
    x = self.model.embed_tokens(input_ids)
    for layer in self.model.layers:
        x = x + layer.self_attn._attend(layer.input_layernorm(x))[0]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    loss = unsloth_fused_ce_loss(
        trainer=None, hidden_states=self.model.norm(x), lm_head_weight=self.lm_head.weight, lm_head_bias=None,
        labels=labels, mask=None, n_items=n_items, scaling=None, target_gb=None, torch_compile=True,
        logit_softcapping=0, logit_scale_multiply=0, logit_scale_divide=None, shift_labels=True)
    return Output(loss=loss)
"""
    names.Output = SimpleNamespace
    exec(source, vars(names))
    Fused.forward = names.forward
    causal.__class__ = Fused
    return model


def everything_of(modules):
    return {(name, key): value for name, module in modules.items() for key, value in vars(module).items()}


@pytest.mark.parametrize("nf4", [True, False])
def test_an_unsloth_model_runs_on_the_kernels_and_returns_exactly(unsloth_modules, nf4):
    model = unsloth_model(unsloth_modules, nf4=nf4)
    layers = model.get_base_model().model.layers
    before = everything_of(unsloth_modules)
    dicts = [dict(module.__dict__) for module in model.modules()]
    report = install(model, loss_head=True)
    kernels = list(report.replaced.values())
    assert [kernels.count(k) for k in ("lora_qkv", "lora_mlp", "lora_linear")] == [3 * LAYERS, 3 * LAYERS, LAYERS]
    assert not report.kept
    places = {name for name, kernel in report.replaced.items() if kernel == "completion_cross_entropy"}
    theirs = ("unsloth.models.llama", "unsloth_compiled_module_x", "unsloth_zoo.loss_utils")
    assert places == {f"{name}.unsloth_fused_ce_loss" for name in theirs}
    # Unsloth finds its fused layers by comparing what hangs on them with the names in its modules.
    assert layers[0].self_attn.apply_qkv is unsloth_modules["unsloth.models.llama"].apply_lora_qkv
    assert layers[0].self_attn.apply_qkv is unsloth_modules["unsloth.kernels.fast_lora"].apply_lora_qkv
    assert unsloth_modules["unsloth.save"].fast_dequantize() == "someone else's"
    inputs = {key: value for key, value in batch().items() if key != "attention_mask"}
    got = gradients(model, inputs, n_items=torch.tensor(7))
    assert not any("ran" in module.__dict__ for module in model.modules())
    uninstall(model)
    assert everything_of(unsloth_modules) == before
    for module, was in zip(model.modules(), dicts, strict=True):
        assert module.__dict__.keys() == was.keys()
        assert all(module.__dict__[key] is was[key] for key in ("apply_qkv", "apply_o", "forward") if key in was)

    def loss(*, hidden_states, lm_head_weight, labels, n_items, **_):
        logits = hidden_states @ lm_head_weight.T
        flat = labels[:, 1:].flatten()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), flat, reduction="sum") / n_items

    unsloth_modules["unsloth.models.llama"].unsloth_fused_ce_loss = loss
    want = gradients(model, inputs, n_items=torch.tensor(7))
    assert layers[0].self_attn.ran == ["qkv", "o"]
    assert layers[0].mlp.ran == ["mlp"]
    assert_close(got, want, 2e-5)


def test_unsloth_functions_go_back_when_the_last_model_lets_go(unsloth_modules):
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


def test_what_the_kernels_cannot_do_in_an_unsloth_model_stays_unsloths(unsloth_modules):
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


def test_the_fused_loss_takes_what_unsloth_hands_it(unsloth_modules):
    model = unsloth_model(unsloth_modules)
    with installed(model, loss_head=True):
        loss = unsloth_modules["unsloth.models.llama"].unsloth_fused_ce_loss
        hidden, weight, labels = torch.randn(2, 6, 8), torch.randn(11, 8), torch.randint(0, 11, (2, 6))
        given = {"trainer": None, "hidden_states": hidden, "lm_head_weight": weight, "lm_head_bias": None}
        logits = 5 * torch.tanh(hidden @ weight.T * 3 / 2 / 5)
        want = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        options = {"logit_softcapping": 5.0, "logit_scale_multiply": 3.0, "logit_scale_divide": 2.0}
        torch.testing.assert_close(loss(**given, labels=labels, **options, shift_labels=False), want)
        assert loss(**given, labels=labels, mask=torch.ones(2, 6)) == "stock loss"
        assert loss(**given, labels=labels, something_new=1) == "stock loss"


@pytest.mark.filterwarnings("ignore:fastprice_kernels leaves:UserWarning")
def test_an_unsloth_loss_out_of_reach_is_kept_with_its_reason(unsloth_modules):
    model = unsloth_model(unsloth_modules)
    unsloth_modules["unsloth_zoo.loss_utils"].unsloth_fused_ce_loss = lambda hidden, **options: None
    with installed(model, loss_head=True, last_layer=True) as report:
        assert any("unsloth_fused_ce_loss takes ['hidden', 'options']" in reason for reason in report.kept.values())
        assert any("whose code is Unsloth's" in reason for reason in report.kept.values())
    plain = make()
    plain.get_base_model().model.layers[0].self_attn.apply_qkv = None
    with installed(plain, loss_head=True) as report:
        assert any("does not call unsloth_fused_ce_loss" in reason for reason in report.kept.values())


def test_an_unsloth_of_another_shape_is_named_and_left_alone(unsloth_modules):
    model = unsloth_model(unsloth_modules)
    home, lora = (unsloth_modules[f"unsloth.kernels.{name}"] for name in ("utils", "fast_lora"))
    home.fast_dequantize = lambda W, state: None
    del lora.apply_lora_o
    before = everything_of(unsloth_modules)
    with pytest.raises(RuntimeError, match=r"Unsloth 2099.1.1: .* takes \['W', 'state'\].*apply_lora_o is gone"):
        install(model)
    assert everything_of(unsloth_modules) == before
    assert not any(heads.PATCH in module.__dict__ for module in model.modules())


@pytest.mark.slow
def test_the_installed_unsloth_has_the_shape_that_is_replaced(tmp_path):
    pytest.importorskip("importlib.util").find_spec("unsloth") or pytest.skip("unsloth is not installed")
    script = """
import sys, warnings
from types import MethodType
warnings.simplefilter("ignore")
import unsloth
import torch, peft, transformers
from fastprice_kernels import _unsloth, install, uninstall
import unsloth.models.llama as llama
from unsloth.models.llama import FastLlamaModel
names = [(m, n, vars(m)[n]) for m in list(sys.modules.values()) for n in _unsloth._FUNCTIONS
         if getattr(m, "__name__", "").startswith("unsloth") and n in vars(m)]
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
assert not report.kept, report.kept
left = [(m.__name__, n) for m, n, stock in names if vars(m)[n] is stock]
assert not left, left
assert len(llama._fused_lora_modules(model)) >= len(layers), "Unsloth finds its fused attention"
for a, b in zip(results(), want, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
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
        "kernels.fast_lora.apply_lora_mlp_swiglu", "models.mistral.unsloth_fused_ce_loss", "save.fast_dequantize",
    ):  # fmt: skip
        assert f"unsloth.{place}" in replaced
