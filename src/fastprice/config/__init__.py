"""The settings of a run: declared in sections.py, described in description.py, read and checked in reading.py."""

from __future__ import annotations

from fastprice.config.description import Setting, describe_parameters, json_schema, list_settings, section_titles
from fastprice.config.reading import check_params, read_config
from fastprice.config.sections import (
    PROMPT_TOKENS,
    CleanConfig,
    DataConfig,
    EstimatorConfig,
    ModelConfig,
    RunConfig,
    SplitConfig,
    TrainConfig,
)

__all__ = [
    "PROMPT_TOKENS",
    "CleanConfig",
    "DataConfig",
    "EstimatorConfig",
    "ModelConfig",
    "RunConfig",
    "Setting",
    "SplitConfig",
    "TrainConfig",
    "check_params",
    "describe_parameters",
    "json_schema",
    "list_settings",
    "read_config",
    "section_titles",
]
