"""One table of what each way of reading a price brings: text, its distribution, a head, losses that know numbers.

    python scripts/compare_outputs.py --data FILE --text '*' --price price --out DIR --runs head:ce text:wasserstein

A run is OUTPUT:TEXT_LOSS, as `PriceEstimator(output=..., text_loss=...)`; each is trained once, on the same items, with
the same settings and seed, and read in every way it can be:

    greedy text         what the model writes when each next token is the likeliest (unreadable answers: the median of
                        the training prices, and counted)
    text, LOSS          the estimate of the distribution over whole dollars for that loss (fastprice.inference.price_distribution)
    head, LOSS          the same of the head's distribution (runs with output=head)

All rows are of the same unseen items. Differences are to the greedy text of the first run named, in dollars of absolute
error, with a 95 % paired bootstrap interval over items: it holds the luck of the draw of items, not of training.
Intervals are conformally calibrated on validation items, as `predict_interval` does, each by its own distribution.

No weights are chosen by validation error unless --evaluations says so: the last step's are read, so that no reading is
the one they were chosen by. What a run read is kept in DIR/RUN.npz with its settings; runs that are there already are
not trained again, and every run named enters the table, DIR/outputs.md.
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
from fastprice.run import Prepared, prepare_items
from fastprice.training.callbacks import Progress

ESTIMATES = ("mae", "rmsle", "hits")
SUMMARIES = {"mae": "median", "rmsle": "log-mean", "hits": "best window"}
COVERAGE = 0.9


@dataclass
class Readings:
    """What one run said of the N test items: `guesses` (dollars) by name, `bounds` (N, 2) of the distributions."""

    truths: FloatArray
    guesses: dict[str, FloatArray] = field(default_factory=dict)
    bounds: dict[str, FloatArray] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        arrays = {f"guess {name}": values for name, values in self.guesses.items()}
        arrays |= {f"bound {name}": values for name, values in self.bounds.items()}
        np.savez(file, truths=self.truths, notes=np.array(json.dumps(self.notes)), **arrays)

    @classmethod
    def load(cls, file: Path) -> Readings:
        with np.load(file) as saved:
            found = cls(saved["truths"], notes=json.loads(str(saved["notes"])))
            for name in saved.files:
                kind, _, reading = name.partition(" ")
                if kind in ("guess", "bound"):
                    (found.guesses if kind == "guess" else found.bounds)[reading] = saved[name]
        return found


def main() -> None:
    options = _options()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    config = read_config(None, _settings(options, out))
    prepared = prepare_items(config)
    split = prepared.split
    print(f"{len(split.train)} items to train on, {len(split.validation)} to validate, {len(split.test)} to test")
    readings: dict[str, Readings] = {}
    for run in options.runs:
        file = out / f"{run.replace(':', '-')}.npz"
        if not file.is_file():
            _train(config, run, prepared).save(file)
        readings[run] = Readings.load(file)
        if not np.array_equal(readings[run].truths, _prices(split.test)):
            raise ConfigError(f"{file} is of other test items: name another --out, or remove it")
    text = table(readings) + "\n" + _told(readings, prepared)
    (out / "outputs.md").write_text(text, encoding="utf-8")
    print(text)


def _train(config: RunConfig, run: str, prepared: Prepared) -> Readings:
    output, _, text_loss = run.partition(":")
    params = {**config.estimator_params(), "output": output, "text_loss": text_loss or "ce"}
    split, truths = prepared.split, _prices(prepared.split.test)
    estimator = PriceEstimator(**params)
    began = time.perf_counter()
    with Progress() as progress:
        estimator.fit(split.train, split.validation, on_event=progress)
    found = Readings(truths)
    greedy = estimator.predict_greedy(split.test)
    found.guesses["greedy text"] = np.where(np.isnan(greedy), estimator.fallback_price_, greedy)
    for kind in ("text", "head") if output == "head" else ("text",):
        shown = None if output == "json" else kind
        known, unseen = (
            estimator.distributions(estimator.prompts(items), output=shown)
            for items in (split.validation, split.test)
        )  # fmt: skip
        calibration = calibrate(known, _prices(split.validation), ceiling=estimator.ceiling_price_)
        found.bounds[f"{kind}, {SUMMARIES['mae']}"] = np.array(
            [calibration.interval(each, COVERAGE) for each in unseen]
        )
        for loss in ESTIMATES:
            found.guesses[f"{kind}, {SUMMARIES[loss]}"] = estimator.guesses(unseen, loss)
    found.notes = {
        "settings": params,
        "unreadable": int(np.isnan(greedy).sum()),
        "tokens": estimator.training_.tokens,
        "training_seconds": round(estimator.training_.seconds, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "constant": float(np.median(_prices(split.train))),
    }
    return found


def table(readings: dict[str, Readings]) -> str:
    """The rows of all runs as a Markdown table; the first run's greedy text is what the others are compared with."""
    first = next(iter(readings.values()))
    truths, reference = first.truths, first.guesses["greedy text"]
    lines = [
        "| trained as | read as | MAE $ (95 %) | less than greedy text $ (95 %) | % | RMSLE | hits % | 90 % intervals "
        "hold | median width $ |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    constant = score(truths, np.full(len(truths), first.notes["constant"]))
    lines.append(f"| constant | median of the training prices | {_mae(constant)} | | | {_rest(constant)} | | |")
    for run, found in readings.items():
        for name, guesses in found.guesses.items():
            scores = score(truths, guesses)
            gain = paired_difference(truths, reference, guesses, "mae")
            share = 100 * gain / score(truths, reference).mae
            bounds = found.bounds.get(name)
            compared = "" if guesses is reference else f"{gain:.2f} ({gain.low:.2f} to {gain.high:.2f})"
            held = "" if bounds is None else f"{100 * _held(bounds, truths):.1f} %"
            width = "" if bounds is None else f"{np.median(np.diff(bounds)):.0f}"
            percent = "" if guesses is reference else f"{share:.1f}"
            lines.append(
                f"| {run} | {name} | {_mae(scores)} | {compared} | {percent} | {_rest(scores)} | {held} | {width} |"
            )
    return "\n".join(lines)


def _told(readings: dict[str, Readings], prepared: Prepared) -> str:
    split = prepared.split
    lines = [
        "",
        f"{len(split.test)} unseen items; {len(split.train)} to train on, {len(split.validation)} to calibrate with.",
        "",
    ]
    for run, found in readings.items():
        notes = found.notes
        lines.append(
            f"- {run}: {notes['tokens']:,} tokens in {notes['training_seconds']:,.0f} s; {notes['unreadable']} greedy "
            f"answers unreadable; {json.dumps(notes['settings'])}"
        )
    groups = Counter(item.group for item in split.test)
    lines.append(f"- {len(groups):,} groups among the test items, the largest of {max(groups.values())}")
    return "\n".join(lines) + "\n"


def _held(bounds: FloatArray, truths: FloatArray) -> float:
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
    parser = argparse.ArgumentParser(description="What each way of reading a price brings; see the script's docstring.")
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
    parser.add_argument("--out", required=True, help="folder for what was read, and the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
