"""Prices a second: the distribution over prices beside `generate` and a regular expression, batch for batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from fastprice.bench.cases import draw_rows
from fastprice.bench.timing import interleave, ratios, spread_of
from fastprice.prompts import IGNORE

__all__ = ["compare_prediction"]

_TOLERANCE = 5e-2  # relative, on the probability found: bf16 logits differ by that much between batch shapes
_ANSWER_TOKENS = 4  # three digits and an end: what a tuned model writes, where a random one would never stop
_PRICE = re.compile(r"\d+(?:\.\d+)?")


def compare_prediction(folder: str, *, items: int, batch: int, seconds: float) -> dict[str, Any]:
    """A row: items a second of both ways over the same `items` prompts in batches of `batch`, in turns.

    First the distribution is held against the exact one (every price scored) on two prompts; a red check gives no
    ratio.
    """
    from fastprice.decoding import price_distributions
    from fastprice.engines import choose_engine

    engine = choose_engine("peft")
    loaded = engine.load_base(folder, method="qlora", max_tokens=512)
    model, tokenizer = loaded.model, loaded.tokenizer
    engine.for_prediction(model)
    device = next(model.parameters()).device
    rows = draw_rows(items, model.config.vocab_size, model.config.eos_token_id)
    prompts = [row.ids[: row.labels.count(IGNORE)] for row in rows]
    error = _error(
        price_distributions(model, tokenizer, prompts[:2]),
        price_distributions(model, tokenizer, prompts[:2], mass=1.0, tolerance=0.0),
    )
    row: dict[str, Any] = {"items": items, "batch": batch, "error": error, "tolerance": _TOLERANCE}
    if not error <= _TOLERANCE:
        return {**row, "status": "wrong", "reason": f"probability found is off by {error:.1%}"}
    samples = interleave(
        {
            "fastprice": lambda: price_distributions(model, tokenizer, prompts, batch_size=batch),
            "generate + regex": lambda: _generate(model, tokenizer, prompts, batch),
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
def _generate(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], batch: int) -> list[float | None]:
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
