"""Captured steps: static packs, what is replayed, and that a wrong replay is never trusted. The capture is a tape."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.training.tape_capture import NoWaits, TapeCapture
from torch import Tensor, nn

import fastprice.training.cuda_graphs
from fastprice import PriceEstimator
from fastprice.config import TrainConfig
from fastprice.data.synthetic import make_synthetic_items
from fastprice.errors import ConfigError
from fastprice.models.packed_attention import PACKED_ATTENTION, register_packed_attention
from fastprice.prompts.packing import PackCollator, StaticShape, pack_rows
from fastprice.prompts.template import IGNORE, TrainingRow
from fastprice.training import step_options
from fastprice.training.cuda_graphs import TOLERANCES, GraphedStep, parameter_count, unsupported_reason
from fastprice.training.step_options import uses_cuda_graphs
from fastprice.training.train import train
from fastprice_kernels import install
from fastprice_kernels.ops.adapter_casts import AdapterCasts

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LENGTHS = [11, 4, 7, 9, 13, 3, 8, 5, 12, 6]


def rows_of(lengths: list[int]) -> list[TrainingRow]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in lengths:
        ids = torch.randint(3, 61, (length,), generator=generator).tolist()
        rows.append(TrainingRow(ids, [IGNORE] * (length - 2) + ids[-2:], 0))
    return rows


def model_with_kernels(config: Any = None, **options: Any) -> Any:
    import peft
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES) if config is None else config)
    register_packed_attention()
    model.set_attn_implementation(PACKED_ATTENTION)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM", "init_lora_weights": False, **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).train()
    install(adapted, loss_head=True, last_layer=True)
    return adapted


def step_of(model: Any) -> Callable[[dict[str, Any]], Tensor]:
    def step(batch: dict[str, Any]) -> Tensor:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def batches(static: bool = True) -> list[dict[str, Any]]:
    packs = pack_rows(rows_of(LENGTHS), 30)
    collator = PackCollator(positions=True, static=StaticShape.of(packs) if static else None)
    made = [collator([pack]) for pack in packs]
    for batch in made:
        if static:
            del batch["pack_lengths"]
        batch["num_items_in_batch"] = torch.tensor(5)
    return made


def gradients(model: nn.Module) -> list[Tensor]:
    return [each.grad.clone() for each in trained(model).values() if each.grad is not None]


# Packs of one static shape


@given(st.lists(st.integers(1, 40), min_size=1, max_size=80))
def test_every_pack_fits_the_smallest_shape(lengths: list[int]) -> None:
    rows = [TrainingRow([7] * length, [IGNORE] * (length // 2) + [7] * (length - length // 2), 0) for length in lengths]
    packs = pack_rows(rows, 50)
    shape = StaticShape.of(packs)
    collator = PackCollator(static=shape)
    assert shape.tokens % 16 == 0
    assert shape.tokens <= 64
    for pack in packs:
        batch = collator([pack])
        borders, positions, labels = batch["cu_seqlens"], batch["label_positions"], batch["labels"][0]
        assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, shape.tokens)
        assert borders.shape == (shape.texts + 1,)
        assert positions.shape == (shape.labels,)
        assert (borders[0], borders[-1]) == (0, shape.tokens)
        assert borders.diff().min() >= 0
        assert borders.diff().max() <= shape.longest
        assert borders[: len(pack["lengths"]) + 1].diff().tolist() == pack["lengths"]
        # Every labeled position once, all others predict nothing.
        predicted = (labels[1:] != IGNORE).nonzero().squeeze(1).tolist()
        assert positions[: len(predicted)].tolist() == predicted
        assert (positions[len(predicted) :] == shape.tokens - 1).all()


def test_a_pack_that_the_shape_does_not_hold_is_refused() -> None:
    packs = pack_rows(rows_of(LENGTHS), 30)
    shape = StaticShape.of(packs)
    with pytest.raises(ConfigError, match="exceeds the static shape StaticShape"):
        PackCollator(static=shape)(packs)
    with pytest.raises(ConfigError, match="labeled positions exceeds"):
        PackCollator(static=StaticShape(shape.tokens, shape.texts, 1, shape.longest))(packs[:1])


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral, window 4"])
def test_padding_to_one_shape_changes_no_loss_and_no_gradient(name: str) -> None:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    config = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral, window 4": MistralConfig}[name](**SIZES)
    if "window" in name:
        config.sliding_window = 4
    model = model_with_kernels(config).double()
    step = step_of(model)
    for plain, static in zip(batches(static=False), batches(), strict=True):
        model.zero_grad()
        want, wanted = step(plain), gradients(model)
        model.zero_grad()
        with NoWaits():
            got = step(static)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
        for mine, theirs in zip(gradients(model), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_a_step_that_waits_for_the_device_is_noticed() -> None:
    model = model_with_kernels()
    batch = batches()[0]
    del batch["label_positions"]
    with NoWaits(), pytest.raises(RuntimeError, match="nonzero"):
        step_of(model)(batch)


@pytest.mark.filterwarnings("ignore:fastprice_kernels leaves")  # Gemma's last layer
def test_models_that_cap_their_attention_scores_take_no_static_packs() -> None:
    from transformers import Gemma2Config

    model = model_with_kernels(Gemma2Config(**SIZES))
    with pytest.raises(ConfigError, match="caps or drops attention scores"):
        model(**batches()[0], use_cache=False)


# The captured step


@pytest.mark.parametrize("way", ["plain", "autocast", "checkpointing", "keep_dense"])
def test_replays_train_as_eager_steps_do(way: str) -> None:
    eager, graphed_model = model_with_kernels(), model_with_kernels()
    if way in ("checkpointing", "keep_dense"):
        for model in (eager, graphed_model):
            install(model, loss_head=True, last_layer=True, keep_dense=way == "keep_dense")
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    casts = torch.autocast("cpu", dtype=torch.bfloat16) if way == "autocast" else nullcontext()

    def step_on(model: Any) -> Callable[[dict[str, Any]], Tensor]:
        def step(batch: dict[str, Any]) -> Tensor:
            with casts:
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            return loss.detach()

        return step

    run_eagerly, band = step_on(eager), TOLERANCES[torch.bfloat16 if way == "autocast" else torch.float32]
    tapes: list[TapeCapture] = []

    def capture() -> TapeCapture:
        tapes.append(TapeCapture())
        return tapes[-1]

    graphed = GraphedStep(step_on(graphed_model), trained(graphed_model), tolerance=band, capture=capture)
    optimizers = [torch.optim.AdamW(trained(model).values(), lr=1e-2) for model in (eager, graphed_model)]
    states = []
    for round_ in range(4):
        for index, batch in enumerate(batches()):
            want, got = run_eagerly(batch), graphed(batch)
            states.append(graphed.state)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
            for held in graphed._static.values():  # what the next call forgets to fill must show
                if isinstance(held, Tensor):
                    held.fill_(10**6)
            if index % 2 == round_ % 2:  # one pack or two a step, gradients set to None or zero in between
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=index < 2)
    for mine, theirs in zip(trained(graphed_model).values(), trained(eager).values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert states[:3] == ["recorded", "trusted", "trusted"]
    assert graphed.failure is None
    assert [tape.replays for tape in tapes] == [len(states)]  # two in the check, none in the first two calls


class Flawed(TapeCapture):
    """A tape whose replays go wrong in one chosen way."""

    def __init__(self, flaw: str, model: nn.Module) -> None:
        super().__init__()
        self.flaw, self.model = flaw, model

    def record(self, work: Any) -> Tensor:
        if self.flaw == "cannot be recorded":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        loss = super().record(work)
        if self.flaw == "stale weights":
            weights = {each.untyped_storage()._cdata: each.detach().clone() for each in self.model.parameters()}

            def stale(x: Any) -> Any:
                old = weights.get(x.untyped_storage()._cdata) if isinstance(x, Tensor) else None
                return x if old is None else old.as_strided(x.shape, x.stride(), x.storage_offset())

            self.tape = [
                (func, *torch.utils._pytree.tree_map(stale, (args, kwargs)), out)
                for func, args, kwargs, out in self.tape
            ]
        if self.flaw == "stale casts":  # as a host that believes that its casts are fresh would record
            refresh = torch.ops.aten._foreach_copy_.default
            assert any(func is refresh for func, *_ in self.tape)
            self.tape = [each for each in self.tape if each[0] is not refresh]
        return loss

    def replay(self) -> None:
        parameters = [each for each in self.model.parameters() if each.grad is not None]
        if self.flaw == "overwrites":
            for each in parameters:
                each.grad.zero_()
        if self.flaw != "does nothing":
            super().replay()
        if self.flaw == "loses a gradient":
            parameters[3].grad.zero_()
        if self.flaw == "not a number":
            parameters[3].grad.fill_(float("nan"))


@pytest.mark.parametrize(
    ("flaw", "reason"),
    [
        ("stale weights", "another (loss|gradient)"),
        ("stale casts", "another (loss|gradient)"),
        ("overwrites", "another gradient"),
        ("does nothing", "another (loss|gradient)"),
        ("loses a gradient", "another gradient"),
        ("not a number", "another gradient"),
        ("cannot be recorded", r"cannot be captured \(operation not permitted when stream is capturing\)"),
    ],
)
def test_a_wrong_replay_is_noticed_once_and_training_stays_eager(flaw: str, reason: str) -> None:
    eager, model = model_with_kernels(), model_with_kernels()
    graphed = GraphedStep(
        step_of(model), trained(model), tolerance=TOLERANCES[torch.bfloat16], capture=lambda: Flawed(flaw, model)
    )
    first, second, *others = batches()
    with pytest.warns(UserWarning, match=f"CUDA graphs stay off: .*{reason}") as caught:
        got = [graphed(first), graphed(second)]
    assert len(caught) == 1
    got += [graphed(batch) for batch in others]
    assert got == [step_of(eager)(batch) for batch in (first, second, *others)]
    assert graphed.state == "eager"
    assert graphed.failure is not None
    for mine, theirs in zip(gradients(model), gradients(eager), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_batch_of_another_shape_is_refused() -> None:
    model = model_with_kernels()
    graphed = GraphedStep(step_of(model), trained(model), tolerance=1e-4, capture=TapeCapture)
    first, second, *_ = batches()
    graphed(first)
    with pytest.raises(ValueError, match=r"labels is \(1, 4\) torch.int64, the recorded step takes \(1, 32\)"):
        graphed({**second, "labels": torch.zeros(1, 4, dtype=torch.long)})
    with pytest.raises(ValueError, match="max_seqlen is 3, the recorded step takes 13"):
        graphed({**second, "max_seqlen": 3})
    with pytest.raises(ValueError, match="the batch has"):
        graphed({"labels": second["labels"]})


def test_casts_that_a_recording_finds_fresh_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's decision of a capture holds for all replays: a check that ignores the recording must not pass."""
    model = model_with_kernels()
    monkeypatch.setattr(AdapterCasts, "_is_same_step", lambda self: True)
    graphed = GraphedStep(step_of(model), trained(model), tolerance=TOLERANCES[torch.bfloat16], capture=TapeCapture)
    first, second, *_ = batches()
    graphed(first)
    with pytest.warns(UserWarning, match="CUDA graphs stay off: .*another (loss|gradient)"):
        graphed(second)


# Through a training


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[GraphedStep]:
    """The graphed steps of trainings, captured on a tape."""
    made: list[GraphedStep] = []

    class Taped(GraphedStep):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, capture=TapeCapture)
            made.append(self)

    monkeypatch.setattr("fastprice.training.trainer.GraphedStep", Taped)
    return made


def fitted(cuda_graphs: str, **options: Any) -> PriceEstimator:
    settings = {"base": "nano", "rank": 4, "max_tokens": 96, "pack_tokens": 512, "evaluations": 1, "kernels": "on"}
    estimator = PriceEstimator(**{**settings, **options}, gradient_accumulation=2, cuda_graphs=cuda_graphs)
    return estimator.fit(make_synthetic_items(100, seed=2), make_synthetic_items(20, seed=5))


@pytest.mark.parametrize("setting", ["on", "auto"])
def test_training_with_cuda_graphs_has_the_losses_of_eager_training(
    setting: str, taped: list[GraphedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = fitted("off").training_
    monkeypatch.setattr(step_options, "unsupported_reason", lambda *a, **k: None)
    monkeypatch.setattr(step_options, "AUTO_MICRO_BATCHES", 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = fitted(setting).training_
    assert got.tokens == want.tokens
    assert [event.loss for event in got.events if event.loss] == pytest.approx(
        [event.loss for event in want.events if event.loss], rel=2e-4
    )
    assert [graphed.state for graphed in taped] == ["trusted"]


def test_auto_is_the_default_and_captures_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TrainConfig().cuda_graphs == "auto"
    monkeypatch.setattr(step_options, "unsupported_reason", lambda *a, **k: None)
    model = model_with_kernels()

    def captures(setting: str = "auto", model: Any = model, **changed: Any) -> bool:
        facts: dict[str, Any] = {"kernels": True, "auxiliary": False, "micro_batches": 64}
        return uses_cuda_graphs(setting, model, **{**facts, **changed})

    assert captures()
    for changed in ({"micro_batches": 63}, {"recompute": "1 offload, 1 full"}):
        assert not captures(**changed)
        assert captures("on", **changed)
    assert captures(recompute="selective")
    assert not captures(auxiliary=True)
    assert not captures("off")
    every_weight = model_with_kernels().requires_grad_(True)
    assert not captures(model=every_weight)
    assert captures("on", model=every_weight)
    monkeypatch.setattr(step_options, "AUTO_PARAMETERS", parameter_count(model) - 1)
    assert not captures()
    assert captures("on")


def test_an_evaluation_that_runs_out_of_memory_beside_the_graph_ends_it(
    taped: list[GraphedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations: list[str] = []

    def train_beside_a_full_memory(
        engine: Any, model: Any, tokenizer: Any, rows: Any, validate: Any, *a: Any, **k: Any
    ) -> Any:
        def fails_beside_a_graph() -> float:
            evaluations.append(taped[0].state)
            if taped[0].state == "trusted":
                raise torch.OutOfMemoryError("no memory")
            return float(validate())

        return train(engine, model, tokenizer, rows, fails_beside_a_graph, *a, **k)

    monkeypatch.setattr("fastprice.training.train.train", train_beside_a_full_memory)
    monkeypatch.setattr(step_options, "unsupported_reason", lambda *a, **k: None)
    with pytest.warns(UserWarning, match="CUDA graphs stay off: an evaluation ran out of memory beside the graph"):
        estimator = fitted("on", epochs=2.0, evaluations=2)
    assert evaluations == ["trusted", "eager", "eager"]
    assert sum(event.eval_mae is not None for event in estimator.training_.events) == 2


def test_unsupported_graphs_are_refused_when_on_and_skipped_when_auto() -> None:
    options = {"base": "nano", "epochs": 0.1, "max_tokens": 96, "pack_tokens": 512, "evaluations": 0, "kernels": "on"}
    items = make_synthetic_items(40, seed=2)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="cuda_graphs: on, but there is no CUDA device; use cuda_graphs="):
            PriceEstimator(**options, cuda_graphs="on").fit(items)
    with pytest.raises(ConfigError, match="cuda_graphs: must be auto, on or off, not 'yes'"):
        PriceEstimator(cuda_graphs="yes").fit(items)


def test_dense_weights_are_stored_only_if_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with_kernels()
    dense = 2 * parameter_count(model.get_decoder().layers[0])
    assert step_options.fits_dense_weights(model) is torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, room in ((20 * dense, True), (20 * dense - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 2 * free))
        assert step_options.fits_dense_weights(model) is room


def test_reasons_that_steps_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fastprice.training.cuda_graphs, "varlen_works", lambda device, dtype: dtype == torch.bfloat16)
    good: dict[str, Any] = {"kernels": True, "dtype": torch.bfloat16, "processes": 1}
    model = model_with_kernels()
    assert unsupported_reason(model, **good) is None
    for change, reason in (
        ({"kernels": False}, "kernels are off"),
        ({"processes": 2}, "2 processes"),
        ({"dtype": torch.float16}, "fp16"),
        ({"dtype": torch.float32}, "varlen_attn does not run"),
    ):
        assert reason in str(unsupported_reason(model, **{**good, **change}))
    hook = model.get_decoder().layers[1].register_forward_pre_hook(lambda *_: None)
    assert "offloaded layers" in str(unsupported_reason(model, **good))
    hook.remove()
    model.config.attn_logit_softcapping = 30.0
    assert "soft-capped scores" in str(unsupported_reason(model, **good))
    with pytest.warns(UserWarning, match="LoRA dropout"):
        dropped = model_with_kernels(lora_dropout=0.1)
    assert "dropout" in str(unsupported_reason(dropped, **good))
    assert parameter_count(nn.Linear(3, 4)) == 16
