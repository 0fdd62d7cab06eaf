"""`demo`, `train`, `inspect`: items in, a tuned estimator out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fastprice.cli.options import (
    Base,
    ConfigFile,
    Data,
    Drop,
    Group,
    Price,
    Set,
    Text,
    data_settings,
    make_console,
    overrides_of,
)


def demo(
    out: Annotated[str, typer.Option(help="Folder for the report and the model.")] = "fastprice-demo",
    items: Annotated[int | None, typer.Option(help="Size of the synthetic catalogue.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of catalogue, split and training.")] = 0,
) -> None:
    """The whole path on a synthetic catalogue and the shipped nano model: minutes, no GPU, no data needed."""
    from importlib.resources import files

    # A nano model's matrices are too small to share: on two cores two threads trained 4,100 tokens/s, one 6,800.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    overrides: dict[str, Any] = {"out": out, "seed": seed}
    if items is not None:
        overrides["data.synthetic"] = items
    _run(Path(str(files("fastprice") / "configs" / "demo.yaml")), overrides)


def train(
    config: ConfigFile = None,
    data: Data = None,
    text: Text = None,
    price: Price = None,
    group: Group = None,
    drop: Drop = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="Folder for report and model.")] = None,
    base: Base = None,
    method: Annotated[str | None, typer.Option(help="qlora, lora or full.")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, peft or unsloth.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training items.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only so many items, drawn with the seed.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of draw, split and training.")] = None,
    set_: Set = None,
) -> None:
    """Fine-tune on a file of products; evaluate base, tuned model and baselines on the same unseen items."""
    overrides = overrides_of(
        set_,
        {
            **data_settings(data, text, price, group, drop), "data.limit": limit, "model.base": base,
            "model.method": method, "model.engine": engine, "train.epochs": epochs, "seed": seed, "out": out,
        },
    )  # fmt: skip
    _run(config, overrides)


def inspect(
    config: ConfigFile = None,
    data: Data = None,
    text: Text = None,
    price: Price = None,
    group: Group = None,
    drop: Drop = None,
    base: Base = None,
    examples: Annotated[int, typer.Option(help="How many items to show.", min=1)] = 3,
    set_: Set = None,
) -> None:
    """Show items exactly as the model will see them, the tokens that carry loss in color; loads no model."""
    from fastprice.config import read_config
    from fastprice.prompts.preview import inspect_items
    from fastprice.run import prepare_items

    overrides = overrides_of(set_, {**data_settings(data, text, price, group, drop), "model.base": base})
    settings = read_config(config, {"out": "unused", **overrides})
    prepared = prepare_items(settings)

    from fastprice.models.base_models import load_tokenizer
    from fastprice.prompts.template import FORMS, TEXT

    model = settings.model
    inspect_items(
        load_tokenizer(model.base),
        prepared.split.train,
        model.max_tokens,
        make_console(),
        form=FORMS.get(model.output, TEXT),
        examples=examples,
    )


def _run(config: Path | None, overrides: dict[str, Any]) -> None:
    from fastprice.config import read_config
    from fastprice.run import run

    run(read_config(config, overrides), make_console())
