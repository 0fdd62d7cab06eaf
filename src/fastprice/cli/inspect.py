"""`inspect`: items as the model will see them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastprice.cli.options import ConfigFile, make_console, settings_options
from fastprice.config import read_config


@settings_options("data", "clean", "split", "model.base", "model.output", "model.max_tokens", "seed")
def inspect(
    given: dict[str, Any],
    config: ConfigFile = None,
    examples: Annotated[int, typer.Option(help="How many items to show.", min=1)] = 3,
) -> None:
    """Show items exactly as the model will see them, the tokens of the loss in color; loads no model."""
    from fastprice.prompts.preview import inspect_items
    from fastprice.run import prepare_items

    settings = read_config(config, {"out": "unused", **given})
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
