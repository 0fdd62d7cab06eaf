"""Price heads: losses against plain loops, where they start, their distributions, saved files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastprice.errors import BaseModelError, ConfigError
from fastprice.inference.conformal import calibrate
from fastprice.inference.price_distribution import PriceDistribution
from fastprice.inference.price_heads import BINS, HEADS, HistogramHead, PriceHead, QuantileHead, make_head

WIDTH, LOW, HIGH = 24, 2.0, 900.0
PRICES = np.random.default_rng(0).lognormal(4.2, 1.0, 400).clip(LOW, HIGH)


def random_head(kind: str) -> PriceHead:
    """A head whose outputs depend on the hidden state, in fp64."""
    head = make_head(kind, WIDTH, LOW, HIGH)
    head.start_from(PRICES)
    torch.manual_seed(0)
    torch.nn.init.normal_(head.linear.weight, std=0.3)
    return head.double()


def test_the_histogram_loss_is_the_cross_entropy_with_a_normal_in_log_price() -> None:
    head = random_head("histogram")
    outputs = torch.randn(5, BINS, dtype=torch.float64, requires_grad=True)
    prices = torch.tensor([2.0, 19.99, 130.0, 640.0, 900.0], dtype=torch.float64)
    loss = head.loss(outputs, prices)
    (gradient,) = torch.autograd.grad(loss.sum(), outputs)

    edges = [math.log(LOW) + (math.log(HIGH) - math.log(LOW)) * at / BINS for at in range(BINS + 1)]
    sigma = 0.75 * (edges[1] - edges[0])

    def below(edge: float, log: float) -> float:
        return 0.5 * (1 + math.erf((edge - log) / sigma / math.sqrt(2)))

    for row, price in enumerate(prices.tolist()):
        log = math.log(price)
        mass = [below(edges[at + 1], log) - below(edges[at], log) for at in range(BINS)]
        target = np.array(mass) / sum(mass)
        p = outputs[row].detach().softmax(0).numpy()
        assert loss[row].item() == pytest.approx(-(target * np.log(p)).sum(), rel=1e-5)  # edges are kept in fp32
        np.testing.assert_allclose(gradient[row].numpy(), p - target, atol=2e-5)


def test_the_quantile_loss_is_the_pinball_loss_of_log_prices() -> None:
    head = random_head("quantile")
    assert isinstance(head, QuantileHead)
    outputs = torch.randn(4, len(head.shares), dtype=torch.float64, requires_grad=True)
    prices = torch.tensor([3.0, 19.99, 130.0, 640.0], dtype=torch.float64)
    loss = head.loss(outputs, prices)
    for row, price in enumerate(prices.tolist()):
        total, quantile = 0.0, 0.0
        for at, value in enumerate(outputs[row].tolist()):
            quantile = value if at == 0 else quantile + math.log1p(math.exp(value))
            share, short = (at + 0.5) / len(head.shares), math.log(price) - quantile
            total += share * short if short > 0 else (share - 1) * short
        assert loss[row].item() == pytest.approx(total / len(head.shares), rel=1e-9)


@pytest.mark.parametrize("kind", HEADS)
def test_gradients_reach_the_hidden_state_and_the_weights(kind: str) -> None:
    head = random_head(kind)
    prices = torch.tensor([12.0, 300.0], dtype=torch.float64)
    hidden = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: head.loss(head(h), prices), (hidden,))
    head.loss(head(hidden), prices).sum().backward()
    assert head.linear.weight.grad is not None
    assert head.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", HEADS)
def test_an_untrained_head_has_the_distribution_of_the_training_prices(kind: str) -> None:
    head = make_head(kind, WIDTH, float(PRICES.min()), float(PRICES.max()))
    head.start_from(PRICES)
    one, other = head.distributions(head(torch.randn(2, WIDTH)))
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert one.quantile(share) == pytest.approx(np.quantile(PRICES, share), rel=0.06)
        assert other.quantile(share) == one.quantile(share)
    assert one.missing_mass < 1e-6
    low, high = one.interval(0.8)
    assert PRICES.min() <= low < one.median() < high <= PRICES.max()


@pytest.mark.parametrize("kind", HEADS)
def test_nan_outputs_give_an_empty_distribution(kind: str) -> None:
    head = random_head(kind)
    outputs = head(torch.full((1, WIDTH), torch.nan))
    (found,) = head.distributions(outputs)
    assert found.is_empty


def test_a_sure_head_is_finer_than_a_bin() -> None:
    """Half of a bin's width, 2.4 % here, would be an error of its own."""
    head = make_head("histogram", WIDTH, LOW, HIGH)
    assert isinstance(head, HistogramHead)
    prices = torch.tensor([150.0])
    (found,) = head.distributions(head.targets(prices).clamp(min=1e-30).log())
    assert found.median() == pytest.approx(150.0, rel=0.01)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_learns_the_same_from_hidden_hidden_that_hardly_differ(kind: str) -> None:
    """A large common part and small differences, as in hidden hidden of prompts that end alike: no step is lost."""
    random = torch.Generator().manual_seed(0)
    apart = torch.randn(64, WIDTH, generator=random)
    prices = (apart[:, 0] + 4).exp().clamp(LOW, HIGH)
    guesses = []
    for hidden in (apart, 3.0 + 0.05 * apart):
        head = make_head(kind, WIDTH, LOW, HIGH)
        head.start_from(prices.numpy())
        head.standardize(hidden)
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            head.loss(head(hidden), prices).mean().backward()
            optimizer.step()
        guesses.append([each.median() for each in head.distributions(head(hidden))])
    np.testing.assert_allclose(guesses[1], guesses[0], rtol=0.01)
    constant = np.abs(prices.numpy() - np.median(prices.numpy())).mean()
    assert np.abs(prices.numpy() - guesses[1]).mean() < 0.8 * constant


def test_a_constant_feature_is_not_scaled_up_to_noise() -> None:
    head = make_head("histogram", 3, LOW, HIGH)
    hidden = torch.tensor([[1.0, 5.0, -1.0], [1.0, 5.0 + 2**-12, 1.0]])
    head.standardize(hidden)
    floor = 0.01 * hidden.square().mean().sqrt().item()
    torch.testing.assert_close(head.mean, hidden.mean(0))
    torch.testing.assert_close(head.deviation, torch.tensor([floor, floor, 1.0]))
    torch.nn.init.ones_(head.linear.weight)
    assert torch.isfinite(head(hidden)).all()


@pytest.mark.parametrize("spread", [0.5, 0.8, 1.0, 2.0])
def test_calibrated_intervals_of_quantiles_have_the_coverage_requested(spread: float) -> None:
    """For heads whose distributions have `spread` times the true spread: an interval at 90 % that ends between two
    quantiles must not extend to the next one."""
    head = make_head("quantile", WIDTH, 1.0, 5000.0)
    assert isinstance(head, QuantileHead)
    random = np.random.default_rng(7)

    def draw(count: int) -> tuple[list[PriceDistribution], np.ndarray]:
        centers, deviations = random.uniform(3.5, 5.5, (count, 1)), random.uniform(0.3, 0.6, (count, 1))
        logs = centers + deviations * random.standard_normal((count, 1))
        normal = torch.special.ndtri(head.shares.double()).numpy()
        quantiles = centers + spread * deviations * normal
        outputs = np.concatenate([quantiles[:, :1], np.log(np.expm1(np.diff(quantiles)))], axis=1)
        return head.distributions(torch.from_numpy(outputs)), np.exp(logs[:, 0])

    unseen, truths = draw(1500)
    covered = []
    for _ in range(4):
        calibration = calibrate(*draw(500))
        bounds = np.array([calibration.interval(each, 0.9) for each in unseen])
        covered.append(((bounds[:, 0] <= truths) & (truths <= bounds[:, 1])).mean())
    error = math.sqrt(0.9 * 0.1 * (1 / 2000 + 1 / 1500))
    assert abs(np.mean(covered) - 0.9) < 3 * error


def test_quantiles_beyond_the_outermost_stay_within_the_prices_known() -> None:
    head = make_head("quantile", WIDTH, LOW, HIGH)
    steps = torch.full((1, 64), math.log(math.expm1(0.04)))
    steps[0, 0] = math.log(HIGH) - 2.5
    (found,) = head.distributions(steps)
    assert LOW <= found.quantile(0) < found.quantile(0.5) < found.quantile(1) == pytest.approx(HIGH)
    assert found.probabilities.sum() == pytest.approx(1.0)
    outermost = math.exp(steps[0, 0])
    assert found.quantile(0) == pytest.approx(outermost)
    assert found.cdf(outermost * 1.0001) == pytest.approx(0.5 / 64)


@pytest.mark.parametrize("kind", HEADS)
def test_saved_weights_are_restored_and_damaged_ones_refused(kind: str, tmp_path: Path) -> None:
    head, file = random_head(kind).float(), tmp_path / "head.safetensors"
    head.standardize(torch.randn(9, WIDTH))
    head.save(file)
    again = make_head(width=WIDTH, **head.settings())
    again.restore(file)
    hidden = torch.randn(3, WIDTH)
    torch.testing.assert_close(again(hidden), head(hidden), rtol=0, atol=0)
    with pytest.raises(BaseModelError, match=r"head\.safetensors"):
        make_head(kind, WIDTH + 1, LOW, HIGH).restore(file)
    save_file({name: each for name, each in head.state_dict().items() if name != "mean"}, tmp_path / "no_mean")
    with pytest.raises(BaseModelError, match=r"no_mean: no weights for this head .*mean"):
        again.restore(tmp_path / "no_mean")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(BaseModelError, match=r"head\.safetensors"):
        again.restore(file)
    file.unlink()
    with pytest.raises(BaseModelError, match=r"head\.safetensors"):
        again.restore(file)


def test_impossible_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'histogram'"):
        make_head("histgram", WIDTH, LOW, HIGH)
    for low, high in ((0.0, 5.0), (5.0, 5.0), (5.0, math.inf), (math.nan, 5.0)):
        with pytest.raises(ConfigError, match="must rise"):
            make_head("histogram", WIDTH, low, high)
