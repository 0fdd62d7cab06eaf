"""One table of all ways to get a price from a model: generated text, its distribution, a price head, number losses.

    python scripts/compare_outputs.py --data FILE --text '*' --price price --out DIR --runs head:ce text:wasserstein

A run is OUTPUT:TEXT_LOSS, as `PriceEstimator(output=..., text_loss=...)`; each is trained once, on the same items, with
the same settings and seed, and gives these estimates:

    greedy text         the price that the model generates when each next token is the likeliest (texts without a price
                        count as the median training price)
    text, SUMMARY       a summary of the distribution over whole dollars (fastprice.inference.price_distribution): its
                        median, its log-mean, the middle of its best window
    head, SUMMARY       the same of the price head's distribution (runs with output=head)

All rows are for the same unseen items. Differences are to the greedy text of the first run given, in dollars of
absolute error, with a 95 % paired bootstrap interval: the sampling noise of the items, and not of training. Intervals
are calibrated on the validation items (split-conformal, as in `predict_interval`), for each distribution alone.

The weights are those of the last step, and chosen by no validation error, unless --evaluations is given. The estimates
of a run are kept in DIR/RUN.npz with its settings: a run that is there is not trained again. Every run given is in the
table, DIR/outputs.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastprice import Item, PriceEstimator, score
from fastprice.common.arrays import FloatArray
from fastprice.config import RunConfig, read_config
from fastprice.errors import ConfigError
from fastprice.evaluation.metrics import paired_difference
from fastprice.inference.conformal import calibrate
from fastprice.run import PreparedItems, prepare_items
from fastprice.training.callbacks import Progress

SUMMARIES = {"mae": "median", "rmsle": "log-mean", "hits": "best window"}  # by criterion
COVERAGE = 0.9


@dataclass
class RunEstimates:
    """One run's estimates for the N test items: `guesses` (N,) and interval `bounds` (N, 2) by name, in dollars."""

    truths: FloatArray
    guesses: dict[str, FloatArray] = field(default_factory=dict)
    bounds: dict[str, FloatArray] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        arrays = {f"guess {name}": values for name, values in self.guesses.items()}
        arrays |= {f"bound {name}": values for name, values in self.bounds.items()}
        np.savez(file, truths=self.truths, notes=np.array(json.dumps(self.notes)), **arrays)

    @classmethod
    def load(cls, file: Path) -> RunEstimates:
        with np.load(file) as saved:
            found = cls(saved["truths"], notes=json.loads(str(saved["notes"])))
            for key in saved.files:
                kind, _, name = key.partition(" ")
                if kind in ("guess", "bound"):
                    (found.guesses if kind == "guess" else found.bounds)[name] = saved[key]
        return found


def main() -> None:
    options = _options()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    config = read_config(None, _settings(options, out))
    prepared = prepare_items(config)
    split = prepared.split
    print(f"{len(split.train)} items to train on, {len(split.validation)} to validate, {len(split.test)} to test")
    runs: dict[str, RunEstimates] = {}
    for run in options.runs:
        file = out / f"{run.replace(':', '-')}.npz"
        if not file.is_file():
            _train(config, run, prepared).save(file)
        runs[run] = RunEstimates.load(file)
        if not np.array_equal(runs[run].truths, _prices(split.test)):
            raise ConfigError(f"{file} is of other test items: name another --out, or remove it")
    text = table(runs) + "\n" + _notes(runs, prepared)
    (out / "outputs.md").write_text(text, encoding="utf-8")
    print(text)


def _train(config: RunConfig, run: str, prepared: PreparedItems) -> RunEstimates:
    output, _, text_loss = run.partition(":")
    params = {**config.estimator_params(), "output": output, "text_loss": text_loss or "ce"}
    split, truths = prepared.split, _prices(prepared.split.test)
    estimator = PriceEstimator(**params)
    start = time.perf_counter()
    with Progress() as progress:
        estimator.fit(split.train, split.validation, on_event=progress)
    found = RunEstimates(truths)
    greedy = estimator.predict_greedy(split.test)
    found.guesses["greedy text"] = np.where(np.isnan(greedy), estimator.fallback_price_, greedy)
    for kind in ("text", "head") if output == "head" else ("text",):
        source = None if output == "json" else kind
        validation, unseen = (
            estimator.distributions(estimator.prompts(items), output=source) for items in (split.validation, split.test)
        )
        calibration = calibrate(validation, _prices(split.validation), ceiling=estimator.ceiling_price_)
        found.bounds[f"{kind}, {SUMMARIES['mae']}"] = np.array(
            [calibration.interval(each, COVERAGE) for each in unseen]
        )
        for criterion, summary in SUMMARIES.items():
            found.guesses[f"{kind}, {summary}"] = estimator.estimates(unseen, criterion)
    found.notes = {
        "settings": params,
        "without_price": int(np.isnan(greedy).sum()),
        "tokens": estimator.training_.tokens,
        "training_seconds": round(estimator.training_.seconds, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "constant": float(np.median(_prices(split.train))),
    }
    return found


def table(runs: dict[str, RunEstimates]) -> str:
    """All estimates of all runs as a Markdown table; differences are to the first run's greedy text."""
    first = next(iter(runs.values()))
    truths, reference = first.truths, first.guesses["greedy text"]
    lines = [
        "| trained as | estimate | MAE $ (95 %) | less than greedy text $ (95 %) | % | RMSLE | hits % | coverage of "
        "90 % intervals | median width $ |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    constant = score(truths, np.full(len(truths), first.notes["constant"]))
    lines.append(f"| constant | median of the training prices | {_mae(constant)} | | | {_rest(constant)} | | |")
    for run, found in runs.items():
        for name, guesses in found.guesses.items():
            scores = score(truths, guesses)
            gain = paired_difference(truths, reference, guesses, "mae")
            share = 100 * gain / score(truths, reference).mae
            bounds = found.bounds.get(name)
            compared = "" if guesses is reference else f"{gain:.2f} ({gain.low:.2f} to {gain.high:.2f})"
            coverage = "" if bounds is None else f"{100 * _coverage(bounds, truths):.1f} %"
            width = "" if bounds is None else f"{np.median(np.diff(bounds)):.0f}"
            percent = "" if guesses is reference else f"{share:.1f}"
            lines.append(
                f"| {run} | {name} | {_mae(scores)} | {compared} | {percent} | {_rest(scores)} | {coverage} | {width} |"
            )
    return "\n".join(lines)


def _notes(runs: dict[str, RunEstimates], prepared: PreparedItems) -> str:
    split = prepared.split
    lines = [
        "",
        f"{len(split.test)} unseen items; {len(split.train)} to train on, {len(split.validation)} to calibrate with.",
        "",
    ]
    for run, found in runs.items():
        notes = found.notes
        lines.append(
            f"- {run}: {notes['tokens']:,} tokens in {notes['training_seconds']:,.0f} s; {notes['without_price']} "
            f"greedy texts without a price; {json.dumps(notes['settings'])}"
        )
    groups = Counter(item.group for item in split.test)
    lines.append(f"- {len(groups):,} groups among the test items, the largest of {max(groups.values())}")
    return "\n".join(lines) + "\n"


def _coverage(bounds: FloatArray, truths: FloatArray) -> float:
    return float(((bounds[:, 0] <= truths) & (truths <= bounds[:, 1])).mean())


def _mae(scores: Any) -> str:
    return f"{scores.mae:.2f} ({scores.mae.low:.2f}–{scores.mae.high:.2f})"


def _rest(scores: Any) -> str:
    return f"{scores.rmsle:.3f} | {scores.hit_rate:.1f}"


def _prices(items: list[Item]) -> FloatArray:
    return np.array([item.price for item in items], dtype=np.float64)


def _settings(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    import yaml

    settings = {
        "data.file": options.data,
        "data.text": options.text,
        "data.price": options.price,
        "data.group": options.group,
        "data.limit": options.limit,
        "model.base": options.base,
        "train.epochs": options.epochs,
        "train.evaluations": options.evaluations,
        "seed": options.seed,
        "out": str(out),
    }
    for pair in options.set:
        key, _, value = pair.partition("=")
        settings[key] = yaml.safe_load(value)
    if options.only:
        settings["data.file"] = str(_filtered(Path(options.data), options.only, out / "items.jsonl"))
    return {key: value for key, value in settings.items() if value is not None}


def _filtered(source: Path, only: str, target: Path) -> Path:
    """The rows of a JSON Lines file (gzipped or not) whose column is one of the values in `only`: COLUMN=A,B."""
    column, _, values = only.partition("=")
    wanted = set(values.split(","))
    with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8") as file:
        rows = [line for line in file if json.loads(line).get(column) in wanted]
    target.write_text("".join(rows), encoding="utf-8")
    return target


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="All ways to get a price from a model; see the script's docstring.")
    parser.add_argument("--data", required=True, help="JSONL(.gz), CSV or Parquet file")
    parser.add_argument("--text", nargs="+", default=["*"], help="text columns, or '*'")
    parser.add_argument("--price", default="price")
    parser.add_argument("--group", nargs="+", default=[])
    parser.add_argument("--only", help="COLUMN=A,B: rows of a JSON Lines file with one of these values")
    parser.add_argument("--limit", type=int, help="use only so many items, drawn with the seed")
    parser.add_argument("--base", default="nano")
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--evaluations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="any other setting")
    parser.add_argument("--runs", nargs="+", default=["head:ce"], metavar="OUTPUT:TEXT_LOSS")
    parser.add_argument("--out", required=True, help="folder for the estimates and the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
