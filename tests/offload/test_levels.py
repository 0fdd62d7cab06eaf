"""Layers whose weights are streamed and that keep less than everything: the numbers of the resident model."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from fastprice.offload.transfers import PretendBoundary

from fastprice.memory.activation_checkpointing import keeping
from fastprice.offload import stream
from fastprice_kernels import installed


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "kernels"])
def test_streamed_layers_may_keep_anything(make_model, step, ours):
    def run(levels, streamed):
        model = make_model().train()
        with installed(model) if ours else nullcontext(), keeping(model, levels):
            if not streamed:
                return step(model, 2)
            with stream(model, 5, slots=2, boundary=PretendBoundary()) as streaming:
                found = step(model, 2)
                assert set(streaming.visits.values()) == {4}  # once forward, once backward, in each micro-batch
                return found

    losses, gradients = run(("all",) * 5, False)
    for levels in (("input",) * 5, ("host",) * 5, ("costly",) * 5, ("host", "input", "costly", "all", "costly")):
        got_losses, got_gradients = run(levels, True)
        assert got_losses == pytest.approx(losses, rel=1e-6)
        for name, want in gradients.items():
            if "costly" in levels:  # in fp32, to the last bits
                assert (got_gradients[name] - want).abs().max() <= 2e-6 * want.abs().max()
            else:
                assert torch.equal(got_gradients[name], want)
