"""Streaming on the pretend boundary: the same numbers as resident, two visits a layer, nothing left behind."""

from __future__ import annotations

import gc
import hashlib
import itertools
import weakref
from contextlib import nullcontext

import pytest
import torch
from fastprice.offload.transfers import PretendBoundary

from fastprice.errors import ConfigError, StreamingError
from fastprice.memory.activation_checkpointing import keeping
from fastprice.offload import spread, stream
from fastprice.offload.host_layer import decoder_layers, frozen_linears
from fastprice_kernels import installed

KERNELS = {"stock": None, "kernels": {}, "kernels, keep_dense": {"keep_dense": True}}
KERNELS["kernels, loss head"] = {"loss_head": True, "last_layer": True}


def checkpointing(model, recompute):
    model.train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": recompute == "reentrant"})
        if recompute == "reentrant":
            model.enable_input_require_grads()


def equal(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert one[1]
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("family", "streamed", "slots", "recompute", "kernels"),
    [
        ("llama", 5, 2, "", "stock"),
        ("llama", 5, 2, "all", "stock"),
        ("llama", 5, 2, "", "kernels"),
        ("llama", 5, 2, "all", "kernels, keep_dense"),
        ("llama", 4, 3, "reentrant", "kernels, loss head"),
        ("llama", 4, 3, "all", "kernels, loss head"),
        ("qwen2", [0, 2, 3], 1, "", "kernels, loss head"),
        ("qwen2", [0, 2, 3], 1, "all", "stock"),
    ],
)
def test_losses_and_gradients_are_those_of_the_resident_model(
    make_model, step, family, streamed, slots, recompute, kernels
):
    def run(model, micro_batches):
        checkpointing(model, recompute)
        if KERNELS[kernels] is None:
            return step(model, micro_batches)
        with installed(model, **KERNELS[kernels]):
            return step(model, micro_batches)

    want = run(make_model(family), 2)
    model = make_model(family)
    boundary = PretendBoundary()
    with stream(model, streamed, slots=slots, boundary=boundary):
        assert len(boundary.slots) == slots
        equal(run(model, 2), want)
        equal(run(model, 2), want)
    equal(run(model, 2), want)  # on a CPU the host's copy is where the model computes afterwards


@pytest.mark.parametrize("kernels", ["stock", "kernels"])
@pytest.mark.parametrize(
    "levels", [["costly"] * 5, ["host"] * 5, ["host", "input", "input", "costly", "all"]], ids=lambda levels: levels[-1]
)
def test_streaming_under_any_plan_of_what_layers_keep(make_model, step, levels, kernels):
    def run(model):
        with nullcontext() if kernels == "stock" else installed(model), keeping(model, levels):
            return step(model, 2)

    want = run(make_model().train())
    model = make_model().train()
    with stream(model, 5, boundary=PretendBoundary()) as streaming:
        equal(run(model), want)
        assert streaming.visits == dict.fromkeys(range(5), 2 * 2)


@pytest.mark.parametrize("recompute", ["", "all", "reentrant"])
def test_two_visits_a_layer_and_no_copy_at_the_turn(make_model, step, recompute):
    model = make_model(layers=6)
    checkpointing(model, recompute)
    boundary = PretendBoundary()
    with stream(model, 6, slots=2, boundary=boundary) as streaming:
        for micro_batches, before in ((1, 0), (1, 2), (3, 2)):  # `before`: layers that the step before left in slots
            streaming.visits.clear()
            boundary.copies.clear()
            step(model, micro_batches)
            assert streaming.visits == dict.fromkeys(range(6), 2 * micro_batches)
            assert len(boundary.copies) == 2 * (6 - 2) * micro_batches + 2 - before
            assert set(boundary.copies) == {streaming.host_bytes // 6}


def test_prediction_goes_round_and_round(make_model):
    model = make_model(layers=5).eval()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        want = model(input_ids=ids).logits
    boundary = PretendBoundary()
    with stream(model, 5, slots=2, boundary=boundary) as streaming:
        for inference in (torch.no_grad, torch.inference_mode, torch.no_grad):
            with inference():
                assert torch.equal(model(input_ids=ids).logits, want)
        assert set(streaming.visits.values()) == {3}
        # A step after an evaluation and an evaluation after a step find the slots as the other left them.
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            assert torch.equal(model.eval()(input_ids=ids).logits, want)


def test_a_slot_outside_its_time_is_nan(make_model):
    model = make_model(layers=5, adapters=False)
    linear = next(frozen_linears(decoder_layers(model)[2]))
    with stream(model, 5, slots=2), torch.no_grad():
        assert linear(torch.ones(1, 64)).isnan().all()
        model(input_ids=torch.arange(8)[None])
        assert linear(torch.ones(1, 64)).isnan().all()


def test_nothing_is_written_back(make_model, step):
    model = make_model()
    with stream(model, 5) as streaming:

        def checksums():
            return [hashlib.sha256(host.flat.numpy().tobytes()).hexdigest() for host in streaming._hosts]

        before = checksums()
        step(model)
        assert checksums() == before
        assert len(set(before)) == 5


def test_a_failing_copy_reaches_the_caller_and_everything_is_freed(make_model, step):
    class Failing(PretendBoundary):
        left = 7

        def copy(self, target, source, after):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("CUDA error: the device\nfell off the bus")
            return super().copy(target, source, after)

    class FailingLater(PretendBoundary):
        left = 7

        def wait(self, event):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("the copy did not finish")
            super().wait(event)

    for kind, said in ((Failing, "fell off the bus"), (FailingLater, "did not finish")):
        want = step(make_model().train())
        model = make_model().train()
        boundary = kind()
        with (
            pytest.raises(StreamingError, match=f"layer [0-9] could not be brought to the device.*{said}"),
            stream(model, 5, boundary=boundary),
        ):
            step(model)  # seven copies go well: the eighth is one of the backward's
        gc.collect()
        assert not boundary.slots
        equal(step(model), want)


def test_interruption_frees(make_model, step):
    model = make_model().train()
    want = step(model)
    boundary = PretendBoundary()
    layer = decoder_layers(model)[3]

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = layer.self_attn.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), stream(model, 5, boundary=boundary) as streaming:
        step(model)
    handle.remove()
    gone = weakref.ref(streaming)
    del streaming
    gc.collect()
    assert not boundary.slots
    assert gone() is None
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    equal(step(model), want)


def test_a_layer_whose_forward_failed_does_not_keep_its_slot(make_model, step):
    model = make_model().train()
    want = step(model)

    def fail(*_):
        raise MemoryError

    with stream(model, 5, slots=1):
        handle = decoder_layers(model)[3].mlp.register_forward_hook(fail)
        with pytest.raises(MemoryError):
            step(model)
        handle.remove()
        equal(step(model), want)


def test_backward_after_close_is_refused(make_model):
    model = make_model().train()
    ids = torch.arange(8)[None]
    with stream(model, 5):
        loss = model(input_ids=ids, labels=ids).loss
    with pytest.raises(StreamingError, match="before close"):
        loss.backward()


def test_closing_resident(make_model, step):
    model = make_model().train()
    want = step(model)
    streaming = stream(model, 5)
    streaming.close(resident=True)
    streaming.close()
    equal(step(model), want)


def test_the_embedding_on_the_host(make_model, step):
    want = step(make_model().train())
    model = make_model().train()
    table = model.get_input_embeddings().weight
    before = table.data.clone()
    with stream(model, 5, host_embedding=True):
        assert table.shape == before.shape
        assert table.untyped_storage().nbytes() == 4
        assert table.isnan().all()
        equal(step(model), want)
    assert torch.equal(table, before)
    with pytest.raises(ConfigError, match="the head's too"):
        stream(make_model("qwen2"), 2, host_embedding=True)


def test_a_save_of_the_adapter_needs_no_base_weights(make_model, tmp_path):
    from peft.utils import get_peft_model_state_dict

    model = make_model()
    want = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    with stream(model, 5):
        found = get_peft_model_state_dict(model)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_what_cannot_be_streamed(make_model):
    with pytest.raises(ConfigError, match=r"layers 0 to 4, not \[5\]"):
        stream(make_model(), [5])
    with pytest.raises(ConfigError, match="6 of 5 layers"):
        stream(make_model(), 6)
    with pytest.raises(ConfigError, match="0 slots"):
        stream(make_model(), 2, slots=0)
    model = make_model()
    boundary = PretendBoundary()
    decoder_layers(model)[1] = torch.nn.Linear(64, 64)
    with pytest.raises(ConfigError, match="layer 1 has no 4-bit weights"):
        stream(model, [1], boundary=boundary)
    assert not boundary.slots


def test_spread_leaves_the_ends_resident_as_long_as_it_can():
    assert spread(8, 0) == []
    assert spread(8, 8) == list(range(8))
    assert spread(8, 2) == [2, 6]
    for layers in range(1, 40):
        for count in range(layers + 1):
            chosen = spread(layers, count)
            assert len(set(chosen)) == count
            assert all(0 <= index < layers for index in chosen)
            if count:
                gaps = {b - a for a, b in itertools.pairwise(chosen)}
                assert len(gaps) <= 2
                assert max(gaps, default=1) - min(gaps, default=1) <= 1
