"""The host's time for a layer: kernels are stubbed while it is measured, and ours is below stock PEFT's."""

from __future__ import annotations

import pytest
import torch

from fastprice.benchmarking import main
from fastprice.benchmarking.host_time import HostTime, layer_step, measure_host_time, without_work
from fastprice_kernels.ops import nf4_dequantize

bnb = pytest.importorskip("bitsandbytes")


def test_ours_takes_less_of_the_host_than_stock_peft() -> None:
    # Measured: 0.5 to 0.6. The fastest of several turns, each of them beside the other, so that other work on the
    # machine slows both.
    found = measure_host_time(rounds=8, steps=10)
    assert 0 < found.fastprice < 0.85 * found.peft


def test_stubs_are_in_force_while_open_and_gone_after() -> None:
    weight = bnb.nn.Params4bit(torch.randn(8, 64), requires_grad=False, quant_type="nf4").to("cpu")
    state = weight.quant_state

    def values() -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.full((8, 64), 7.0)
        nf4_dequantize.dequantize_nf4(weight, state, out=out)
        return out, bnb.functional.dequantize_4bit(weight.data, state)

    before = values()
    with without_work():
        ours, theirs = values()
        assert (ours == 7.0).all()
        assert (theirs == 0.0).all()
    assert all(torch.equal(a, b) for a, b in zip(values(), before, strict=True))


def test_the_measured_layer_runs_on_the_kernels() -> None:
    """Without the stubs both layers train: the kernels are called with them, and only then."""
    for kernels in (True, False):
        calls: list[int] = []
        direct = nf4_dequantize._dequantize_op.direct
        original = direct[False]
        direct[False] = lambda *a, calls=calls, original=original: calls.append(1) or original(*a)
        try:
            layer_step(kernels=kernels)()
        finally:
            direct[False] = original
        assert len(calls) == (14 if kernels else 0)


def test_the_command_prints_the_ratio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        "fastprice.benchmarking.host_time.measure_host_time", lambda rounds: HostTime(500.0, 10 * rounds)
    )
    assert main(["host", "--rounds", "100"]) == 0
    assert "fastprice 500 us, stock PEFT 1000 us, ratio 0.50" in capsys.readouterr().out
