"""The loss without logits and the last layer at labeled positions, on real model classes and inside wrappers."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.kernels.adapted_models import CONFIGS, MODES, VOCABULARY, WIDTH, assert_close, batch, gradients, make

from fastprice_kernels.ops.completion_cross_entropy import labeled_positions
from fastprice_kernels.patching import causal_loss
from fastprice_kernels.patching.install import install, installed, uninstall

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_last_layer_without_loss_head_is_refused():
    with pytest.raises(ValueError, match="needs loss_head=True"):
        install(make(), last_layer=True)


def test_outputs_have_the_statistics_that_trl_reads():
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
def test_without_labeled_tokens_loss_and_gradients_are_zero(mode):
    model, inputs = make(), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    install(model, **MODES[mode])
    for value in gradients(model, inputs):
        assert torch.equal(value, torch.zeros_like(value))


def test_labels_that_are_shifted_already():
    model, inputs = make(), batch()
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    want = gradients(model)
    inputs |= {"labels": torch.full_like(shifted, 5), "shift_labels": shifted}  # transformers reads the second alone
    assert_close(gradients(model, inputs), want, 0.0)
    install(model, loss_head=True, last_layer=True)
    assert_close(gradients(model, inputs), want, 2e-5)


@pytest.mark.parametrize("mode", ["head", "all"])
def test_positions_in_the_batch(mode, monkeypatch):
    model, inputs = make(), batch()
    want = gradients(model)
    install(model, **MODES[mode])
    found = labeled_positions(inputs["labels"])
    inputs["label_positions"] = torch.cat([found, found.new_full((4,), 35)])  # the last position predicts nothing
    searches = []
    monkeypatch.setattr(causal_loss, "labeled_positions", lambda *a, **k: searches.append(a))
    assert_close(gradients(model, inputs), want, 2e-5)
    assert not searches
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    assert logits.shape == (3, 12, VOCABULARY)


def test_the_size_of_a_chunk_counts_all_positions(monkeypatch):
    model, sizes = make(), []
    install(model, loss_head=True, last_layer=True)
    chunk_rows = causal_loss.chunk_rows
    monkeypatch.setattr(causal_loss, "chunk_rows", lambda *a, **k: sizes.append(a[2:]) or chunk_rows(*a, **k))
    inputs = batch()
    model(**inputs).loss.backward()
    assert sizes == [(36, int((inputs["labels"][:, 1:] != -100).sum()))]


@pytest.mark.parametrize("mode", ["head", "all"])
def test_free_memory_makes_one_chunk_of_the_labeled_rows(mode, monkeypatch):
    model, inputs, seen = make(), batch(), []
    want = gradients(model)
    inputs["label_positions"] = labeled_positions(inputs["labels"])
    sums = causal_loss.cross_entropy_sums
    monkeypatch.setattr(causal_loss, "cross_entropy_sums", lambda *a, **k: seen.append(k["chunk"]) or sums(*a, **k))
    install(model, **MODES[mode])
    assert_close(gradients(model, inputs), want, 2e-5)
    report = install(model, **MODES[mode], free_loss_bytes=2**24)
    assert "completion_cross_entropy" in report.replaced.values()
    assert_close(gradients(model, inputs), want, 2e-5)
    assert seen == [8, len(inputs["label_positions"])]
    assert seen[1] > 8


def test_last_layer_runs_at_labeled_positions_alone():
    model, inputs = make(), batch(labeled=0.0)
    install(model, loss_head=True, last_layer=True)
    layers = model.get_base_model().model.layers
    seen: dict[str, torch.Size] = {}
    for name, module in (("first", layers[0].mlp), ("last", layers[-1].mlp), ("keys", layers[-1].self_attn.k_proj)):
        module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: i[0].shape}))
    model(**inputs).loss.backward()
    labeled = (inputs["labels"][:, 1:] != -100).sum()
    assert seen == {"first": (3, 12, WIDTH), "last": (1, labeled, WIDTH), "keys": (3, 12, WIDTH)}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_last_layers_that_are_supported(kind):
    model = make(kind)
    want = gradients(model)
    report = install(model, loss_head=True, last_layer=True)
    assert "last layer at labeled positions" in report.replaced.values()
    assert_close(gradients(model), want, 2e-5)


@pytest.mark.filterwarnings("ignore:fastprice_kernels leaves:UserWarning")
@pytest.mark.parametrize("kind", ["cohere", "granite"])
def test_a_last_layer_with_other_code_stays_stock(kind):
    model = make(kind)
    want = gradients(model)
    report = install(model, loss_head=True, last_layer=True)
    assert "the last layer: its code is not x + attention" in "; ".join(report.skipped.values())
    assert_close(gradients(model), want, 2e-5)


def test_an_output_layer_with_an_adapter_keeps_the_stock_loss():
    model = make(nf4=False, target_modules=["q_proj", "lm_head"])
    with pytest.warns(
        UserWarning,
        match="output layer and loss: its output layer is a .*, not a plain Linear",
    ):
        report = install(model, loss_head=True)
    assert "completion_cross_entropy" not in report.replaced.values()
    assert model(**batch()).logits is not None


def test_a_model_that_changes_its_logits_in_another_way_keeps_the_stock_loss():
    model = make()
    causal = model.get_base_model()

    class Changed(type(causal)):
        def forward(self, **kwargs):
            output = super().forward(**kwargs)
            output.logits = output.logits.abs()
            return output

    causal.__class__ = Changed
    with pytest.warns(UserWarning, match="neither a scale nor a cap"):
        install(model, loss_head=True)


def test_the_chunked_loss_of_trl_is_replaced_and_restored():
    """TRL attaches its chunked loss to the model when a trainer is made; ours may come after it."""
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
    """Accelerate has one state a process: a training before this test has chosen another precision."""
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
    assert {"completion_cross_entropy", "last layer at labeled positions"} <= set(report.replaced.values())
    assert not {"lora_qkv", "lora_mlp", "lora_linear"} & set(report.replaced.values())
    wrapped = accelerator.prepare_model(plain)
    assert_close(gradients(wrapped), want, 5e-2)
    assert wrapped(**batch()).logits is None
    uninstall(plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients(wrapped), want, strict=True))
    assert wrapped(**batch()).logits is not None
