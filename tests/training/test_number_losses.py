"""The losses that know numbers, against plain loops over prices, on tokenizers of different kinds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.inference.test_price_decoder import mixed_merges, single_digits, whole_numbers, wrap
from tokenizers import Tokenizer, models, pre_tokenizers

from fastprice.errors import ConfigError
from fastprice.inference.price_trie import PriceTrie
from fastprice.models.base_models import load_tokenizer
from fastprice.prompts.template import JSON
from fastprice.training.number_losses import NumberLoss, expected_cost

MOST = 250


def digits_after_a_space() -> Any:
    """Every number begins with a token for a space, then digits, as in Llama 2."""
    vocabulary = ["<pad>", "<eos>", "<unk>", "▁", *"0123456789"]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(vocabulary)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    return wrap(tokenizer)


def loss_of(kind: str, make: Callable[[], Any], most: int = MOST) -> tuple[NumberLoss, PriceTrie, Any]:
    tokenizer = make()
    trie = PriceTrie.of(tokenizer, most)
    return NumberLoss(kind, trie, tokenizer), trie, tokenizer


@pytest.mark.parametrize("make", [whole_numbers, single_digits, mixed_merges, digits_after_a_space])
def test_wasserstein_is_the_expected_distance_of_a_model_that_knows_only_how_prices_begin(
    make: Callable[[], Any],
) -> None:
    """Where each token's probability is the share of all prices below it, every price is equally probable, and the
    loss must be the plain mean of |ln m - ln n| over all prices m: no tree, no steps."""
    number, trie, _ = loss_of("wasserstein", make)
    below = np.array([(trie.paths[trie.prices > 0, depth] == node).sum() for node, depth in enumerate(trie.depths)])
    for price in (1, 9, 10, 99, 123, MOST):
        (node,) = np.flatnonzero(trie.prices == price)
        path = trie.paths[node][trie.paths[node] >= 0]
        counts = np.zeros((len(path), len(trie.alphabet)))
        for step, at in enumerate(path):
            children = np.arange(trie.first_child[at], trie.first_child[at] + trie.children[at])
            counts[step, trie.alphabet_index[children]] = below[children]
            counts[step, -1] = trie.prices[at] > 0
        with np.errstate(divide="ignore"):
            logits = torch.from_numpy(np.log(counts))[None].clamp(min=-1e9)
        batch = number.batch([price])
        found = expected_cost("wasserstein", logits, batch["right"], batch["costs"].double(), batch["counts"])
        expected = np.abs(np.log(np.arange(1, MOST + 1)) - math.log(price)).mean()
        assert found.item() == pytest.approx(expected, rel=1e-6), price


def test_wasserstein_knows_places() -> None:
    """Truth $199: wrong hundreds cost more than wrong tens, those more than a wrong last digit."""
    number, trie, tokenizer = loss_of("wasserstein", single_digits, 999)
    _, right, costs = number.costs(199)
    column = {int(token): at for at, token in enumerate(trie.alphabet)}

    def cost(step: int, digit: str) -> float:
        return float(costs[step, column[tokenizer.convert_tokens_to_ids(digit)]])

    assert cost(0, "9") > cost(1, "1") > cost(2, "1") > 0
    assert all(costs[step, right[step]] == 0 for step in range(4))
    assert costs[1, -1] == pytest.approx(math.log(199))  # "$1" and an end


@pytest.mark.parametrize("kind", ["number", "number_mse", "wasserstein"])
def test_value_and_gradient_equal_plain_loops(kind: str) -> None:
    number, trie, tokenizer = loss_of(kind, single_digits)
    prices = [7, 42, 199, 250, 10]
    batch = number.batch(prices)
    generator = torch.Generator().manual_seed(1)
    shape = batch["costs"].shape
    logits = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.randn(len(prices), dtype=torch.float64, generator=generator)
    costs = batch["costs"].double()
    found = expected_cost(kind, logits, batch["right"], costs, batch["counts"])
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)

    plain = []
    words = tokenizer.convert_ids_to_tokens(trie.alphabet.tolist())
    digits = [at for at, word in enumerate(words) if word.isdigit()]
    for row, price in enumerate(prices):
        total, reached = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        text = str(price)
        for step in range(len(text) + (kind == "wasserstein")):
            if kind != "wasserstein":
                p = logits[row, step, digits].softmax(0)
                values = torch.tensor([float(words[at]) for at in digits], dtype=torch.float64)
                true = float(text[step])
                if kind == "number":
                    total = total + sum(p[at] * abs(values[at] - true) for at in range(10)) / len(text)
                else:
                    total = total + ((p * values).sum() - true) ** 2 / len(text)
                continue
            begun = text[:step]
            choices = {}  # token's place in the alphabet -> the prices that it leads to
            for m in range(1, MOST + 1):
                if str(m) == begun:
                    choices[len(words) - 1] = [m]
                elif str(m).startswith(begun):
                    choices.setdefault(words.index(str(m)[step]), []).append(m)
            right = len(words) - 1 if step == len(text) else words.index(text[step])
            p = dict(zip(choices, logits[row, step, list(choices)].softmax(0), strict=True))
            for at, led in choices.items():
                if at != right:
                    far = np.mean([abs(math.log(m / price)) for m in led])
                    total = total + reached * p[at] * far
            reached = reached * p[right]
        plain.append(total)
    reference = torch.stack(plain)
    (expected,) = torch.autograd.grad((reference * weights).sum(), logits)
    torch.testing.assert_close(found, reference, rtol=1e-6, atol=1e-9)  # the tables are kept in fp32
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_a_space_before_the_digits_is_no_step_of_the_number_loss() -> None:
    number, _, _ = loss_of("number", digits_after_a_space)
    steps, _, costs = number.costs(42)
    assert steps.tolist() == [1, 2]
    assert np.isfinite(costs).sum(axis=1).tolist() == [10, 10]


@pytest.mark.parametrize("make", [whole_numbers, mixed_merges])
def test_a_tokenizer_without_single_digits_is_refused_with_the_way_out(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=r"compares digits.*use text_loss='wasserstein'"):
        loss_of("number", make)


def test_json_ends_a_price_with_its_bracket() -> None:
    tokenizer = load_tokenizer("nano")
    trie = PriceTrie.of(tokenizer, 99, JSON)
    assert tokenizer.decode([int(trie.alphabet[-1])]) == "}"
    _, right, _ = NumberLoss("wasserstein", trie, tokenizer).costs(12)
    assert tokenizer.decode(trie.alphabet[right].tolist()) == "12}"
