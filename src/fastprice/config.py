"""The settings of one run: a YAML file, or options of the command line, checked as a whole.

Unknown keys and impossible values are told all at once, each with its place and the nearest valid name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastprice.errors import ConfigError, nearest_name
from fastprice.memory import parse_bytes
from fastprice.memory.recompute_levels import check_recompute

__all__ = ["CleanConfig", "DataConfig", "ModelConfig", "RunConfig", "SplitConfig", "TrainConfig", "read_config"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("kernels", "cuda_graphs", "mask", mode="before", check_fields=False)
    @classmethod
    def _yaml_reads_on_and_off_as_booleans(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class DataConfig(_Section):
    """Where the items come from: a file with its columns, or so many items of synthetic products."""

    file: str | None = None
    synthetic: int | None = Field(default=None, ge=20)
    text: list[str] = ["text"]
    price: str = "price"
    group: list[str] = []
    drop: list[str] = []
    limit: int | None = Field(default=None, ge=20, description="use only so many usable items, drawn with the seed")

    @field_validator("text", "group", "drop", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if (self.file is None) == (self.synthetic is None):
            raise ValueError("give either file (a JSONL, CSV or Parquet file) or synthetic (a number of products)")
        return self


class CleanConfig(_Section):
    min_price: float = Field(default=0.50, gt=0)
    max_price: float = Field(default=999.49, gt=0)
    mask: Literal["own", "prices", "off"] = "own"

    @model_validator(mode="after")
    def _ordered(self) -> CleanConfig:
        if self.min_price >= self.max_price:
            raise ValueError("min_price must be below max_price")
        return self


class SplitConfig(_Section):
    validation: float = Field(default=0.1, gt=0, lt=0.5)
    test: float = Field(default=0.1, gt=0, lt=0.5)
    near_duplicates: bool = True


class ModelConfig(_Section):
    base: str = "nano"
    method: str = "qlora"
    engine: str = "auto"
    kernels: Literal["auto", "on", "off"] = "auto"
    output: Literal["text", "json", "head"] = "text"
    price_head: Literal["histogram", "quantile"] = "histogram"
    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    max_tokens: int = Field(default=256, ge=8)
    max_memory: str | int | None = Field(default=None, description="GPU memory to stay within, such as 24GiB")
    recompute: str = Field(default="auto", description="recompute level of each layer (docs/fit.md)")

    @field_validator("recompute")
    @classmethod
    def _known_levels(cls, value: str) -> str:
        try:
            return check_recompute(value)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("recompute: ")) from error

    @field_validator("max_memory")
    @classmethod
    def _size(cls, value: str | int | None) -> str | int | None:
        try:
            if value is not None:
                parse_bytes(value)
            return value
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("memory: ")) from error


class TrainConfig(_Section):
    learning_rate: float | None = Field(default=None, gt=0)
    epochs: float = Field(default=1.0, gt=0)
    price_head_weight: float = Field(default=1.0, gt=0)
    text_loss: Literal["ce", "number", "number_mse", "wasserstein"] = "ce"
    text_loss_weight: float = Field(default=0.3, gt=0)
    pack_tokens: int = Field(default=2048, ge=72)
    gradient_accumulation: int = Field(default=1, ge=1)
    cuda_graphs: Literal["auto", "on", "off"] = "off"
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    evaluations: int = Field(default=5, ge=0)
    validation_items: int = Field(default=200, ge=1)
    batch_size: int = Field(default=64, ge=1)


class RunConfig(_Section):
    """One run of `fastprice train`; `to_yaml` writes what `read_config` reads."""

    data: DataConfig
    clean: CleanConfig = CleanConfig()
    split: SplitConfig = SplitConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    seed: int = Field(default=0, ge=0)
    out: str

    def estimator_params(self) -> dict[str, Any]:
        """The constructor's arguments of a PriceEstimator."""
        return {**self.model.model_dump(), **self.train.model_dump(), "seed": self.seed}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def read_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The settings in the YAML file `path` (none: the defaults), with `overrides` (dotted key -> value) on top.

    Raises ConfigError: no such file, invalid YAML (line and column), unknown keys, impossible values.
    """
    settings: dict[str, Any] = {} if path is None else _read_yaml(Path(path))
    for dotted, value in (overrides or {}).items():
        *sections, key = dotted.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{path}: {section} must hold keys, not {place!r}")
        place[key] = value
    if "data" not in settings:
        raise ConfigError("no data: name a file with --data FILE, or data: file: in a config file")
    if "out" not in settings:
        raise ConfigError("no output folder: name one with --out DIR, or out: in a config file")
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        where = "settings" if path is None else str(path)
        raise ConfigError(f"{where}: " + "; ".join(_told(problem) for problem in error.errors())) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        near = nearest_name(path.name, (other.name for other in path.parent.glob("*.y*ml")))
        raise ConfigError(f"{path}: there is no such config file{near}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as text ({error}); a config is a YAML file, data goes with --data"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}: invalid YAML{place}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: invalid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, not keys such as data: and out:")
    return content


def _told(problem: Any) -> str:
    """One of pydantic's problems as `key: what is wrong`, with the nearest key for an unknown one."""
    place: tuple[str | int, ...] = problem["loc"]
    dotted = ".".join(str(part) for part in place)
    if problem["type"] == "extra_forbidden":
        return f"{dotted}: unknown key{nearest_name(str(place[-1]), _keys_beside(place))}"
    if problem["type"] == "value_error":
        return f"{dotted}: {problem['ctx']['error']}"
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{dotted}: {message}" + ("" if problem["type"] == "missing" else f", not {problem['input']!r:.60}")


def _keys_beside(place: Sequence[str | int]) -> list[str]:
    section: Any = RunConfig
    for part in place[:-1]:
        section = section.model_fields[part].annotation
    return list(section.model_fields)
