"""The main job of `demo` and `train`: items in; one table, one report and a tuned estimator out.

    read ─► clean ─► split ─► evaluate the base model ─► fine-tune ─► evaluate, baselines too ─► table, report, model

Errors in data, settings or the name of the base model are found before anything is written or any weight is loaded.
The model is saved as soon as it is trained, before the evaluation. Every file appears whole or not at all.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastprice import __version__
from fastprice.common.arrays import FloatArray
from fastprice.common.files import write_text_atomically
from fastprice.config import RunConfig
from fastprice.data.cleaning import clean_items
from fastprice.data.items import Item, Items, load_items
from fastprice.data.splitting import Split, split_items
from fastprice.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from fastprice.estimator import PriceEstimator
    from fastprice.evaluation.evaluate import Evaluation, ModelResult
    from fastprice.training.train import TrainingResult

__all__ = ["CONFIG", "MODEL", "RESULTS", "PreparedItems", "RunResult", "prepare_items", "train_and_evaluate"]

CONFIG, MODEL, REJECTS, REPORT, RESULTS = "config.yaml", "model", "rejects.jsonl", "report.html", "results.json"


@dataclass(frozen=True)
class PreparedItems:
    """Items ready to train on, and the rows that were read but not used.

    split      items to train on, to validate with and to test with
    items      all of them, with the rejected rows and their reasons
    notes      remarks of the readers, the cleaning and the split, for people
    not_drawn  number of usable items that `data.limit` left out
    """

    split: Split
    items: Items
    notes: list[str]
    not_drawn: int

    def counts(self) -> dict[str, int]:
        """Rows read, rows rejected by reason, and the size of each part of the split."""
        return {
            "read": len(self.items) + len(self.items.rejects) + self.not_drawn,
            **{f"rejected: {reason}": count for reason, count in _count_reasons(self.items).most_common()},
            **({"not drawn: data.limit": self.not_drawn} if self.not_drawn else {}),
            "train": len(self.split.train),
            "validation": len(self.split.validation),
            "test": len(self.split.test),
        }


@dataclass(frozen=True)
class RunResult:
    """The folder of a run, and the evaluation of its models on the test items."""

    out: Path
    evaluation: Evaluation


def train_and_evaluate(config: RunConfig, console: Console) -> RunResult:
    """Does the whole job of `config` (see the module's docstring) and prints its progress on `console`.

    Raises DataError, ConfigError, BaseModelError, MissingDependencyError, TrainingError.
    """
    out = _check_output_folder(config)
    prepared = prepare_items(config)
    _print_counts(console, prepared)
    estimator = _load_base_model(config, console)

    out.mkdir(parents=True, exist_ok=True)
    prepared.items.write_rejects(out / REJECTS)
    write_text_atomically(out / CONFIG, config.to_yaml())
    if prepared.items.rejects:
        console.print(f"{len(prepared.items.rejects):,} rows that cannot be used, with reasons: {out / REJECTS}")

    test = prepared.split.test
    with console.status("evaluating the base model"):
        base = _evaluate_base(estimator, prepared.split)
    _train(estimator, prepared.split, console)
    estimator.save(out / MODEL)
    baselines = _evaluate_baselines(prepared.split, config.seed, console)
    with console.status("evaluating the tuned model"):
        tuned = _evaluate_tuned(estimator, prepared.split)
        interval_note = _describe_intervals(estimator, test)

    from fastprice.evaluation.evaluate import Evaluation, true_prices

    evaluation = Evaluation(list(test), true_prices(test), [*baselines, base, *tuned])
    console.print(evaluation.table(f"{config.model.base} on {len(test):,} unseen items"))
    console.print(interval_note)
    prepared.notes.append(interval_note)
    _write_results(out, config, prepared, evaluation, estimator.training_)
    console.print(f"report: {out / REPORT}\nmodel:  {out / MODEL}")
    return RunResult(out, evaluation)


def prepare_items(config: RunConfig) -> PreparedItems:
    """Reads, cleans, draws and splits the items of `config`; raises DataError where no usable item is left."""
    items = _read_items(config)
    notes = list(items.notes)
    items = clean_items(items, **asdict(config.clean))
    if not items:
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in _count_reasons(items).most_common(3))
        raise DataError(
            f"{items.source}: no usable item is left after cleaning ({reasons}); see clean: in the settings"
        )
    notes += [note for note in items.notes if note not in notes]
    limit = config.data.limit
    not_drawn = 0 if limit is None else max(0, len(items) - limit)
    if not_drawn:
        drawn = sorted(random.Random(config.seed).sample(range(len(items)), len(items) - not_drawn))
        notes.append(f"{len(drawn):,} of {len(items):,} usable items drawn with seed {config.seed}")
        items = Items((items[index] for index in drawn), rejects=items.rejects, source=items.source, notes=items.notes)
    split = split_items(items, **asdict(config.split), seed=config.seed)
    return PreparedItems(split, items, notes + [note for note in split.notes if note not in notes], not_drawn)


def _read_items(config: RunConfig) -> Items:
    data = config.data
    if data.synthetic is not None:
        from fastprice.data.synthetic import make_synthetic_items

        return Items(make_synthetic_items(data.synthetic, seed=config.seed), source="synthetic products")
    assert data.file is not None
    return load_items(
        data.file,
        text=data.text[0] if len(data.text) == 1 else data.text,
        price=data.price,
        group=data.group or None,
        drop=data.drop,
    )


def _check_output_folder(config: RunConfig) -> Path:
    """The folder of the run: new, empty, or an earlier run's, which is replaced file by file; else ConfigError."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).is_file():
        raise ConfigError(f"out: {out} holds files that no run wrote; name a new folder")
    return out


def _load_base_model(config: RunConfig, console: Console) -> PriceEstimator:
    """The estimator with untrained adapters; imports torch, which everything before it does without."""
    from fastprice.estimator import PriceEstimator

    console.print(f"base {config.model.base} in {config.model.method}, {_describe_device()}")
    return PriceEstimator(**config.estimator_params()).prepare()


def _train(estimator: PriceEstimator, split: Split, console: Console) -> None:
    from fastprice.training.callbacks import Progress

    with Progress() as progress:
        estimator.fit(split.train, split.validation, on_event=progress)
    training = estimator.training_
    console.print(
        f"trained on {training.tokens:,} tokens in {training.seconds:,.0f} s"
        + ("" if training.best_mae is None else f"; kept step {training.best_step} (${training.best_mae:.2f})")
        + ("" if training.recompute is None else f"; recompute: {training.recompute}")
        + (f"; {estimator.cut_:,} texts cut at {estimator.max_tokens} tokens" if estimator.cut_ else "")
    )
    for change in training.recompute_changes:
        console.print(f"  memory: {change}", highlight=False)


def _evaluate_base(estimator: PriceEstimator, split: Split) -> ModelResult:
    from fastprice.evaluation.evaluate import evaluate_model

    return evaluate_model("base model", estimator.predict, split.test, fallback=_median_price(split.train))


def _evaluate_baselines(split: Split, seed: int, console: Console) -> list[ModelResult]:
    """Estimators without a language model, fitted on the training items."""
    from fastprice.evaluation.baselines import default_baselines
    from fastprice.evaluation.evaluate import evaluate_model, true_prices

    texts, prices = [item.text for item in split.train], true_prices(split.train)
    results = []
    for baseline in default_baselines(seed=seed):
        with console.status(f"fitting the baseline {baseline.name}"):
            baseline.fit(texts, prices)
            results.append(evaluate_model(baseline.name, baseline.predict, split.test))
    return results


def _evaluate_tuned(estimator: PriceEstimator, split: Split) -> list[ModelResult]:
    """What the tuned model generates and what it estimates, from the digits too where it has a price head.

    The last result is what `predict` gives.
    """
    from fastprice.evaluation.evaluate import evaluate_model

    def from_digits(texts: Sequence[str]) -> FloatArray:
        return estimator.estimates(estimator.distributions(estimator.prompts(texts), output="text"))

    results = []
    if estimator.output == "head":
        results.append(evaluate_model("tuned, text", from_digits, split.test))
    fallback = _median_price(split.train)
    results.append(evaluate_model("tuned, greedy text", estimator.predict_greedy, split.test, fallback=fallback))
    if estimator.gives_distributions_:  # else `predict` is the greedy text
        results.append(evaluate_model("tuned model", estimator.predict, split.test))
    return results


def _median_price(items: Sequence[Item]) -> float:
    return float(np.median([item.price for item in items]))


def _describe_intervals(estimator: PriceEstimator, test: Sequence[Item]) -> str:
    """One line on the coverage of the calibrated 90 % intervals on the test items, and on their width."""
    calibration = estimator.calibration_
    if calibration is None or calibration.max_coverage < 0.9:
        return "no 90 % intervals: they need at least 9 validation items and an engine that gives distributions (peft)"
    bounds = estimator.predict_interval(test, coverage=0.9)
    truths = np.array([item.price for item in test])
    coverage = 100 * ((bounds[:, 0] <= truths) & (truths <= bounds[:, 1])).mean()
    return (
        f"90 % intervals hold {coverage:.1f} % of unseen prices; their median width is "
        f"${np.median(np.diff(bounds)):,.0f}"
    )


def _write_results(
    out: Path, config: RunConfig, prepared: PreparedItems, evaluation: Evaluation, training: TrainingResult
) -> None:
    from fastprice.evaluation.report import write_report

    curves = [{name: value for name, value in asdict(event).items() if value is not None} for event in training.events]
    results = {
        "base": config.model.base,
        "counts": prepared.counts(),
        "evaluation": evaluation.as_dict(),
        "curves": curves,
        "versions": _library_versions(),
    }
    write_text_atomically(out / RESULTS, json.dumps(results, indent=1) + "\n")
    write_report(
        out / REPORT,
        title=f"fastprice: {config.model.base} on {prepared.items.source or 'items'}",
        evaluation=evaluation,
        curves=curves,
        settings={**asdict(config), "versions": _library_versions()},
        counts=prepared.counts(),
        notes=prepared.notes,
        focus=evaluation.results[-1].name,
    )


def _print_counts(console: Console, prepared: PreparedItems) -> None:
    counts = prepared.counts()
    console.print(
        f"{counts['read']:,} rows read from {prepared.items.source}; {len(prepared.split.train):,} to train on, "
        f"{len(prepared.split.validation):,} to validate, {len(prepared.split.test):,} to test"
    )
    for name, count in counts.items():
        if name.startswith("rejected"):
            console.print(f"  {count:,} {name}")
    for note in prepared.notes:
        console.print(f"  note: {note}", highlight=False)


def _count_reasons(items: Items) -> Counter[str]:
    return Counter(_general_reason(reject.reason) for reject in items.rejects)


def _general_reason(reason: str) -> str:
    """The reason of a rejected row without its numbers and quotations, so that equal reasons can be counted."""
    words = [
        "…" if any(character.isdigit() for character in word) or word[:1] in "'\"" else word
        for word in reason.split(":")[0].split()
    ]
    return " ".join(words)[:60]


def _describe_device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"on {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"on {threads} CPU thread{'s' if threads > 1 else ''}"


def _library_versions() -> dict[str, str]:
    from importlib.metadata import version

    libraries = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    return {"fastprice": __version__, **{name: version(name) for name in libraries}}
