"""Prices a second: the distribution over prices beside `generate` and a regular expression, batch for batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastprice.benchmarking.random_models import seed_adapters
from fastprice.benchmarking.timing import Stopwatch, interleave, ratios, spread_of
from fastprice.benchmarking.workload import draw_rows
from fastprice.inference.greedy import generate_greedily
from fastprice.inference.scorers.stock import StockScorer
from fastprice.prompts.template import IGNORE, PREAMBLE

if TYPE_CHECKING:
    from fastprice.inference.price_decoder import PriceDecoder

__all__ = ["check_prediction", "compare_prediction", "draw_prompts", "generate_prices", "sharpen_logits"]

_TOLERANCE = 5e-2  # relative, on the probability found: bf16 logits differ by that much between batch shapes
_ANSWER_TOKENS = 4  # three digits and an end token, as a tuned model writes; a random one would not stop
_LOGIT_SPREAD = 4.0
_PRICE = re.compile(r"\d+(?:\.\d+)?")


def compare_prediction(folder: str, *, items: int, batch: int, seconds: float) -> dict[str, Any]:
    """A row: items a second of each way over the same `items` prompts in batches of `batch`; the ways take turns.

    The model is as after training: NF4, with adapters beside it, its logits sharpened (`sharpen_logits`). `generate`
    runs as most people run it, on rows in their order, and once more on rows sorted by length. fastprice computes the
    distributions that point estimates need; making the decoder (`ready_seconds`: price trie, merged copy of the
    weights) happens once and is not in the figures.

    First the distributions are compared with the exact ones (`check_prediction`) on two prompts. Where they differ by
    more than the tolerances there is no ratio.
    """
    from fastprice.inference.price_decoder import SAMPLING_TOLERANCE, PriceDecoder
    from fastprice.models.engine_choice import choose_engine

    engine = choose_engine("peft")
    loaded = engine.load_base(folder, method="qlora", max_tokens=512)
    tokenizer = loaded.tokenizer
    sharpen_logits(loaded.model)
    model = engine.attach(loaded.model, method="qlora", rank=16, alpha=32.0, dropout=0.0, seed=0)
    seed_adapters(model)
    engine.for_prediction(model)
    device = next(model.parameters()).device
    prompts = draw_prompts(tokenizer, items, model.config.vocab_size)
    watch = Stopwatch(device)
    watch.mark()
    decoder = PriceDecoder.of(model, tokenizer)
    watch.mark()
    error, off = check_prediction(decoder, StockScorer(model, decoder.trie), prompts[:2])
    row: dict[str, Any] = {
        "items": items,
        "batch": batch,
        "scorer": type(decoder.scorer).__name__,
        "ready_seconds": watch.intervals()[0],
        "error": error,
        "tolerance": _TOLERANCE,
        "median_error": off,
        "median_tolerance": SAMPLING_TOLERANCE,
    }
    if not (error <= _TOLERANCE and off <= SAMPLING_TOLERANCE):
        return {**row, "status": "wrong", "reason": f"probability is off by {error:.1%}, the median by {off:.1%} of it"}
    samples = interleave(
        {
            "fastprice": lambda: decoder.distributions(prompts, tolerance=SAMPLING_TOLERANCE, batch_size=batch),
            "generate + regex": lambda: generate_prices(model, tokenizer, prompts, batch),
            "generate + regex, sorted": lambda: generate_prices(model, tokenizer, sorted(prompts, key=len), batch),
        },
        device,
        seconds=seconds,
        warmup=1,
        min_rounds=3,
    )
    ours = samples["fastprice"]
    return {
        **row,
        "items_per_second": {
            name: spread_of([items / each for each in values]).as_dict() for name, values in samples.items()
        },
        "ratios": {name: ratios(theirs, ours).as_dict() for name, theirs in samples.items() if name != "fastprice"},
    }


def check_prediction(
    decoder: PriceDecoder, stock: StockScorer, prompts: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """The largest errors of the decoder over `prompts`: (relative, of the probability found; of the median).

    The exact distributions score every price with transformers' own forward pass. The median's error is the probability
    between it and the true one.
    """
    from fastprice.inference.price_decoder import SAMPLING_TOLERANCE, PriceDecoder

    exact = PriceDecoder(stock, decoder.config).distributions(prompts, tolerance=0.0)
    usual = decoder.distributions(prompts, tolerance=1e-4)
    medians = [each.median() for each in decoder.distributions(prompts, tolerance=SAMPLING_TOLERANCE)]
    off = [
        max(0.5 - truth.cdf(median), truth.cdf(median - 1) - 0.5, 0.0)
        for truth, median in zip(exact, medians, strict=True)
    ]
    return _error(usual, exact), max(off)


def draw_prompts(tokenizer: Any, count: int, vocabulary: int) -> list[list[int]]:
    """`count` prompts: the preamble of every prompt, then as many random tokens as a text has."""
    question = list(tokenizer(PREAMBLE, add_special_tokens=False)["input_ids"])
    rows = draw_rows(count, vocabulary, tokenizer.eos_token_id)
    return [question + row.ids[: row.labels.count(IGNORE)] for row in rows]


@torch.inference_mode()
def sharpen_logits(model: Any) -> None:
    """Scales the last norm of a random model so that its logits spread like a tuned model's (standard deviation 4).

    Of ten digits the most probable then has some 80 %. Under a random model every price is about equally probable, so
    that a search over the probable ones visits them all: nobody predicts with such a model.
    """
    ids = torch.arange(16, 48, device=next(model.parameters()).device)[None]
    spread = float(model(input_ids=ids).logits.float().std())
    model.model.norm.weight.mul_(_LOGIT_SPREAD / spread)


def _error(found: Sequence[Any], exact: Sequence[Any]) -> float:
    """The largest relative difference of the probability of the prices found, over the prompts."""
    worst = 0.0
    for ours, truth in zip(found, exact, strict=True):
        known = dict(zip(truth.prices.tolist(), truth.probabilities.tolist(), strict=True))
        total = sum(known.get(price, 0.0) for price in ours.prices.tolist())
        if total <= 0.0:
            return float("inf")
        worst = max(worst, abs(float(ours.probabilities.sum()) - total) / total)
    return worst


def generate_prices(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], batch: int, most: int = _ANSWER_TOKENS
) -> list[float | None]:
    """The usual way: pad each batch on the left, generate at most `most` tokens greedily, search for a number.

    None for an answer without one.
    """
    prices: list[float | None] = []
    for start in range(0, len(prompts), batch):
        written = generate_greedily(model, tokenizer, prompts[start : start + batch], max_new_tokens=most)
        for text in tokenizer.batch_decode(written, skip_special_tokens=True):
            found = _PRICE.search(text)
            prices.append(float(found[0]) if found else None)
    return prices
