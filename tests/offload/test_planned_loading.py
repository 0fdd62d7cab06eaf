"""`PriceEstimator(max_memory=...)`: planned, offloaded, and equal to the resident estimator."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

from fastprice import PriceEstimator, split_items
from fastprice.data.synthetic import make_synthetic_items
from fastprice.errors import ConfigError, TrainingError
from fastprice.memory.planner import find_plan
from fastprice.models.base_models import load_config
from fastprice.offload.device_transfers import SimulatedTransfers
from fastprice.training.cuda_graphs import unsupported_reason

SETTINGS: dict[str, Any] = {
    "rank": 4,
    "max_tokens": 64,
    "pack_tokens": 400,
    "gradient_accumulation": 2,
    "evaluations": 2,
    "validation_items": 4,
    "epochs": 1.0,
    "learning_rate": 1.5e-3,
    "warmup_ratio": 0.0,
}


def smallest_budget(engine: str) -> int:
    """Bytes in which the nano model fits only with all of its layers offloaded, by the planner's arithmetic."""
    config = load_config("nano")
    low, high = 1 << 28, 1 << 30
    while high - low > 1 << 12:
        middle = (low + high) // 2
        fits = find_plan(config, middle, tokens=400, rank=4, engine=engine, layer_offload=True)
        low, high = (low, middle) if fits else (middle, high)
    return high


@pytest.fixture(scope="module")
def split():
    return split_items(make_synthetic_items(70, seed=3))


@pytest.fixture
def transfers(monkeypatch) -> list[SimulatedTransfers]:
    """The simulated transfers of every loading."""
    made: list[SimulatedTransfers] = []

    def make(_: torch.device) -> SimulatedTransfers:
        made.append(SimulatedTransfers())
        return made[-1]

    monkeypatch.setattr("fastprice.offload.nf4_loading.transfers_for", make)
    return made


@pytest.mark.parametrize("kernels", ["off", "on"])
def test_an_offloaded_estimator_equals_the_resident_one(split, transfers, tmp_path, kernels):
    texts = [item.text for item in split.test][:4]
    resident = PriceEstimator(kernels=kernels, **SETTINGS).fit(split.train, split.validation)
    budget = smallest_budget("fastprice" if kernels == "on" else "peft")
    offloaded = PriceEstimator(kernels=kernels, max_memory=budget, **SETTINGS).fit(split.train, split.validation)
    assert offloaded.plan_.offloaded_layers == 4
    assert offloaded.plan_.tokens * offloaded.plan_.gradient_accumulation == 400
    (simulated,) = transfers
    assert len(simulated.device_buffers) == 2
    assert len(simulated.copied_bytes) > 30

    def events(estimator):
        return [(event.step, event.loss, event.eval_mae) for event in estimator.training_.events]

    assert events(offloaded) == events(resident)
    assert offloaded.training_.best_mae == resident.training_.best_mae
    weights, others = (
        {name: p for name, p in each._model.named_parameters() if p.requires_grad} for each in (offloaded, resident)
    )
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    expected = resident.predict(texts)
    assert np.array_equal(offloaded.predict(texts), expected)
    if kernels == "on":
        return
    assert np.array_equal(offloaded.predict_interval(texts, 0.8), resident.predict_interval(texts, 0.8))
    assert np.array_equal(offloaded.predict_greedy(texts), resident.predict_greedy(texts), equal_nan=True)

    loaded = PriceEstimator.load(offloaded.save(tmp_path / "saved"))
    assert loaded.plan_.offloaded_layers == 4
    assert np.array_equal(loaded.predict(texts), expected)
    assert len(transfers) == 2
    del loaded, offloaded
    gc.collect()
    assert not any(each.device_buffers for each in transfers)


def test_nothing_is_offloaded_if_the_model_fits(split, transfers):
    estimator = PriceEstimator(max_memory="24GiB", **SETTINGS).prepare()
    assert estimator.plan_.offloaded_layers == 0
    assert not transfers
    assert estimator.predict([split.test[0].text]).shape == (1,)


def test_a_failed_training_frees_the_device_buffers(split, transfers):
    estimator = PriceEstimator(max_memory=smallest_budget("peft"), **{**SETTINGS, "learning_rate": 1e30})
    with pytest.raises(TrainingError):
        estimator.fit(split.train)
    gc.collect()
    assert [len(each.device_buffers) for each in transfers] == [0]


def test_fitting_again_loads_again(split, transfers):
    estimator = PriceEstimator(max_memory=smallest_budget("peft"), **{**SETTINGS, "epochs": 0.2})
    first = estimator.fit(split.train).predict(split.test[:4])
    assert np.array_equal(estimator.fit(split.train).predict(split.test[:4]), first)
    gc.collect()
    assert [len(each.device_buffers) for each in transfers] == [0, 2]


def test_a_model_with_offloaded_layers_is_not_captured_in_a_graph(monkeypatch):
    estimator = PriceEstimator(max_memory=smallest_budget("peft"), **SETTINGS).prepare()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "offloaded" in unsupported_reason(estimator._model, kernels=True, dtype=torch.bfloat16, processes=1)


def test_impossible_settings():
    with pytest.raises(ConfigError, match=r"does not fit in 0\.3 GiB"):
        PriceEstimator(max_memory="300MiB", **SETTINGS).prepare()
    with pytest.raises(ConfigError, match="max_memory: 'much' is not a size"):
        PriceEstimator(max_memory="much", **SETTINGS).prepare()


def test_an_engine_without_layers_on_the_host_takes_a_plan_that_needs_none():
    from fastprice.models.engine_features import UNSLOTH_LACKS
    from fastprice.models.peft_engine import PeftEngine
    from fastprice.offload.planned_loading import load_planned

    class Unsloth(PeftEngine):  # which loads no model without a GPU
        name = "unsloth"

        def unsupported(self, feature):
            return UNSLOTH_LACKS.get(feature)

    sizes = {"method": "qlora", "rank": 4, "pack_tokens": 400, "max_tokens": 128, "kernels": False}
    planned = load_planned("nano", "24GiB", Unsloth(), **sizes)
    assert (planned.plan.offloaded_layers, planned.layer_offload) == (0, None)
    with pytest.raises(ConfigError, match=r"must be on the host, and the unsloth engine .* use engine='peft'"):
        load_planned("nano", smallest_budget("peft"), Unsloth(), **sizes)


def test_max_memory_on_the_command_line(fastprice, tmp_path):
    status, output, _ = fastprice(
        "train", "--set", "data.synthetic=60", f"model.max_memory={smallest_budget('peft')}", "model.rank=4",
        "model.max_tokens=64", "train.pack_tokens=400", "train.epochs=0.2", "train.evaluations=1",
        "train.validation_items=4", "--out", tmp_path / "run",
    )  # fmt: skip
    assert status == 0, output
    assert "max_memory: " in (tmp_path / "run" / "config.yaml").read_text()
    status, output, _ = fastprice("predict", "--model", tmp_path / "run", "--item", "Used road bike")
    assert status == 0
    assert "$" in output
