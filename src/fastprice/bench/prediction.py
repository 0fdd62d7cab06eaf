"""Prices a second: the distribution over prices beside `generate` and a regular expression, batch for batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from fastprice.bench.cases import draw_rows
from fastprice.bench.timing import interleave, ratios, spread_of
from fastprice.prompts import HEAD, IGNORE

__all__ = ["compare_prediction", "draw_prompts", "generate_prices", "sharpen"]

_TOLERANCE = 5e-2  # relative, on the probability found: bf16 logits differ by that much between batch shapes
_ANSWER_TOKENS = 4  # three digits and an end: what a tuned model writes, where a random one would never stop
_LOGIT_SPREAD = 4.0
_PRICE = re.compile(r"\d+(?:\.\d+)?")


def compare_prediction(folder: str, *, items: int, batch: int, seconds: float) -> dict[str, Any]:
    """A row: items a second of both ways over the same `items` prompts in batches of `batch`, in turns; see `sharpen`.

    First the distribution is held against the exact one (every price scored) on two prompts; a red check gives no
    ratio.
    """
    from fastprice.decoding import price_distributions
    from fastprice.engines import choose_engine

    engine = choose_engine("peft")
    loaded = engine.load_base(folder, method="qlora", max_tokens=512)
    model, tokenizer = loaded.model, loaded.tokenizer
    engine.for_prediction(model)
    sharpen(model)
    device = next(model.parameters()).device
    prompts = draw_prompts(tokenizer, items, model.config.vocab_size)
    error = _error(
        price_distributions(model, tokenizer, prompts[:2]),
        price_distributions(model, tokenizer, prompts[:2], tolerance=0.0),
    )
    row: dict[str, Any] = {"items": items, "batch": batch, "error": error, "tolerance": _TOLERANCE}
    if not error <= _TOLERANCE:
        return {**row, "status": "wrong", "reason": f"probability found is off by {error:.1%}"}
    samples = interleave(
        {
            "fastprice": lambda: price_distributions(model, tokenizer, prompts, batch_size=batch),
            "generate + regex": lambda: generate_prices(model, tokenizer, prompts, batch),
        },
        device,
        seconds=seconds,
        warmup=1,
        least=3,
    )
    return {
        **row,
        "items_per_second": {
            name: spread_of([items / each for each in values]).as_dict() for name, values in samples.items()
        },
        "ratios": {"generate + regex": ratios(samples["generate + regex"], samples["fastprice"]).as_dict()},
    }


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


@torch.inference_mode()
def generate_prices(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], batch: int) -> list[float | None]:
    """What people write: sort by length, pad on the left, generate greedily, search for a number."""
    prices: list[float | None] = []
    ordered = sorted(prompts, key=len)
    for start in range(0, len(ordered), batch):
        chunk = ordered[start : start + batch]
        width = max(map(len, chunk))
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in chunk], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in chunk], device=model.device)
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=_ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        for text in tokenizer.batch_decode(written[:, width:], skip_special_tokens=True):
            found = _PRICE.search(text)
            prices.append(float(found[0]) if found else None)
    return prices
