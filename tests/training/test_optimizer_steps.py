"""What one optimizer step does: its gradients under accumulation, their clipping, no weight decay, the rate, the number
of steps. Every case trains a tiny model in fp32 and reads the optimizer just before each of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastprice import Item, PriceEstimator
from fastprice.prompts.packing import pack_rows
from fastprice.prompts.template import encode_rows
from fastprice.training.train import train

PACK = 128  # tokens; a row of LONG takes more than half of it, so no pack holds two
LONG = "word " * 200
# Five texts in two packs of 2 and of 3: a mean over each pack is not the mean over the step.
UNEVEN = [Item(LONG, 800.0), *(Item(f"lot {n}", price) for n, price in enumerate([3.0, 20.0, 90.0, 400.0]))]


@dataclass
class Steps:
    """What the optimizer held before each step: gradients of its parameters, in order, and learning rates."""

    gradients: list[list[Tensor]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def record(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        self.gradients.append([each.grad.clone() for each in parameters if each.grad is not None])
        self.rates.append(optimizer.param_groups[0]["lr"])

    def norms(self) -> list[float]:
        return [float(torch.nn.utils.get_total_norm(gradients)) for gradients in self.gradients]


@pytest.fixture
def steps() -> Iterator[Steps]:
    recorded = Steps()
    handle = register_optimizer_step_pre_hook(recorded.record)
    yield recorded
    handle.remove()


Fit = Callable[..., PriceEstimator]


@pytest.fixture
def fit(tiny_base: str) -> Fit:
    """Fits the tiny base on items, one epoch without evaluations unless settings say otherwise."""

    def run(items: Sequence[Item], **settings: Any) -> PriceEstimator:
        defaults = {"method": "lora", "rank": 4, "max_tokens": 64, "pack_tokens": PACK, "learning_rate": 1e-3}
        return PriceEstimator(tiny_base, **{**defaults, **settings}).fit(items)

    return run


def packs_of(estimator: PriceEstimator, items: Sequence[Item], tokens: int) -> list[int]:
    """The number of texts in each pack that `estimator` trains on."""
    rows = encode_rows(estimator.tokenizer, items, estimator.max_tokens)
    return [len(pack["prices"]) for pack in pack_rows(rows, tokens, estimator.seed)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"output": "head"}, {"text_loss": "wasserstein"}, {"output": "head", "kernels": "on"}],
    ids=["text", "head", "number loss", "head over kernels"],
)
def test_two_accumulated_packs_are_one_pack_of_both(fit: Fit, steps: Steps, settings: dict[str, str]) -> None:
    halves = fit(UNEVEN, gradient_accumulation=2, **settings)
    whole = fit(UNEVEN, pack_tokens=2 * PACK, **settings)
    assert sorted(packs_of(halves, UNEVEN, PACK)) == [2, 3]
    assert packs_of(whole, UNEVEN, 2 * PACK) == [5]
    (loss,), (expected) = ([event.loss for event in each.training_.events] for each in (halves, whole))
    assert loss == pytest.approx(expected[0], rel=1e-4)
    assert halves.training_.tokens == whole.training_.tokens
    accumulated, at_once = steps.gradients
    assert len(accumulated) == len(at_once) >= 14  # B of the adapters of 7 linear layers in 2 decoder layers
    for one, other in zip(accumulated, at_once, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_an_incomplete_accumulation_is_a_step_too(fit: Fit, steps: Steps) -> None:
    items = [Item(LONG, 10.0 * (n + 1)) for n in range(3)]
    estimator = fit(items, gradient_accumulation=2)
    assert packs_of(estimator, items, PACK) == [1, 1, 1]
    assert len(steps.gradients) == 2
    assert estimator.training_.events[-1].step == estimator.training_.events[-1].steps == 2
    rows = encode_rows(estimator.tokenizer, items, 64)
    assert estimator.training_.tokens == sum(len(row.ids) for row in rows)


def test_gradients_are_clipped_to_norm_one(fit: Fit, steps: Steps) -> None:
    fit(UNEVEN, method="full", epochs=3.0)
    assert len(steps.gradients) == 6
    assert steps.norms() == pytest.approx([1.0] * 6, rel=1e-3)


def test_weights_without_gradient_do_not_decay(fit: Fit, tiny_base: str) -> None:
    estimator = fit(UNEVEN, method="full", epochs=3.0, learning_rate=1e-2)
    rows = encode_rows(estimator.tokenizer, UNEVEN, 64)
    unseen = sorted(set(range(len(estimator.tokenizer))) - {token for row in rows for token in row.ids})
    before = PriceEstimator(tiny_base, method="full").prepare().model.get_input_embeddings().weight
    after = estimator.model.get_input_embeddings().weight
    assert len(unseen) > 1000
    assert torch.equal(before[unseen], after[unseen])
    assert not torch.equal(before, after)


def test_the_rate_rises_over_the_warmup_and_falls_along_a_cosine(fit: Fit, steps: Steps) -> None:
    items = [Item(LONG, 10.0 * (n + 1)) for n in range(5)]
    fit(items, warmup_ratio=0.4, learning_rate=1e-3)
    assert steps.rates == pytest.approx([0.0, 0.5e-3, 1e-3, 0.75e-3, 0.25e-3])


def test_the_fused_optimizer_of_cuda_takes_the_steps_of_the_one_of_a_cpu(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sft_config` takes the fused one on CUDA; here it runs on the CPU. Both clip, in fp32 and on the device."""
    fits = {}
    for optimizer in ("adamw_torch", "adamw_torch_fused"):

        def set_optimizer(trainer: Any, optimizer: str = optimizer) -> None:
            assert trainer.args.optim == "adamw_torch"
            trainer.args.optim = optimizer

        with monkeypatch.context() as patch:
            patch.setattr(
                "fastprice.training.train.train",
                lambda *a, set_optimizer=set_optimizer, **k: train(*a, **k | {"on_trainer": set_optimizer}),
            )
            fits[optimizer] = fit(UNEVEN, epochs=8.0, learning_rate=1e-2)
    stock, fused = fits.values()
    losses = [[event.loss for event in each.training_.events] for each in (stock, fused)]
    assert len(losses[0]) == 16
    assert losses[0][-1] is not None
    assert losses[0][0] is not None
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, one), (_, other) in zip(stock.model.named_parameters(), fused.model.named_parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
