"""Prices a second: the distribution over prices beside `generate` and a regular expression, batch for batch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastprice.benchmarking.kernel_comparison import OURS
from fastprice.benchmarking.random_models import seed_adapters
from fastprice.benchmarking.timing import Stopwatch, interleave, ratios, spread_of
from fastprice.benchmarking.workload import draw_rows
from fastprice.inference.greedy import generate_greedily
from fastprice.inference.scorers.stock import StockScorer
from fastprice.prompts.template import IGNORE, PREAMBLE

if TYPE_CHECKING:
    from fastprice.inference.price_decoder import PriceDecoder

__all__ = [
    "PREDICTION_WAYS",
    "PredictionModel",
    "check_prediction",
    "compare_prediction",
    "draw_prompts",
    "generate_prices",
    "sharpen_logits",
]

PREDICTION_WAYS = (OURS, "fastprice head", "generate + regex", "generate + regex, sorted")

_TOLERANCE = 5e-2  # relative, on the probability found: bf16 logits differ by that much between batch shapes
_ANSWER_TOKENS = 4  # three digits and an end token, as a tuned model writes; a random one would not stop
_LOGIT_SPREAD = 4.0
_PRICE = re.compile(r"\d+(?:\.\d+)?")


def compare_prediction(folder: str, *, items: int, batch: int, seconds: float) -> dict[str, Any]:
    """The row of `PredictionModel.compare` for the model in `folder`."""
    return PredictionModel(folder).compare(items=items, batch=batch, seconds=seconds)


class PredictionModel:
    """The model in `folder` as after training: NF4, with adapters beside it, its logits sharpened (`sharpen_logits`),
    and a price head beside it.

    Making the decoder (`ready_seconds`: price trie, merged copy of the weights) happens once and is in no other figure.
    """

    def __init__(self, folder: str) -> None:
        from fastprice.inference.price_decoder import PriceDecoder
        from fastprice.inference.price_heads import make_head
        from fastprice.models.engine_choice import choose_engine

        engine = choose_engine("peft")
        loaded = engine.load_base(folder, method="qlora", max_tokens=512)
        self.tokenizer = loaded.tokenizer
        sharpen_logits(loaded.model)
        self.model = engine.attach(loaded.model, method="qlora", rank=16, alpha=32.0, dropout=0.0, seed=0)
        seed_adapters(self.model)
        engine.for_prediction(self.model)
        self.device = next(self.model.parameters()).device
        watch = Stopwatch(self.device)
        watch.mark()
        self.decoder = PriceDecoder.of(self.model, self.tokenizer)
        watch.mark()
        self.ready_seconds = watch.intervals()[0]
        self.head = make_head("histogram", self.model.config.hidden_size, 1.0, 1000.0).to(self.device)

    def compare(
        self,
        *,
        items: int,
        batch: int,
        seconds: float,
        ways: Collection[str] = PREDICTION_WAYS,
        samples: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> dict[str, Any]:
        """A row: items a second of each of `ways` over the same `items` prompts in batches of `batch`, in turns.

        `generate` runs as most people run it, on rows in their order, and once more on rows sorted by length. fastprice
        computes the distributions that point estimates need; its head reads them off one pass over the prompts.
        samples: every sample goes into the row.

        First the distributions are compared with the exact ones (`check_prediction`) on two prompts, and the head's
        hidden states with those of transformers' own forward pass. Where they differ by more than the tolerances there
        is no ratio.
        """
        from fastprice.inference.price_decoder import SAMPLING_TOLERANCE

        prompts = draw_prompts(self.tokenizer, items, self.model.config.vocab_size)
        error, off = check_prediction(self.decoder, StockScorer(self.model, self.decoder.trie), prompts[:2])
        states_off = self._states_error(prompts[:4])
        row: dict[str, Any] = {
            "items": items,
            "batch": batch,
            "scorer": type(self.decoder.scorer).__name__,
            "ready_seconds": self.ready_seconds,
            "error": error,
            "tolerance": _TOLERANCE,
            "median_error": off,
            "median_tolerance": SAMPLING_TOLERANCE,
            "states_error": states_off,
        }
        if not (error <= _TOLERANCE and off <= SAMPLING_TOLERANCE and states_off <= _TOLERANCE):
            reason = f"probability is off by {error:.1%}, the median by {off:.1%} of it, states by {states_off:.1%}"
            return {**row, "status": "wrong", "reason": reason}
        every: dict[str, Callable[[], object]] = {
            OURS: lambda: self.decoder.distributions(prompts, tolerance=SAMPLING_TOLERANCE, batch_size=batch),
            "fastprice head": lambda: self._read_head(prompts, batch),
            "generate + regex": lambda: generate_prices(self.model, self.tokenizer, prompts, batch),
            "generate + regex, sorted": lambda: generate_prices(
                self.model, self.tokenizer, sorted(prompts, key=len), batch
            ),
        }
        timed = {name: way for name, way in every.items() if name == OURS or name in ways}
        found = interleave(timed, self.device, seconds=seconds, warmup=1, min_rounds=3, clock=clock)
        if samples:
            row["samples"] = found
        return {
            **row,
            "items_per_second": {
                name: spread_of([items / each for each in values]).as_dict() for name, values in found.items()
            },
            "ratios": {name: ratios(theirs, found[OURS]).as_dict() for name, theirs in found.items() if name != OURS},
        }

    def _read_head(self, prompts: Sequence[Sequence[int]], batch: int) -> object:
        states = self.decoder.last_hidden_states(prompts, batch_size=batch)
        if states is None:
            raise RuntimeError("this model's hidden states cannot be read")
        with torch.no_grad():
            return self.head.distributions(self.head(states))

    def _states_error(self, prompts: Sequence[Sequence[int]]) -> float:
        """The largest relative error of a prompt's hidden state; 0 where the model gives none."""
        from fastprice.inference.price_heads import prompt_hidden_states

        found = self.decoder.last_hidden_states(prompts)
        if found is None:
            return 0.0
        worst = 0.0
        for order, states in prompt_hidden_states(self.model, prompts):
            distance = (found[order].float() - states.float()).norm(dim=-1) / states.float().norm(dim=-1)
            worst = max(worst, float(distance.max()))
        return worst


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
