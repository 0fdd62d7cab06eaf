"""The kernels under real model classes: trajectories against the stock path, exact return, checkpoints, generation."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref

import pytest
import torch
from tests.kernels.adapted_models import (
    COMMON,
    CONFIGS,
    LAYERS,
    MODES,
    WIDTH,
    assert_close,
    batch,
    gradients,
    make,
    train,
)

from fastprice_kernels.patching.install import install, installed, uninstall
from fastprice_kernels.patching.installation import PATCH, Patch
from fastprice_kernels.patching.resident import set_dense_layers

bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize(
    ("kind", "nf4", "steps"),
    [("llama", True, 50), ("qwen2", False, 50), *((kind, True, 12) for kind in CONFIGS if kind != "llama")],
)
@pytest.mark.filterwarnings("ignore:fastprice_kernels leaves:UserWarning")
def test_each_step_of_a_training_agrees_with_the_stock_path(kind, nf4, steps):
    """Every step from the same weights, those of the stock path: left alone, fp32 rounding grows from step to step by a
    factor that depends on the CPU. One step's is some hundred additions deep, each of them off by 6e-8 at most."""
    stock = make(kind, nf4=nf4)
    weights = [p for p in stock.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3)
    ours = {mode: make(kind, nf4=nf4) for mode in ("layers", "all")}
    for mode, model in ours.items():
        report = install(model, **MODES[mode])
        assert sum(kernel == "lora_mlp" for kernel in report.replaced.values()) == LAYERS
        assert kind in ("cohere", "granite") or not report.skipped
    losses = []
    for step in range(steps):
        want = gradients(stock, batch(step % 3))
        losses.append(want[0].item())
        for model in ours.values():
            got = gradients(model, batch(step % 3))
            assert got[0].item() == pytest.approx(losses[-1], rel=5e-6)
            assert_close(got, want, 1e-4)
        optimizer.step()
        with torch.no_grad():
            for model in ours.values():
                mine = [p for p in model.parameters() if p.requires_grad]
                for weight, theirs in zip(mine, weights, strict=True):
                    weight.copy_(theirs)
    assert losses[-1] < (0.95 if steps == 50 else 1.0) * losses[0]


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
@pytest.mark.filterwarnings("ignore:fastprice_kernels leaves:UserWarning")
def test_gradients_agree_on_every_architecture(kind, nf4, augmented):
    model = make(kind, nf4=nf4)
    want = gradients(model)
    with installed(model, loss_head=True, augmented=augmented) as report:
        got = gradients(model)
    kernels = list(report.replaced.values())
    assert [kernels.count(k) for k in ("lora_qkv", "lora_mlp", "lora_linear")] == [3 * LAYERS, LAYERS, LAYERS]
    assert "completion_cross_entropy" in kernels
    left = "residual additions: its code is not x + attention(norm(x)), then x + mlp(norm(x))"
    assert set(report.skipped.values()) == ({left} if kind in ("cohere", "granite") else set())
    assert_close(got, want, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_agree_within_rounding(dtype):
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
def test_uninstall_restores_everything(kind):
    want, want_gradients = train(make(kind), 3)
    model = make(kind)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    install(model, loss_head=True, last_layer=True)
    uninstall(model)
    uninstall(model)  # once more: nothing to do
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert "forward" not in module.__dict__
    losses, grads = train(model, 3)
    assert losses == want
    assert all(torch.equal(a, b) for a, b in zip(grads, want_gradients, strict=True))


def test_dense_layers_that_are_given_up_free_their_weights():
    model = make(compute=torch.bfloat16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="install"):
        set_dense_layers(model, 1)
    report = install(model)
    stock = gradients(model)
    assert set_dense_layers(model, 2) == sum(report.dense.values()) > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), stock, strict=True))
    patches = [each.__dict__.get(PATCH) for each in model.modules()]
    held = {id(r): weakref.ref(r.weights) for p in patches for r in getattr(p, "resident", {}).values()}
    assert len(held) == 2 * 4  # q, k and v; o; gate and up; down
    assert set_dense_layers(model, 0) == 0
    gc.collect()
    assert not report.dense
    assert not any(each() is not None for each in held.values())
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), stock, strict=True))


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


def test_context_manager_uninstalls_after_an_error():
    model = make()
    with pytest.raises(KeyError), installed(model):
        raise KeyError
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_uninstall_refuses_forwards_that_were_wrapped_later():
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
    from fastprice_kernels.ops import lora_products

    calls, dequantize = [], lora_products.dequantize_nf4
    monkeypatch.setattr(lora_products, "dequantize_nf4", lambda *a, **k: calls.append(1) or dequantize(*a, **k))
    got = gradients(model)
    assert_close(got, want, 2e-5)
    assert all(torch.equal(a, b) for a, b in zip(got, dropped, strict=True)), "the weights are the same bits"
    # Re-entrant checkpointing runs the first forward without gradient; the last layer then has few enough labeled rows
    # in its output projection and MLP for bitsandbytes' own product.
    assert len(calls) == LAYERS * 7 * (2 if keep_dense else 3) - 4 * reentrant


def test_keep_dense_does_nothing_without_recomputation(monkeypatch):
    model = make()
    install(model, keep_dense=True)
    layer = model.get_base_model().model.layers[0]
    patch = layer.mlp.__dict__[PATCH]
    assert patch.layer is layer
    assert patch.arguments["keep_dense"] is False
    layer.gradient_checkpointing = True
    assert patch.arguments["keep_dense"] is True
    layer.eval()
    assert patch.arguments["keep_dense"] is False


@pytest.mark.parametrize("options", [{}, {"mlp_tile": 7}])
def test_an_mlp_that_recomputes_gate_and_up(options):
    """`recompute_mlp` on a decoder layer: the same bits, and less saved; tiles: the same up to rounding."""
    model = make()
    install(model, loss_head=True)
    layers = model.get_decoder().layers
    want, most = gradients(model), saved_bytes(model)
    install(model, loss_head=True, **options)
    if options:
        assert_close(gradients(model), want, 2e-5)
    for layer in layers[1:3]:
        layer.recompute_mlp = True
    got, less = gradients(model), saved_bytes(model)
    if options:
        assert_close(got, want, 2e-5)
    else:
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    gate_and_up = 36 * 2 * 56 * 4  # tokens, tensors, intermediate size, bytes
    assert most - less == gate_and_up * (LAYERS if options else 2)
    for layer in layers:
        layer.__dict__.pop("recompute_mlp", None)
    install(model, loss_head=True)
    assert saved_bytes(model) == most


def saved_bytes(model):
    """Of all tensors that a forward pass saves, each storage once."""
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**batch()).loss
    del loss
    return sum(saved.values())


@pytest.mark.parametrize("kind", ["llama", "llama-bias"])
def test_dense_weights_change_no_bit_and_are_freed(kind, monkeypatch):
    from fastprice_kernels.ops import lora_products
    from fastprice_kernels.patching import resident

    model = make(kind)
    install(model, loss_head=True, last_layer=True)
    want, want_logits = gradients(model), model.eval()(**batch()).loss.detach()
    model.train()
    calls = []
    for module in (lora_products, resident):
        monkeypatch.setattr(
            module, "dequantize_nf4", lambda *a, _f=module.dequantize_nf4, **k: calls.append(1) or _f(*a, **k)
        )
    report = install(model, loss_head=True, last_layer=True, dense_layers=2)
    assert len(calls) == 2 * 7
    weights = 40 * (40 + 20 + 20 + 40 + 3 * 56)
    assert report.dense == {f"base_model.model.model.layers.{i}": 4 * weights for i in (2, 3)}
    assert f"2 x dense weights: {8 * weights / 1e9:.3g} GB" in str(report)
    calls.clear()
    got = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(model.eval()(**batch()).loss, want_logits)
    # Forward, backward (without q, k and v of the first layer, whose input needs no gradient), and the evaluation.
    assert len(calls) == (LAYERS - 2) * 7 * 3 - 3
    model.train()

    copied = copy.deepcopy(model)
    assert not any(m.__dict__[PATCH].resident for m in copied.modules() if hasattr(m.__dict__.get(PATCH), "resident"))
    assert all(torch.equal(a, b) for a, b in zip(gradients(copied), want, strict=True))
    held = [
        weakref.ref(each.weights)
        for m in model.modules()
        if isinstance(m.__dict__.get(PATCH), Patch)
        for each in m.__dict__[PATCH].resident.values()
    ]
    assert len(set(map(id, held))) == 2 * 4  # q, k and v; o; gate and up; down
    uninstall(model)
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_dense_weights_are_refused_where_they_may_move():
    model = make()
    layers = model.get_decoder().layers
    handle = layers[3].register_forward_pre_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="1 x dense weights of a layer with hooks, which may move its weights"):
        report = install(model, dense_layers=2)
    assert list(report.dense) == ["base_model.model.model.layers.2"]
    handle.remove()
    with pytest.raises(ValueError, match="dense_layers=-1 and mlp_tile=None"):
        install(model, dense_layers=-1)
    with pytest.raises(ValueError, match="mlp_tile=0"):
        install(model, mlp_tile=0)
    plain = make(nf4=False)
    with pytest.warns(UserWarning, match="4 x dense weights of a layer without 4-bit weights"):
        assert not install(plain, dense_layers=9).dense


def test_dense_weights_of_a_layer_that_gets_other_weights_are_not_used():
    model, other = make(), make(seed=1)
    install(model, loss_head=True, dense_layers=LAYERS)
    gradients(model)
    for mine, theirs in zip(model.modules(), other.modules(), strict=True):
        if type(mine) is bnb.nn.Linear4bit:
            mine.weight = theirs.weight
    got = gradients(model)
    uninstall(model)
    install(model, loss_head=True)
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(model), strict=True))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_generation_does_not_change(kind):
    model = make(kind).eval()
    prompt = {k: v for k, v in batch().items() if k != "labels"}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**prompt, **options)
    install(model, loss_head=True, last_layer=kind == "llama")
    assert torch.equal(model.generate(**prompt, **options), want)
    assert torch.equal(model.generate(**prompt, **options, use_cache=False), want)


def test_evaluation_agrees_and_has_logits_without_labels():
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
        last = model(**inputs, labels=None, logits_to_keep=2).logits
        torch.testing.assert_close(last, want.logits[:, -2:])
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


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_model_with_kernels_compiles_into_one_graph(monkeypatch):
    monkeypatch.setitem(COMMON, "num_hidden_layers", 1)
    model = make()
    want = gradients(model)
    install(model, loss_head=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled), want, 2e-5)
