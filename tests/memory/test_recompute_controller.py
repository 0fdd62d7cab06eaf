"""The recompute controller: where a training begins, how measurements change the levels, and repeated micro-batches."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.memory.small_models import LAYERS, make_batch, make_model

from fastprice.errors import ConfigError, TrainingError
from fastprice.memory.activation_checkpointing import checkpointable_layers
from fastprice.memory.dense_weights import DenseWeights
from fastprice.memory.estimate import CUDA_CONTEXT, estimate_memory
from fastprice.memory.recompute_controller import (
    MAX_MEASUREMENTS,
    WINDOW,
    CandidateLevels,
    RecomputeController,
    reserved_bytes_estimator,
)

COST = {"none": 100, "selective": 50, "mlp": 25, "full": 10, "offload": 0}


def expected(levels: Any) -> int:
    return sum(COST[level] for level in levels)


class SimulatedMeter:
    """A device of `size` bytes on which levels take `need(levels)` bytes."""

    def __init__(self, size: int, need: Any = expected) -> None:
        self.size, self.need = size, need
        self.controller: RecomputeController | None = None
        self.resets = 0

    def limit(self) -> int:
        return self.size

    def peak(self) -> int:
        assert self.controller is not None
        return int(self.need(self.controller.levels))

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def model() -> Any:
    return make_model()


def controller_on(model: Any, meter: SimulatedMeter, **options: Any) -> RecomputeController:
    meter.controller = RecomputeController(model, CandidateLevels(LAYERS, expected), meter, **options)
    return meter.controller


def test_candidates_go_from_no_recomputation_to_offload_layer_by_layer() -> None:
    candidates = CandidateLevels(3, expected)
    assert candidates.candidates == [
        ("none", "none", "none"), ("selective", "none", "none"), ("selective", "selective", "none"),
        ("selective", "selective", "selective"), ("mlp", "selective", "selective"), ("mlp", "mlp", "selective"),
        ("mlp", "mlp", "mlp"), ("full", "mlp", "mlp"), ("full", "full", "mlp"), ("full", "full", "full"),
        ("offload", "full", "full"), ("offload", "offload", "full"), ("offload", "offload", "offload"),
    ]  # fmt: skip
    sizes = [300, 250, 200, 150, 125, 100, 75, 60, 45, 30, 20, 10, 0]
    assert [candidates.expected_bytes(index) for index in range(13)] == sizes
    assert [candidates.first_fitting(size) for size in (300, 299, 150, 29, -1)] == [0, 1, 3, 10, 12]
    assert CandidateLevels(3, expected, offload=False).candidates == candidates.candidates[:10]
    assert CandidateLevels(2).candidates == [("full", "full"), ("offload", "offload")]
    assert CandidateLevels(2, offload=False).candidates == [("full", "full")]


@pytest.mark.parametrize(
    ("size", "levels"),
    [(1000, ["none"] * 4), (400, ["selective"] + ["none"] * 3), (210, ["selective"] * 4), (45, ["full"] * 4),
     (20, ["offload"] * 3 + ["full"]), (0, ["offload"] * 4)],
)  # fmt: skip
def test_it_begins_with_the_first_candidate_that_is_expected_to_fit(model: Any, size: int, levels: list[str]) -> None:
    controller = controller_on(model, SimulatedMeter(size))
    assert list(controller.levels) == levels
    controller.remove()


def test_given_levels_change_only_when_memory_runs_out(model: Any) -> None:
    given = ("none", "offload", "full", "none")  # 210
    candidates = CandidateLevels(LAYERS, expected, initial=given)
    assert candidates.candidates[:2] == [given, ("selective",) * 4]
    assert candidates.candidates[-1] == ("offload",) * 4
    assert CandidateLevels(LAYERS, initial=given).candidates == [given, ("full",) * 4, ("offload",) * 4]
    assert CandidateLevels(LAYERS, expected, initial=("offload",) * 4).candidates == [("offload",) * 4]
    controller = RecomputeController(model, candidates, SimulatedMeter(100), adapt=False)
    assert controller.levels == given
    windows(controller, MAX_MEASUREMENTS)
    assert controller.levels == given
    fails = [1]

    def micro_batch() -> None:
        if fails:
            fails.pop()
            raise torch.OutOfMemoryError("simulated")

    controller.run(micro_batch)
    assert expected(controller.levels) <= 97
    controller.remove()


def windows(controller: RecomputeController, count: int) -> None:
    for _ in range(count * WINDOW):
        controller.run(lambda: None)


def test_measurements_change_the_levels_in_both_directions(model: Any) -> None:
    for factor, overhead, at_first, at_last in (
        (1.0, 50, ["selective"] * 3 + ["none"], ["selective"] * 4),
        (0.5, 0, ["selective"] * 3 + ["none"], ["none"] * 4),
        (1.0, 0, ["selective"] * 3 + ["none"], ["selective"] * 3 + ["none"]),
    ):

        def need(levels: Any, factor: float = factor, overhead: int = overhead) -> float:
            return factor * expected(levels) + overhead

        controller = controller_on(model, SimulatedMeter(265, need), warmup=2)
        assert list(controller.levels) == at_first
        controller.run(lambda: None)
        controller.run(lambda: None)
        windows(controller, MAX_MEASUREMENTS + 1)
        assert list(controller.levels) == at_last
        assert (at_first == at_last) == (not controller.changes)
        assert need(controller.levels) <= 265
        controller.remove()


def test_nothing_is_measured_before_the_first_step_has_ended_or_across_an_evaluation(model: Any) -> None:
    taken = [10**6]
    controller = controller_on(model, SimulatedMeter(265, lambda levels: taken[0]), warmup=3)
    before = controller.levels
    for _ in range(3):
        controller.run(lambda: None)
    assert controller.levels == before
    for _ in range(WINDOW - 1):
        controller.run(lambda: None)
    controller.restart_measurement()
    windows(controller, 1)
    assert controller.levels != before  # a whole window after the evaluation
    controller.remove()
    steady = controller_on(model, SimulatedMeter(265, lambda levels: taken[0]), adapt=False)
    windows(steady, MAX_MEASUREMENTS + 1)
    assert steady.levels == before
    steady.remove()


def _training(model: Any, controller: RecomputeController | None, *, fail: Any = None) -> list[Any]:
    """Three steps of two micro-batches with AdamW; losses, then weights. `fail(micro-batch, layer)` raises."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(3)
    losses = []
    number = 0
    hooks = [
        layer.register_full_backward_pre_hook(lambda *_, at=at: fail(number, at) if fail else None)
        for at, layer in enumerate(checkpointable_layers(model))
    ]

    def micro_batch() -> Any:
        loss = model(**make_batch(number)).loss
        loss.backward()
        return loss.detach()

    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            losses.append(micro_batch() if controller is None else controller.run(micro_batch))
            number += 1
        optimizer.step()
    for hook in hooks:
        hook.remove()
    return [*losses, *(p.detach().clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_repeated_micro_batch_changes_no_loss_and_no_weight(dropout: float) -> None:
    """Memory runs out in the middle of a backward pass, when some layers have their gradients already: in the first
    and in the second micro-batch of a step, and twice in a row."""
    want = _training(make_model(dropout=dropout), None)
    model = make_model(dropout=dropout)
    costs = {(0, 1): 1, (3, 2): 2, (5, 0): 1}

    def fail(number: int, at: int) -> None:
        if costs.get((number, at)):
            costs[number, at] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    # It begins at "full": this level and "offload" are bitwise equal in an fp32 model too.
    controller = controller_on(model, SimulatedMeter(42))
    assert list(controller.levels) == ["full"] * 4
    got = _training(model, controller, fail=fail)
    assert controller.retries == 4
    assert not any(costs.values())
    assert list(controller.levels) == ["offload"] * 4
    assert len(controller.changes) == 4
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora" in n)
    controller.remove()


def test_levels_that_failed_are_not_taken_again_and_undo_runs_first(model: Any) -> None:
    meter = SimulatedMeter(400, lambda levels: 0.1 * expected(levels))  # every candidate seems to fit
    controller = controller_on(model, meter)
    assert list(controller.levels) == ["selective"] + ["none"] * 3
    undone: list[str] = []

    def micro_batch() -> int:
        if "none" in controller.levels:
            raise torch.OutOfMemoryError("simulated")
        return 7

    assert controller.run(micro_batch, lambda: undone.append("x")) == 7
    assert len(undone) == controller.retries > 0
    tried = controller.retries
    for _ in range((MAX_MEASUREMENTS + 2) * WINDOW):
        assert controller.run(micro_batch) == 7
    assert controller.retries == tried
    assert list(controller.levels) == ["selective"] * 4
    controller.remove()


def test_it_raises_one_line_when_the_last_candidate_fails(model: Any) -> None:
    for candidates in (CandidateLevels(LAYERS, expected), CandidateLevels(LAYERS)):
        controller = RecomputeController(model, candidates, SimulatedMeter(10**6))

        def micro_batch() -> None:
            raise torch.OutOfMemoryError("simulated")

        with pytest.raises(
            TrainingError, match=r"out of memory: .*even with recompute='offload'; lower pack_tokens"
        ) as error:
            controller.run(micro_batch)
        assert "\n" not in str(error.value)
        controller.remove()


def test_the_estimator_is_estimate_memory_without_the_context() -> None:
    model = make_model("llama", nf4=True)
    found = reserved_bytes_estimator(model, tokens=512, sequences=4, labeled=0.05, kernels=True)
    assert found is not None
    levels = ("full", "selective", "none", "offload")
    estimate = estimate_memory(
        model.config, method="qlora", rank=4, tokens=512, sequences=4, recompute=levels, loss_head="completion",
        labeled=0.05, engine="fastprice",
    )  # fmt: skip
    assert found(levels) == estimate.peak_bytes - CUDA_CONTEXT
    unknown = SimpleNamespace(config={"model_type": "mamba"})
    assert reserved_bytes_estimator(unknown, tokens=512, sequences=4, labeled=0.05, kernels=True) is None


class TestTraining:
    """The setting `recompute` of PriceEstimator, on the nano model."""

    @staticmethod
    def fit(meter: Any = None, fail: Any = None, **settings: Any) -> Any:
        from unittest.mock import patch

        from fastprice import PriceEstimator
        from fastprice.data.synthetic import make_synthetic_items
        from fastprice.training import train as training

        options = {"epochs": 1.0, "max_tokens": 96, "pack_tokens": 512, "evaluations": 0, "kernels": "on", **settings}
        estimator = PriceEstimator(**options).prepare()
        if fail is not None:
            checkpointable_layers(estimator._model)[0].mlp.register_forward_pre_hook(fail)
        original = training.train

        def with_meter(*args: Any, **kwargs: Any) -> Any:
            options = replace(kwargs.pop("options"), meter=meter)
            return original(*args, **kwargs, options=options)

        with patch.object(training, "train", with_meter):
            return estimator.fit(make_synthetic_items(60, seed=2))

    @staticmethod
    def losses(estimator: Any) -> list[float]:
        return [event.loss for event in estimator.training_.events if event.loss is not None]

    def test_an_explicit_level_trains_alike_and_is_reported(self) -> None:
        plain = self.fit()
        assert plain.training_.recompute is None
        layers = len(checkpointable_layers(plain._model))
        for levels in ("full", f"1 offload, {layers - 1} full", "mlp"):
            found = self.fit(recompute=levels)
            assert self.losses(found) == self.losses(plain)
            assert found.training_.recompute == levels
            assert found.training_.tokens == plain.training_.tokens

    def test_dense_weights_and_tiles_train_alike(self) -> None:
        from fastprice_kernels.patching import resident

        made: list[int] = []
        original = resident.make_resident

        def counted(model: Any, report: Any, count: int) -> None:
            original(model, report, count)
            made.append(len(report.dense))

        plain = self.fit()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resident, "make_resident", counted)
            found = self.fit(dense_layers=2)
        assert made == [2]
        assert self.losses(found) == self.losses(plain)
        tiled = self.fit(mlp_tile=100)
        assert self.losses(tiled) == pytest.approx(self.losses(plain), rel=1e-5)

    def test_impossible_numbers_of_dense_layers_and_tiles_are_one_line(self) -> None:
        with pytest.raises(ConfigError, match="dense_layers: 99 of a model of 4 layers; give at most that, or 'auto'"):
            self.fit(dense_layers=99)
        for setting, value in (("dense_layers", -1), ("dense_layers", "all"), ("mlp_tile", 0)):
            with pytest.raises(ConfigError, match=setting) as error:
                self.fit(**{setting: value})
            assert "\n" not in str(error.value)

    def test_running_out_of_memory_changes_no_loss_and_no_token_count(self) -> None:
        want = self.fit(gradient_accumulation=2)
        calls: list[int] = []

        def fail(*_: Any) -> None:
            calls.append(1)
            if len(calls) in (6, 7):  # and when it runs again without dense weights
                raise torch.OutOfMemoryError("simulated")

        class Small(SimulatedMeter):
            def peak(self) -> int:
                return 0

        found = self.fit(Small(1), gradient_accumulation=2)
        assert (
            found.training_.recompute == "offload"
        )  # nothing is expected to fit in one byte: the last candidate is tried
        assert self.losses(found) == self.losses(want)

        roomy = self.fit(Small(10**12), fail, gradient_accumulation=2)
        freed, change = roomy.training_.recompute_changes
        assert freed == "out of memory; weights that were kept dense are freed"
        assert change.startswith("out of memory; recompute is now: ")
        assert roomy.training_.recompute == change.rpartition(": ")[2]
        assert self.losses(roomy) == pytest.approx(self.losses(want), rel=1e-5)
        assert roomy.training_.tokens == want.training_.tokens

    def test_an_explicit_level_that_does_not_fit_is_one_line(self) -> None:
        def fail(*_: Any) -> None:
            raise torch.OutOfMemoryError("simulated")

        with pytest.raises(TrainingError, match="out of memory with recompute='none'; use recompute='auto'"):
            self.fit(fail=fail, recompute="none")

    def test_impossible_settings(self) -> None:
        from fastprice import PriceEstimator

        with pytest.raises(ConfigError, match="recompute: 'fulls' is neither"):
            PriceEstimator(recompute="fulls").prepare()
        with pytest.raises(ConfigError, match="do not add up to the model's"):
            self.fit(recompute="99 full")


class TestDenseWeights:
    """Four layers of 30 bytes each, beside levels that take 100 bytes a layer where nothing is recomputed."""

    def on(self, model: Any, meter: SimulatedMeter, *, fixed: int | None = None, **options: Any) -> Any:
        counts: list[int] = []
        dense = DenseWeights(LAYERS, 30, counts.append, fixed=fixed)
        need = meter.need
        meter.need = lambda levels: need(levels) + dense.bytes
        return controller_on(model, meter, dense=dense, **options), dense, counts

    @pytest.mark.parametrize(("size", "count"), [(1000, 4), (500, 2), (420, 0), (300, 0)])
    def test_as_many_as_fit_beside_a_training_that_recomputes_nothing(self, model: Any, size: int, count: int) -> None:
        controller, dense, _ = self.on(model, SimulatedMeter(size))
        assert dense.count == count
        controller.remove()

    @pytest.mark.parametrize(("less", "count"), [(60, 4), (-60, 0), (0, 2)])
    def test_the_measurement_corrects_their_number(self, model: Any, less: int, count: int) -> None:
        controller, dense, _ = self.on(model, SimulatedMeter(500, lambda levels: expected(levels) - less))
        assert dense.count == 2
        for _ in range(1 + 2 * WINDOW):
            controller.run(lambda: None)
        assert dense.count == count
        assert set(controller.levels) == {"none"}
        assert len(controller.changes) == (count != 2)
        controller.remove()

    def test_they_are_freed_before_any_level_changes(self, model: Any) -> None:
        controller, dense, counts = self.on(model, SimulatedMeter(1000))
        failures = iter([True, True, False])

        def micro_batch() -> None:
            if next(failures):
                raise torch.OutOfMemoryError

        controller.run(micro_batch)
        assert counts == [4, 0]
        assert controller.changes[0] == "out of memory; weights that were kept dense are freed"
        assert controller.levels[0] == "selective"
        for _ in range(1 + 3 * WINDOW):
            controller.run(lambda: None)
        assert dense.count == 0  # for good
        controller.remove()

    def test_they_are_freed_where_the_measurement_asks_for_recomputation(self, model: Any) -> None:
        controller, _, counts = self.on(model, SimulatedMeter(1000, lambda levels: expected(levels) + 700))
        for _ in range(1 + WINDOW):
            controller.run(lambda: None)
        assert counts == [4, 0]
        assert controller.levels[0] == "selective"
        controller.remove()

    def test_a_fixed_number_is_made_at_once_and_kept(self, model: Any) -> None:
        controller, dense, counts = self.on(model, SimulatedMeter(430), fixed=3)
        for _ in range(1 + 2 * WINDOW):
            controller.run(lambda: None)
        assert (dense.count, counts) == (3, [3])
        controller.remove()

    def test_none_beside_recomputation(self, model: Any) -> None:
        controller, dense, _ = self.on(model, SimulatedMeter(399))
        assert dense.count == 0
        controller.remove()
