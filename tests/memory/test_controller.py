"""Memory held on the way: where a training begins, how measurements move it, and micro-batches that are done again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastprice.memory.controller import WINDOW, WINDOWS, Keeper, Ladder, expected_bytes
from tests.memory.test_activation_checkpointing import LAYERS, batch, make

from fastprice.errors import ConfigError, TrainingError
from fastprice.memory.activation_checkpointing import decoder_layers
from fastprice.memory.estimate import CUDA_CONTEXT, estimate_memory

COST = {"all": 100, "costly": 50, "input": 10, "host": 0}


def expected(levels: Any) -> int:
    return sum(COST[level] for level in levels)


class PretendMeter:
    """A device of `size` bytes on which each plan takes what `need` says."""

    def __init__(self, size: int, need: Any = expected) -> None:
        self.size, self.need = size, need
        self.keeper: Keeper | None = None
        self.resets = 0

    def limit(self) -> int:
        return self.size

    def peak(self) -> int:
        assert self.keeper is not None
        return int(self.need(self.keeper.levels))

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def model() -> Any:
    return make()


def keeper_on(model: Any, meter: PretendMeter, **options: Any) -> Keeper:
    meter.keeper = Keeper(model, Ladder(LAYERS, expected), meter, **options)
    return meter.keeper


def test_the_ladder_goes_from_everything_to_the_host_layer_by_layer() -> None:
    ladder = Ladder(3, expected)
    assert ladder.rungs == [
        ("all", "all", "all"), ("costly", "all", "all"), ("costly", "costly", "all"), ("costly", "costly", "costly"),
        ("input", "costly", "costly"), ("input", "input", "costly"), ("input", "input", "input"),
        ("host", "input", "input"), ("host", "host", "input"), ("host", "host", "host"),
    ]  # fmt: skip
    assert [ladder.expected(rung) for rung in range(10)] == [300, 250, 200, 150, 110, 70, 30, 20, 10, 0]
    assert [ladder.dearest(room) for room in (300, 299, 150, 29, -1)] == [0, 1, 3, 7, 9]
    assert Ladder(3, expected, host=False).rungs == ladder.rungs[:7]
    assert Ladder(2).rungs == [("input", "input"), ("host", "host")]
    assert Ladder(2, host=False).rungs == [("input", "input")]


@pytest.mark.parametrize(
    ("size", "levels"),
    [(1000, ["all"] * 4), (400, ["costly"] + ["all"] * 3), (210, ["costly"] * 4), (60, ["input"] * 4),
     (20, ["host"] * 3 + ["input"]), (0, ["host"] * 4)],
)  # fmt: skip
def test_it_begins_with_the_dearest_plan_that_is_expected_to_fit(model: Any, size: int, levels: list[str]) -> None:
    keeper = keeper_on(model, PretendMeter(size))
    assert list(keeper.levels) == levels
    keeper.remove()


def test_levels_asked_for_by_name_are_where_it_begins_and_only_lack_of_memory_moves_them(model: Any) -> None:
    asked = ("all", "host", "input", "all")  # 210
    ladder = Ladder(LAYERS, expected, first=asked)
    assert ladder.rungs[:2] == [asked, ("costly",) * 4]
    assert ladder.rungs[-1] == ("host",) * 4
    assert Ladder(LAYERS, first=asked).rungs == [asked, ("input",) * 4, ("host",) * 4]
    assert Ladder(LAYERS, expected, first=("host",) * 4).rungs == [("host",) * 4]
    keeper = Keeper(model, ladder, PretendMeter(100), measures=False)
    assert keeper.levels == asked
    windows(keeper, WINDOWS)
    assert keeper.levels == asked
    fails = [1]

    def micro_batch() -> None:
        if fails:
            fails.pop()
            raise torch.OutOfMemoryError("pretended")

    keeper.run(micro_batch)
    assert expected(keeper.levels) <= 97
    keeper.remove()


def windows(keeper: Keeper, count: int) -> None:
    for _ in range(count * WINDOW):
        keeper.run(lambda: None)


def test_a_plan_that_takes_more_than_expected_is_made_cheaper_and_one_with_room_dearer(model: Any) -> None:
    for factor, overhead, at_first, at_last in (
        (1.0, 50, ["costly"] * 3 + ["all"], ["costly"] * 4),
        (0.5, 0, ["costly"] * 3 + ["all"], ["all"] * 4),
        (1.0, 0, ["costly"] * 3 + ["all"], ["costly"] * 3 + ["all"]),
    ):

        def need(levels: Any, factor: float = factor, overhead: int = overhead) -> float:
            return factor * expected(levels) + overhead

        keeper = keeper_on(model, PretendMeter(265, need), warmup=2)
        assert list(keeper.levels) == at_first
        keeper.run(lambda: None)
        keeper.run(lambda: None)
        windows(keeper, WINDOWS + 1)
        assert list(keeper.levels) == at_last
        assert (at_first == at_last) == (not keeper.moves)
        assert need(keeper.levels) <= 265
        keeper.remove()


def test_nothing_is_measured_before_the_first_step_is_over_or_after_an_evaluation(model: Any) -> None:
    taken = [10**6]
    keeper = keeper_on(model, PretendMeter(265, lambda levels: taken[0]), warmup=3)
    before = keeper.levels
    for _ in range(3):
        keeper.run(lambda: None)
    assert keeper.levels == before
    for _ in range(WINDOW - 1):
        keeper.run(lambda: None)
    keeper.begin_again()
    windows(keeper, 1)
    assert keeper.levels != before  # a whole window after the evaluation
    keeper.remove()
    steady = keeper_on(model, PretendMeter(265, lambda levels: taken[0]), measures=False)
    windows(steady, WINDOWS + 1)
    assert steady.levels == before
    steady.remove()


def _training(model: Any, keeper: Keeper | None, *, fail: Any = None) -> list[Any]:
    """Three steps of two micro-batches with AdamW; losses, then weights. `fail(micro-batch, layer)` raises."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(3)
    losses = []
    number = 0
    hooks = [
        layer.register_full_backward_pre_hook(lambda *_, at=at: fail(number, at) if fail else None)
        for at, layer in enumerate(decoder_layers(model))
    ]

    def micro_batch() -> Any:
        loss = model(**batch(number)).loss
        loss.backward()
        return loss.detach()

    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            losses.append(micro_batch() if keeper is None else keeper.run(micro_batch))
            number += 1
        optimizer.step()
    for hook in hooks:
        hook.remove()
    return [*losses, *(p.detach().clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_micro_batch_done_again_leaves_no_trace(dropout: float) -> None:
    """Memory runs out in the middle of a backward pass, when half the layers have their gradients already: in the first
    and in the second micro-batch of a step, and twice in a row."""
    want = _training(make(dropout=dropout), None)
    model = make(dropout=dropout)
    costs = {(0, 1): 1, (3, 2): 2, (5, 0): 1}

    def fail(number: int, at: int) -> None:
        if costs.get((number, at)):
            costs[number, at] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    # From one input per layer on: those levels are bitwise equal in an fp32 model too.
    keeper = keeper_on(model, PretendMeter(42))
    assert list(keeper.levels) == ["input"] * 4
    got = _training(model, keeper, fail=fail)
    assert keeper.redone == 4
    assert not any(costs.values())
    assert list(keeper.levels) == ["host"] * 4
    assert len(keeper.moves) == 4
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora" in n)
    keeper.remove()


def test_what_failed_is_never_tried_again_and_undone_first(model: Any) -> None:
    meter = PretendMeter(400, lambda levels: 0.1 * expected(levels))  # there seems to be room for everything
    keeper = keeper_on(model, meter)
    assert list(keeper.levels) == ["costly"] + ["all"] * 3
    undone: list[str] = []

    def micro_batch() -> int:
        if "all" in keeper.levels:
            raise torch.OutOfMemoryError("pretended")
        return 7

    assert keeper.run(micro_batch, lambda: undone.append("x")) == 7
    assert len(undone) == keeper.redone > 0
    tried = keeper.redone
    for _ in range((WINDOWS + 2) * WINDOW):
        assert keeper.run(micro_batch) == 7
    assert keeper.redone == tried
    assert list(keeper.levels) == ["costly"] * 4
    keeper.remove()


def test_it_gives_up_with_one_line_when_nothing_is_left(model: Any) -> None:
    for ladder in (Ladder(LAYERS, expected), Ladder(LAYERS)):
        keeper = Keeper(model, ladder, PretendMeter(10**6))

        def micro_batch() -> None:
            raise torch.OutOfMemoryError("pretended")

        with pytest.raises(
            TrainingError, match=r"out of memory: .*keeps the least \(host\); lower pack_tokens"
        ) as told:
            keeper.run(micro_batch)
        assert "\n" not in str(told.value)
        keeper.remove()


def test_the_expectation_is_the_estimate_without_the_context() -> None:
    model = make("llama", nf4=True)
    found = expected_bytes(model, tokens=512, sequences=4, labeled=0.05, kernels=True)
    assert found is not None
    levels = ("input", "costly", "all", "host")
    estimate = estimate_memory(
        model.config, method="qlora", rank=4, tokens=512, sequences=4, recompute=levels, loss_head="completion",
        labeled=0.05, engine="fastprice",
    )  # fmt: skip
    assert found(levels) == estimate.peak_bytes - CUDA_CONTEXT
    strange = SimpleNamespace(config={"model_type": "mamba"})
    assert expected_bytes(strange, tokens=512, sequences=4, labeled=0.05, kernels=True) is None


class TestTraining:
    """The setting, through PriceEstimator, on the nano model."""

    @staticmethod
    def fit(meter: Any = None, fail: Any = None, **settings: Any) -> Any:
        from unittest.mock import patch

        from fastprice import PriceEstimator
        from fastprice.data.synthetic import make_catalogue
        from fastprice.training import train as training

        options = {"epochs": 1.0, "max_tokens": 96, "pack_tokens": 512, "evaluations": 0, "kernels": "on", **settings}
        estimator = PriceEstimator(**options).prepare()
        if fail is not None:
            decoder_layers(estimator._model)[0].mlp.register_forward_pre_hook(fail)
        original = training.train

        def with_meter(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs, meter=meter)

        with patch.object(training, "train", with_meter):
            return estimator.fit(make_catalogue(60, seed=2))

    @staticmethod
    def losses(estimator: Any) -> list[float]:
        return [event.loss for event in estimator.training_.events if event.loss is not None]

    def test_an_explicit_level_trains_alike_and_is_told(self) -> None:
        plain = self.fit()
        assert plain.training_.recompute is None
        layers = len(decoder_layers(plain._model))
        for keep in ("input", f"1 host, {layers - 1} input"):
            found = self.fit(recompute=keep)
            assert self.losses(found) == self.losses(plain)
            assert found.training_.recompute == keep
            assert found.training_.tokens == plain.training_.tokens

    def test_memory_that_runs_out_changes_no_loss_and_no_count(self) -> None:
        want = self.fit(gradient_accumulation=2)
        calls: list[int] = []

        def fail(*_: Any) -> None:
            calls.append(1)
            if len(calls) == 6:
                raise torch.OutOfMemoryError("pretended")

        class Small(PretendMeter):
            def peak(self) -> int:
                return 0

        found = self.fit(Small(1), gradient_accumulation=2)
        assert found.training_.recompute == "host"  # nothing is expected to fit in one byte; it is tried all the same
        assert self.losses(found) == self.losses(want)

        roomy = self.fit(Small(10**12), fail, gradient_accumulation=2)
        (move,) = roomy.training_.moves
        assert move.startswith("out of memory; now each layer keeps: ")
        assert roomy.training_.recompute == move.rpartition(": ")[2]
        assert self.losses(roomy) == pytest.approx(self.losses(want), rel=1e-5)
        assert roomy.training_.tokens == want.training_.tokens

    def test_an_explicit_level_that_does_not_fit_is_one_line(self) -> None:
        def fail(*_: Any) -> None:
            raise torch.OutOfMemoryError("pretended")

        with pytest.raises(TrainingError, match="out of memory with recompute='all'; leave recompute='auto'"):
            self.fit(fail=fail, recompute="all")

    def test_settings_that_cannot_be(self) -> None:
        from fastprice import PriceEstimator
        from fastprice.training.train import _layers

        with pytest.raises(ConfigError, match="recompute: 'inputs' is neither"):
            PriceEstimator(recompute="inputs").prepare()
        with pytest.raises(ConfigError, match="does not name the model's"):
            self.fit(recompute="99 input")

        class Unsloth:
            name = "unsloth"

        with pytest.raises(ConfigError, match="unsloth recomputes every layer itself"):
            _layers(make(), Unsloth(), "input", captures=False)  # type: ignore[arg-type]
        assert _layers(make(), Unsloth(), "auto", captures=False) is None  # type: ignore[arg-type]
