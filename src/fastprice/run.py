"""The main job of `demo` and `train`: items in, one table, one report and a tuned estimator out.

    read ─► clean ─► split ─► base measured ─► fine-tuned ─► baselines ─► table, report.html, model/

Whatever can be wrong with data, settings or the base's name is found before anything is written or any weight loaded.
The model is written as soon as it is trained, before the evaluation. Every file appears whole or not at all.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastprice import __version__
from fastprice.common.files import write_text_atomically
from fastprice.config import RunConfig
from fastprice.data.cleaning import clean_items
from fastprice.data.items import Item, Items, load_items
from fastprice.data.splitting import Split, split_items
from fastprice.errors import ConfigError, DataError
from fastprice.models.adapters import check_method

if TYPE_CHECKING:
    from rich.console import Console

    from fastprice.evaluation.evaluate import Evaluation
    from fastprice.training.callbacks import TrainingEvent

__all__ = ["CONFIG", "MODEL", "Prepared", "RunResult", "prepare_items", "run"]

CONFIG, MODEL, REJECTS, REPORT, RESULTS = "config.yaml", "model", "rejects.jsonl", "report.html", "results.json"


@dataclass(frozen=True)
class Prepared:
    """Items ready to train on: their split, and every row that was read but not used, with its reason.

    `undrawn` counts usable items that `data.limit` left out.
    """

    split: Split
    items: Items
    notes: list[str]
    undrawn: int

    def counts(self) -> dict[str, int]:
        """Rows read, rejected by reason, and the size of each part."""
        reasons = Counter(_reason_kind(reject.reason) for reject in self.items.rejects)
        return {
            "read": len(self.items) + len(self.items.rejects) + self.undrawn,
            **{f"rejected: {reason}": count for reason, count in reasons.most_common()},
            **({"not drawn: data.limit": self.undrawn} if self.undrawn else {}),
            "train": len(self.split.train),
            "validation": len(self.split.validation),
            "test": len(self.split.test),
        }


@dataclass(frozen=True)
class RunResult:
    """Where a run left its files, and what it measured."""

    out: Path
    evaluation: Evaluation


def prepare_items(config: RunConfig) -> Prepared:
    """Reads, cleans, draws and splits the items of `config`; raises DataError where nothing usable is left."""
    data = config.data
    if data.synthetic is not None:
        from fastprice.data.synthetic import make_catalogue

        items = Items(make_catalogue(data.synthetic, seed=config.seed), source="synthetic products")
    else:
        assert data.file is not None
        items = load_items(
            data.file,
            text=data.text[0] if len(data.text) == 1 else data.text,
            price=data.price,
            group=data.group or None,
            drop=data.drop,
        )
    notes = list(items.notes)
    clean = config.clean
    items = clean_items(items, min_price=clean.min_price, max_price=clean.max_price, mask=clean.mask)
    if not items:
        reasons = Counter(_reason_kind(reject.reason) for reject in items.rejects)
        told = ", ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common(3))
        raise DataError(f"{items.source}: no usable item is left after cleaning ({told}); see clean: in the settings")
    notes += [note for note in items.notes if note not in notes]
    undrawn = 0 if data.limit is None else max(0, len(items) - data.limit)
    if undrawn:
        kept = sorted(random.Random(config.seed).sample(range(len(items)), len(items) - undrawn))
        notes.append(f"{len(kept):,} of {len(items):,} usable items drawn with seed {config.seed}")
        items = Items((items[index] for index in kept), rejects=items.rejects, source=items.source, notes=items.notes)
    split = split_items(
        items,
        validation=config.split.validation,
        test=config.split.test,
        seed=config.seed,
        near_duplicates=config.split.near_duplicates,
    )
    return Prepared(split, items, notes + [note for note in split.notes if note not in notes], undrawn)


def run(config: RunConfig, console: Console) -> RunResult:
    """Does the whole job of `config`, showing it on `console`; see the module's docstring."""
    out = _output_folder(config)
    check_method(config.model.method)
    prepared = prepare_items(config)
    split = prepared.split
    _say_counts(console, prepared)

    # torch comes in only now: everything above fails fast.
    from fastprice.estimator import PriceEstimator
    from fastprice.models.base_models import load_config
    from fastprice.models.engine_choice import choose_engine

    choose_engine(config.model.engine)
    load_config(config.model.base)
    estimator = PriceEstimator(**config.estimator_params())
    console.print(f"base {config.model.base} in {config.model.method}, {_describe_device()}")
    estimator.prepare()

    out.mkdir(parents=True, exist_ok=True)
    prepared.items.write_rejects(out / REJECTS)
    write_text_atomically(out / CONFIG, config.to_yaml())
    if prepared.items.rejects:
        console.print(f"{len(prepared.items.rejects):,} rows that cannot be used, with reasons: {out / REJECTS}")

    from fastprice.evaluation.baselines import default_baselines
    from fastprice.evaluation.evaluate import Evaluation, evaluate_model, true_prices
    from fastprice.training.callbacks import Progress

    train_prices = np.array([item.price for item in split.train])
    median = float(np.median(train_prices))

    with console.status("measuring the base model as it comes"):
        base = evaluate_model(f"{config.model.base}, untrained", estimator.predict, split.test, fallback=median)
    with Progress() as progress:
        estimator.fit(split.train, split.validation, on_event=progress)
    training = estimator.training_
    estimator.save(out / MODEL)
    console.print(
        f"trained on {training.tokens:,} tokens in {training.seconds:,.0f} s"
        + ("" if training.best_mae is None else f"; kept step {training.best_step} (${training.best_mae:.2f})")
        + ("" if training.recompute is None else f"; recompute: {training.recompute}")
        + (f"; {estimator.cut_:,} texts cut at {estimator.max_tokens} tokens" if estimator.cut_ else "")
    )

    for move in training.recompute_changes:
        console.print(f"  memory: {move}", highlight=False)

    results = []
    texts = [item.text for item in split.train]
    for baseline in default_baselines(seed=config.seed):
        with console.status(f"fitting the baseline {baseline.name}"):
            baseline.fit(texts, train_prices)
            results.append(evaluate_model(baseline.name, baseline.predict, split.test))
    with console.status("measuring the tuned model"):
        name = f"{config.model.base}, tuned"
        greedy = evaluate_model(f"{name}, greedy text", estimator.predict_greedy, split.test, fallback=median)
        last = [greedy]
        if estimator.gives_distributions_:  # else `predict` is the greedy text
            last.append(evaluate_model(name, estimator.predict, split.test))
        if config.model.output == "head":
            results.append(evaluate_model(f"{name}, text", partial(_text_medians, estimator), split.test))
    prepared.notes.append(_told_intervals(estimator, split.test))
    evaluation = Evaluation(list(split.test), true_prices(split.test), [*results, base, *last])
    console.print(evaluation.table())
    console.print(prepared.notes[-1])
    _write_results(out, config, prepared, evaluation, training.events)
    console.print(f"report: {out / REPORT}\nmodel:  {out / MODEL}")
    return RunResult(out, evaluation)


def _text_medians(estimator: Any, texts: Sequence[str]) -> Any:
    """What the digits of an estimator with a head say."""
    return estimator.estimates(estimator.distributions(estimator.prompts(texts), output="text"))


def _told_intervals(estimator: Any, test: Sequence[Item]) -> str:
    """One line on how many unseen prices the calibrated 90 % intervals hold, and how wide they are."""
    calibration = estimator.calibration_
    if calibration is None or calibration.max_coverage < 0.9:
        return "no 90 % intervals: they need at least 9 validation items and an engine that gives distributions (peft)"
    bounds = estimator.predict_interval(test, coverage=0.9)
    truths = np.array([item.price for item in test])
    held = 100 * ((bounds[:, 0] <= truths) & (truths <= bounds[:, 1])).mean()
    return (
        f"90 % intervals hold {held:.1f} % of unseen prices; their median width is ${np.median(np.diff(bounds)):,.0f}"
    )


def _write_results(
    out: Path, config: RunConfig, prepared: Prepared, evaluation: Evaluation, events: Sequence[TrainingEvent]
) -> None:
    from fastprice.evaluation.report import write_report

    curves = [{name: value for name, value in asdict(event).items() if value is not None} for event in events]
    results = {
        "counts": prepared.counts(),
        "evaluation": evaluation.as_dict(),
        "curves": curves,
        "versions": _versions(),
    }
    write_text_atomically(out / RESULTS, json.dumps(results, indent=1) + "\n")
    write_report(
        out / REPORT,
        title=f"fastprice: {config.model.base} on {prepared.items.source or 'items'}",
        evaluation=evaluation,
        curves=curves,
        settings={**config.model_dump(), "versions": _versions()},
        counts=prepared.counts(),
        notes=prepared.notes,
        focus=evaluation.results[-1].name,
    )


def _output_folder(config: RunConfig) -> Path:
    """The folder of the run, checked: new, empty, or an earlier run's, which is replaced file by file."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).is_file():
        raise ConfigError(f"out: {out} holds files that no run wrote; name a new folder")
    return out


def _say_counts(console: Console, prepared: Prepared) -> None:
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


def _reason_kind(reason: str) -> str:
    """A reject's reason without its particulars, so that reasons can be counted."""
    head = reason.split(":")[0]
    words = [
        "…" if any(character.isdigit() for character in word) or word[:1] in "'\"" else word for word in head.split()
    ]
    return " ".join(words)[:60]


def _describe_device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"on {torch.cuda.get_device_name()}"
    return f"on {torch.get_num_threads()} CPU threads"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    libraries = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    return {"fastprice": __version__, **{name: version(name) for name in libraries}}
