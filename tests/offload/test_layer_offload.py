"""Layer offload on a simulated device: the numbers of the resident model, two visits a layer, everything freed."""

from __future__ import annotations

import gc
import hashlib
import itertools
import weakref
from contextlib import nullcontext

import pytest
import torch

from fastprice.errors import ConfigError, OffloadError
from fastprice.memory.activation_checkpointing import ActivationCheckpointing
from fastprice.models.parts import decoder_layers
from fastprice.offload import offload_layers, spread_layers
from fastprice.offload.device_transfers import SimulatedTransfers
from fastprice.offload.host_embedding import has_host_embedding
from fastprice.offload.host_layer import frozen_linears
from fastprice_kernels import installed

KERNELS = {"stock": None, "kernels": {}, "kernels, keep_dense": {"keep_dense": True}}
KERNELS["kernels, loss head"] = {"loss_head": True, "last_layer": True}


def enable_checkpointing(model, kind):
    model.train()
    if kind:
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        if kind == "reentrant":
            model.enable_input_require_grads()


def equal(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert one[1]
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("family", "layers", "device_buffers", "checkpointing", "kernels"),
    [
        ("llama", 5, 2, "", "stock"),
        ("llama", 5, 2, "non-reentrant", "stock"),
        ("llama", 5, 2, "", "kernels"),
        ("llama", 5, 2, "non-reentrant", "kernels, keep_dense"),
        ("llama", 4, 3, "reentrant", "kernels, loss head"),
        ("llama", 4, 3, "non-reentrant", "kernels, loss head"),
        ("qwen2", [0, 2, 3], 1, "", "kernels, loss head"),
        ("qwen2", [0, 2, 3], 1, "non-reentrant", "stock"),
    ],
)
def test_losses_and_gradients_are_those_of_the_resident_model(
    make_model, step, family, layers, device_buffers, checkpointing, kernels
):
    def run(model, micro_batches):
        enable_checkpointing(model, checkpointing)
        if KERNELS[kernels] is None:
            return step(model, micro_batches)
        with installed(model, **KERNELS[kernels]):
            return step(model, micro_batches)

    expected = run(make_model(family), 2)
    model = make_model(family)
    transfers = SimulatedTransfers()
    with offload_layers(model, layers, device_buffers=device_buffers, transfers=transfers):
        assert len(transfers.device_buffers) == device_buffers
        equal(run(model, 2), expected)
        equal(run(model, 2), expected)
    equal(run(model, 2), expected)  # on a CPU the model then computes with the host's copy


@pytest.mark.parametrize("kernels", ["stock", "kernels"])
@pytest.mark.parametrize(
    "levels",
    [["full"] * 5, ["selective"] * 5, ["offload"] * 5, ["offload", "full", "full", "selective", "none"]],
    ids=lambda levels: levels[-1],
)
def test_layer_offload_under_recompute_levels(make_model, step, levels, kernels):
    def run(model):
        with nullcontext() if kernels == "stock" else installed(model), ActivationCheckpointing(model, levels):
            return step(model, 2)

    expected = run(make_model().train())
    model = make_model().train()
    with offload_layers(model, 5, transfers=SimulatedTransfers()) as offload:
        equal(run(model), expected)
        assert offload.visits == dict.fromkeys(range(5), 2 * 2)


@pytest.mark.parametrize("checkpointing", ["", "non-reentrant", "reentrant"])
def test_two_visits_a_layer_and_no_copy_of_the_last_layers_between_them(make_model, step, checkpointing):
    model = make_model(layers=6)
    enable_checkpointing(model, checkpointing)
    transfers = SimulatedTransfers()
    with offload_layers(model, 6, device_buffers=2, transfers=transfers) as offload:
        for micro_batches, before in (
            (1, 0),
            (1, 2),
            (3, 2),
        ):  # `before`: layers left on the device by the step before
            offload.visits.clear()
            transfers.copied_bytes.clear()
            step(model, micro_batches)
            assert offload.visits == dict.fromkeys(range(6), 2 * micro_batches)
            assert len(transfers.copied_bytes) == 2 * (6 - 2) * micro_batches + 2 - before
            assert set(transfers.copied_bytes) == {offload.host_bytes // 6}


def test_prediction_prefetches_the_first_layers_after_the_last(make_model):
    model = make_model(layers=5).eval()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    transfers = SimulatedTransfers()
    with offload_layers(model, 5, device_buffers=2, transfers=transfers) as offload:
        for inference in (torch.no_grad, torch.inference_mode, torch.no_grad):
            with inference():
                assert torch.equal(model(input_ids=ids).logits, expected)
        assert set(offload.visits.values()) == {3}
        # A step after an evaluation and an evaluation after a step find the device buffers as the other left them.
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            assert torch.equal(model.eval()(input_ids=ids).logits, expected)


def test_a_layer_is_prefetched_as_soon_as_its_device_buffer_is_free(make_model, step):
    model = make_model().train()
    transfers = SimulatedTransfers()
    copies = []
    hooks = [
        decoder_layers(model)[2].register_forward_pre_hook(lambda *_: copies.append(len(transfers.copied_bytes))),
        decoder_layers(model)[2].register_full_backward_pre_hook(lambda *_: copies.append(len(transfers.copied_bytes))),
    ]
    with offload_layers(model, [1, 3], device_buffers=1, transfers=transfers):
        step(model)
    for hook in hooks:
        hook.remove()
    assert copies == [2, 3]  # forward: layers 1 and 3; backward: layer 1 again, after layer 3


def test_a_copy_waits_for_the_last_reader_of_its_device_buffer(make_model, step):
    class Recording(SimulatedTransfers):
        def copy(self, target, source, after):
            awaited.setdefault(target.data_ptr(), []).append(after)
            return super().copy(target, source, after)

    awaited = {}
    model = make_model().train()
    with offload_layers(model, 5, device_buffers=2, transfers=Recording()):
        step(model)
    for first, *later in awaited.values():
        assert first is None
        assert len(later) in (2, 4)  # layers 1 and 3; layers 0, 2 and 4
        assert None not in later
        assert len(set(later)) == len(later)  # a new event after each visit


def test_weights_are_nan_outside_their_visit(make_model):
    model = make_model(layers=5, adapters=False)
    linear = next(frozen_linears(decoder_layers(model)[2]))
    with offload_layers(model, 5, device_buffers=2), torch.no_grad():
        assert linear(torch.ones(1, 64)).isnan().all()
        model(input_ids=torch.arange(8)[None])
        assert linear(torch.ones(1, 64)).isnan().all()


def test_nothing_is_written_back(make_model, step):
    model = make_model()
    with offload_layers(model, 5) as offload:

        def checksums():
            return [hashlib.sha256(host.buffer.numpy().tobytes()).hexdigest() for host in offload._host_layers]

        before = checksums()
        step(model)
        assert checksums() == before
        assert len(set(before)) == 5


def test_a_failing_copy_reaches_the_caller_and_everything_is_freed(make_model, step):
    class Failing(SimulatedTransfers):
        left = 7

        def copy(self, target, source, after):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("CUDA error: the device\nfell off the bus")
            return super().copy(target, source, after)

    class FailingLater(SimulatedTransfers):
        left = 7

        def wait(self, event):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("the copy did not finish")
            super().wait(event)

    for kind, message in ((Failing, "fell off the bus"), (FailingLater, "did not finish")):
        expected = step(make_model().train())
        model = make_model().train()
        transfers = kind()
        with (
            pytest.raises(OffloadError, match=f"layer [0-9] could not be copied to the GPU.*{message}"),
            offload_layers(model, 5, transfers=transfers),
        ):
            step(model)  # seven copies succeed; the eighth is one of the backward pass
        gc.collect()
        assert not transfers.device_buffers
        equal(step(model), expected)


def test_an_interruption_frees_the_device_buffers(make_model, step):
    model = make_model().train()
    expected = step(model)
    transfers = SimulatedTransfers()
    layer = decoder_layers(model)[3]

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = layer.self_attn.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), offload_layers(model, 5, transfers=transfers) as offload:
        step(model)
    handle.remove()
    gone = weakref.ref(offload)
    del offload
    gc.collect()
    assert not transfers.device_buffers
    assert gone() is None
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    equal(step(model), expected)


def test_a_layer_whose_forward_failed_frees_its_device_buffer(make_model, step):
    model = make_model().train()
    expected = step(model)

    def fail(*_):
        raise MemoryError

    with offload_layers(model, 5, device_buffers=1):
        handle = decoder_layers(model)[3].mlp.register_forward_hook(fail)
        with pytest.raises(MemoryError):
            step(model)
        handle.remove()
        equal(step(model), expected)


def test_backward_after_close_is_an_error(make_model):
    model = make_model().train()
    ids = torch.arange(8)[None]
    with offload_layers(model, 5):
        loss = model(input_ids=ids, labels=ids).loss
    with pytest.raises(OffloadError, match="before close"):
        loss.backward()


def test_closing_to_the_device(make_model, step):
    model = make_model().train()
    expected = step(model)
    offload = offload_layers(model, 5)
    offload.close(to_device=True)
    offload.close()
    equal(step(model), expected)


def test_the_embedding_on_the_host(make_model, step):
    expected = step(make_model().train())
    model = make_model().train()
    table = model.get_input_embeddings().weight
    before = table.data.clone()
    with offload_layers(model, 5, host_embedding=True):
        assert table.shape == before.shape
        assert table.untyped_storage().nbytes() == 4
        assert table.isnan().all()
        equal(step(model), expected)
    assert torch.equal(table, before)
    with pytest.raises(ConfigError, match="tied to lm_head"):
        offload_layers(make_model("qwen2"), 2, host_embedding=True)


def test_token_ids_on_the_host_are_looked_up_without_those_on_the_device(make_model):
    model = make_model().eval()
    ids = torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert not has_host_embedding(model)
        with offload_layers(model, 5, host_embedding=True):
            assert has_host_embedding(model)
            unread = torch.zeros_like(ids)  # would be copied to the host, which waits for the device
            assert torch.equal(model(input_ids=unread, host_input_ids=ids.numpy()).logits, expected)
            assert torch.equal(model(input_ids=ids).logits, expected)  # no ids of an earlier pass
            with pytest.raises(ValueError, match="host_input_ids"):
                model(input_ids=ids, host_input_ids=ids[:, 1:].numpy())
        assert not has_host_embedding(model)
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_save_of_the_adapter_needs_no_base_weights(make_model, tmp_path):
    from peft.utils import get_peft_model_state_dict

    model = make_model()
    expected = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    with offload_layers(model, 5):
        found = get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_impossible_arguments(make_model):
    with pytest.raises(ConfigError, match=r"layers 0 to 4, not \[5\]"):
        offload_layers(make_model(), [5])
    with pytest.raises(ConfigError, match="6 of 5 layers"):
        offload_layers(make_model(), 6)
    with pytest.raises(ConfigError, match="0 device buffers"):
        offload_layers(make_model(), 2, device_buffers=0)
    model = make_model()
    transfers = SimulatedTransfers()
    decoder_layers(model)[1] = torch.nn.Linear(64, 64)
    with pytest.raises(ConfigError, match="layer 1 has no 4-bit weights"):
        offload_layers(model, [1], transfers=transfers)
    assert not transfers.device_buffers


def test_spread_layers_are_evenly_apart():
    assert spread_layers(8, 0) == []
    assert spread_layers(8, 8) == list(range(8))
    assert spread_layers(8, 2) == [2, 6]
    for layers in range(1, 40):
        for count in range(layers + 1):
            chosen = spread_layers(layers, count)
            assert len(set(chosen)) == count
            assert all(0 <= index < layers for index in chosen)
            if count:
                gaps = {b - a for a, b in itertools.pairwise(chosen)}
                assert len(gaps) <= 2
                assert max(gaps, default=1) - min(gaps, default=1) <= 1
