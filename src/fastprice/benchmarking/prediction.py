"""Prices a second: the distribution over prices beside `generate` and a regular expression, batch for batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastprice.benchmarking.cases import draw_rows
from fastprice.benchmarking.models import seed_adapters
from fastprice.benchmarking.timing import Stopwatch, interleave, ratios, spread_of
from fastprice.inference.greedy import generate_greedily
from fastprice.inference.scorers.stock import StockScorer
from fastprice.prompts.template import HEAD, IGNORE

if TYPE_CHECKING:
    from fastprice.inference.price_decoder import PriceDecoder

__all__ = ["check_prediction", "compare_prediction", "draw_prompts", "generate_prices", "sharpen"]

_TOLERANCE = 5e-2  # relative, on the probability found: bf16 logits differ by that much between batch shapes
_ANSWER_TOKENS = 4  # three digits and an end: what a tuned model writes, where a random one would never stop
_LOGIT_SPREAD = 4.0
_PRICE = re.compile(r"\d+(?:\.\d+)?")


def compare_prediction(folder: str, *, items: int, batch: int, seconds: float) -> dict[str, Any]:
    """A row: items a second of each way over the same `items` prompts in batches of `batch`, in turns; see `sharpen`.

    The model is as it comes out of training: NF4, adapters beside it. `generate` runs as most people run it, rows as
    they come, and once more on rows sorted by length. fastprice gives what a point estimate takes; getting ready for it
    (`ready_seconds`: the trie, the merged copy of the weights) is done once and not in the figures.

    First the distributions are held against the exact ones (every price scored, transformers' own forward pass) on two
    prompts: the probability found, and where the medians lie. A red check gives no ratio.
    """
    from fastprice.inference.price_decoder import SAMPLING_TOLERANCE, PriceDecoder
    from fastprice.models.engine_choice import choose_engine

    engine = choose_engine("peft")
    loaded = engine.load_base(folder, method="qlora", max_tokens=512)
    tokenizer = loaded.tokenizer
    sharpen(loaded.model)
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
        "median_off": off,
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
        least=3,
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
    """How wrong the decoder is about prompts, at most: (relative error of the probability found, that of the median).

    The exact distributions come from every price scored by transformers' own forward pass. The median's error is the
    share of probability between it and the true one.
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
    """The question that every prompt begins with, then random tokens, as many as a text has."""
    question = list(tokenizer(HEAD, add_special_tokens=False)["input_ids"])
    rows = draw_rows(count, vocabulary, tokenizer.eos_token_id)
    return [question + row.ids[: row.labels.count(IGNORE)] for row in rows]


@torch.inference_mode()
def sharpen(model: Any) -> None:
    """Scales the last norm of a random model so that its logits spread like a tuned model's (standard deviation 4).

    Of ten digits the likeliest then has some 80 %. A random model as it is finds every price about as likely as any
    other, so that a walk over the likely ones has to visit them all: nobody predicts with such a model.
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
    """What people write: pad each batch on the left, generate at most `most` tokens greedily, search for a number."""
    prices: list[float | None] = []
    for start in range(0, len(prompts), batch):
        written = generate_greedily(model, tokenizer, prompts[start : start + batch], max_new_tokens=most)
        for text in tokenizer.batch_decode(written, skip_special_tokens=True):
            found = _PRICE.search(text)
            prices.append(float(found[0]) if found else None)
    return prices
