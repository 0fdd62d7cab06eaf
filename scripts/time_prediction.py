"""Time and accuracy of price estimates: the distribution beside `generate` and a regular expression, on one CPU thread.

    OMP_NUM_THREADS=1 python scripts/time_prediction.py RUN --data FILE --text '*' --price price --group category name
    OMP_NUM_THREADS=1 python scripts/time_prediction.py RUN --synthetic 4000 --accuracy 800

RUN is a folder that `fastprice train` or `PriceEstimator.save` wrote; the texts are the test items of the data that it
was trained on, drawn as in training. Times are processor time in milliseconds an item; the ways take turns in one
process, and a figure is the median of at least three rounds, after one that is not counted:

    as they come   `generate` in batches of rows in their order, greedy, at most eight tokens, then a regular expression
    sorted         the same on rows sorted by length
    merged         the same on fp32 weights with the adapters merged into them, a plain transformers model
    ours           distributions as for a point estimate (fastprice.inference.price_decoder.SAMPLING_TOLERANCE)
    1e-4           distributions as `predict_distribution` returns them
    head           distributions of a price head of 128 bins; its time does not depend on its training
    a call each    as `ours`, with a call for each item: nothing is sorted, no prefix is shared

and ratios to `ours`. The time to make the decoder (merged copy, price trie) is printed above the table. With
--accuracy N also what the sampling tolerance costs on N test items: how far the cumulative distribution is from the
exact one, and mean errors in dollars. Before anything is timed, the merged model's logits and the distributions are
compared with the model's own; where they differ the script stops.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastprice import Item, PriceEstimator
from fastprice.benchmarking.prediction import check_prediction, generate_prices
from fastprice.benchmarking.timing import interleave, spread_of
from fastprice.cli.saved_runs import saved_estimator_folder
from fastprice.config import read_config
from fastprice.errors import BaseModelError
from fastprice.inference.price_decoder import DISTRIBUTION_TOLERANCE, SAMPLING_TOLERANCE, PriceDecoder
from fastprice.inference.price_heads import make_head
from fastprice.inference.scorers.merged import MergedScorer
from fastprice.inference.scorers.stock import StockScorer
from fastprice.models.parts import plain_model
from fastprice.run import prepare_items

ITEMS = {64: 384, 8: 128, 1: 48}  # by batch
ANSWER_TOKENS = 8
CRITERIA = ("mae", "mse", "rmsle")
COLUMNS = ("as they come", "sorted", "merged", "ours", "1e-4", "head", "a call each")


def main() -> None:
    options = _options()
    estimator = PriceEstimator.load(saved_estimator_folder(options.run))
    model, tokenizer = estimator.model, estimator.tokenizer
    test = prepare_items(read_config(None, _settings(options))).split.test
    prompts = [list(prompt.ids) for prompt in estimator.prompts(test[: max(ITEMS.values())])]
    start = time.process_time()
    decoder = PriceDecoder.of(model, tokenizer, max_price=max(1, round(estimator.ceiling_price_)), form=estimator.form)
    seconds = time.process_time() - start
    if not isinstance(decoder.scorer, MergedScorer):
        raise BaseModelError(f"{options.run}: no merged copy of this model can be made, so there is nothing to compare")
    error, off = check_prediction(decoder, StockScorer(model, decoder.trie), prompts[:4])
    if error > 1e-2 or off > SAMPLING_TOLERANCE:
        raise BaseModelError(f"{options.run}: the distributions are off by {error:.1%}, their medians by {off:.1%}")
    plain = merged_model(model)
    ids = torch.tensor(prompts[:1])
    with torch.inference_mode():
        difference = float((plain(input_ids=ids).logits - model(input_ids=ids).logits).abs().max())
    if difference > 1e-2:
        raise BaseModelError(f"{options.run}: the merged weights are off by {difference:.2g} in their logits")
    print(
        f"{np.mean([len(prompt) for prompt in prompts]):.0f} tokens a prompt; decoder made in {seconds * 1e3:.0f} ms\n"
    )
    print("| batch | items | " + " | ".join(COLUMNS) + " | times as fast |")
    print("|---:|---:|" + "---:|" * len(COLUMNS) + "---|")
    for batch in options.batches:
        print_times(model, plain, tokenizer, decoder, prompts[: ITEMS[batch]], batch)
    if options.accuracy:
        print_accuracy(estimator, decoder, test[: options.accuracy])


def print_times(
    model: Any, plain: Any, tokenizer: Any, decoder: PriceDecoder, prompts: list[list[int]], batch: int
) -> None:
    """Measures and prints a row of the table of times."""
    by_length = sorted(prompts, key=len)
    ways = {
        "as they come": lambda: generate_prices(model, tokenizer, prompts, batch, ANSWER_TOKENS),
        "sorted": lambda: generate_prices(model, tokenizer, by_length, batch, ANSWER_TOKENS),
        "merged": lambda: generate_prices(plain, tokenizer, by_length, batch, ANSWER_TOKENS),
        "ours": lambda: decoder.distributions(prompts, tolerance=SAMPLING_TOLERANCE, batch_size=batch),
        "1e-4": lambda: decoder.distributions(prompts, tolerance=DISTRIBUTION_TOLERANCE, batch_size=batch),
    }
    head = make_head("histogram", model.config.hidden_size, 1.0, 1000.0)

    @torch.inference_mode()
    def read_head() -> None:
        head.distributions(head(decoder.last_hidden_states(prompts, batch_size=batch)))

    ways["head"] = read_head
    if batch == 1:
        ways["a call each"] = lambda: [
            decoder.distributions([prompt], tolerance=SAMPLING_TOLERANCE) for prompt in prompts
        ]
    samples = interleave(ways, "cpu", seconds=0.0, warmup=1, min_rounds=3, clock=time.process_time)
    each = {name: 1e3 * spread_of(seconds).p50 / len(prompts) for name, seconds in samples.items()}
    times = ", ".join(f"{each[name] / each['ours']:.1f}" for name in COLUMNS[:3])
    cells = (f"{each[name]:.2f}" if name in each else "" for name in COLUMNS)
    print(f"| {batch} | {len(prompts)} | " + " | ".join(cells) + f" | {times} |", flush=True)


def print_accuracy(estimator: PriceEstimator, decoder: PriceDecoder, items: list[Item]) -> None:
    """Prints the error of sampled distributions and of their point estimates, beside those of every price scored."""
    prompts = [prompt.ids for prompt in estimator.prompts(items)]
    truths = np.array([item.price for item in items])
    exact = decoder.distributions(prompts, tolerance=0.0)
    prices = np.arange(1, decoder.trie.highest + 1)
    print(f"\nmean absolute errors in dollars on {len(items)} items, by criterion\n")
    print("| tolerance | CDF off, mean % | at most % | " + " | ".join(CRITERIA) + " |")
    print("|---|" + "---:|" * (2 + len(CRITERIA)))
    for tolerance in (0.0, SAMPLING_TOLERANCE, 2 * SAMPLING_TOLERANCE):
        found = decoder.distributions(prompts, tolerance=tolerance)
        pairs = zip(found, exact, strict=True)
        off = [max(abs(sampled.cdf(price) - truth.cdf(price)) for price in prices) for sampled, truth in pairs]
        errors = [np.abs(estimator.estimates(found, criterion) - truths).mean() for criterion in CRITERIA]
        cells = [f"{100 * np.mean(off):.1f}", f"{100 * np.max(off):.1f}", *(f"{each:.2f}" for each in errors)]
        print(f"| {tolerance} | " + " | ".join(cells) + " |", flush=True)


def merged_model(model: Any) -> Any:
    """A plain transformers model in fp32 whose weights are those of `model` and its adapters."""
    from fastprice_kernels import dequantize_nf4

    source = plain_model(model)
    weights = {}
    for name, module in source.named_modules():
        if hasattr(module, "base_layer"):
            base = module.base_layer.weight
            state = getattr(base, "quant_state", None)
            dense = base.detach().float() if state is None else dequantize_nf4(base.data, state).float()
            deltas = [module.get_delta_weight(adapter).detach().float() for adapter in module.active_adapters]
            weights[f"{name}.weight"] = sum(deltas, dense)
    for name, value in source.state_dict().items():
        if "lora_" not in name and "base_layer" not in name:
            weights[name] = value
    settings = source.config.to_dict()
    settings.pop("quantization_config", None)
    plain = type(source)(type(source.config).from_dict(settings)).float().eval()
    plain.load_state_dict(weights)
    return plain


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    if options.synthetic is not None:
        data = {"data.synthetic": options.synthetic}
    else:
        data = {
            "data.file": options.data,
            "data.text": options.text,
            "data.price": options.price,
            "data.group": options.group,
            "data.limit": options.limit,
        }
    settings = {**data, "split.test": options.test, "seed": options.seed, "out": str(options.run)}
    return {key: value for key, value in settings.items() if value is not None}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and accuracy of price estimates; see the script's docstring.")
    parser.add_argument("run", type=Path, help="folder of a saved estimator")
    of_data = parser.add_mutually_exclusive_group(required=True)
    of_data.add_argument("--data", help="JSONL(.gz), CSV or Parquet file")
    of_data.add_argument("--synthetic", type=int, metavar="N", help="N items of the synthetic catalogue instead")
    parser.add_argument("--text", nargs="+", default=["*"], help="text columns, or '*'")
    parser.add_argument("--price", default="price")
    parser.add_argument("--group", nargs="+", default=[])
    parser.add_argument("--limit", type=int, help="use only so many items, drawn with the seed")
    parser.add_argument("--test", type=float, help="share of the items that are test items, as in training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int, nargs="+", choices=sorted(ITEMS), default=sorted(ITEMS, reverse=True))
    parser.add_argument(
        "--accuracy", type=int, default=0, metavar="N", help="also what the sampling tolerance costs, on N test items"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
