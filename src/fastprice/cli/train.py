"""`train`: a file of products in, a tuned estimator and its evaluation out."""

from __future__ import annotations

from typing import Any

from fastprice.cli.options import ConfigFile, make_console, settings_options
from fastprice.config import read_config


@settings_options("data", "clean", "split", "model", "train", "seed", "out")
def train(given: dict[str, Any], config: ConfigFile = None) -> None:
    """Fine-tune on a file of products; evaluate base, tuned model and baselines on the same unseen items."""
    from fastprice.run import train_and_evaluate

    train_and_evaluate(read_config(config, given), make_console())
