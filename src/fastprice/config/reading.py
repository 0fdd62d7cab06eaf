"""Settings from files, options and constructors, checked as a whole: every error at once, with the nearest name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fastprice.config.description import adapter_of, list_settings, sections
from fastprice.config.sections import EstimatorConfig, RunConfig
from fastprice.errors import ConfigError, nearest_name

__all__ = ["check_params", "read_config"]

_MISSING = {
    "data": "no data: name a file with --data FILE, or data: file: in a config file",
    "out": "no output folder: name one with --out DIR, or out: in a config file",
}


def read_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The settings in the YAML file `path` (None: the defaults), with `overrides` (dotted key -> value) on top.

    Raises ConfigError: no such file, invalid YAML (line and column), and every unknown key and impossible value.
    """
    given: dict[str, Any] = {} if path is None else _read_yaml(Path(path))
    where = "" if path is None else f"{path}: "
    for dotted, value in (overrides or {}).items():
        *parents, key = dotted.split(".")
        place = given
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{where}{parent} must hold keys, not {place!r}")
        place[key] = value
    try:
        config: RunConfig = adapter_of(RunConfig).validate_python(given)
    except ValidationError as error:
        raise ConfigError(where + "; ".join(_problems(error))) from error
    return config


def check_params(params: Mapping[str, Any]) -> EstimatorConfig:
    """The parameters of an estimator (`get_params()`), checked.

    Raises ConfigError naming every impossible one; a value must have its type already: "8" is no rank.
    """
    try:
        checked: EstimatorConfig = adapter_of(EstimatorConfig).validate_python(EstimatorConfig(**params), strict=True)
    except ValidationError as error:
        raise ConfigError("; ".join(_problems(error))) from error
    return checked


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


def _problems(error: ValidationError) -> list[str]:
    """Each as `key: what is wrong`; one for a key, whatever number of types its value could have had."""
    return list({_place(problem): _in_words(problem) for problem in error.errors()}.values())


def _place(problem: ErrorDetails) -> tuple[str, ...]:
    """The section, if any, and the name of a setting; behind them pydantic names which of its types was tried."""
    location = tuple(str(part) for part in problem["loc"])
    return location[:2] if location[0] in sections() else location[:1]


def _in_words(problem: ErrorDetails) -> str:
    *parents, name = _place(problem)
    key = ".".join([*parents, name])
    value = f"not {problem['input']!r:.60}"
    if problem["type"] == "missing":
        return _MISSING[key]
    if problem["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown key{_nearest_key(name, parents)}"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    if name in sections():
        return f"{name}: must hold keys, {value}"
    setting = next(each for each in list_settings() if key in (each.key, each.name))
    return f"{key}: must be {setting.type}, {value}{nearest_name(str(problem['input']), setting.choices)}"


def _nearest_key(name: str, parents: list[str]) -> str:
    """The nearest key of that section; where none is near, the same name in another one."""
    here = parents[0] if parents else ""
    names = [each.name for each in list_settings() if each.section == here] + ([] if parents else list(sections()))
    elsewhere = [each.key for each in list_settings() if each.name == name]
    return nearest_name(name, names) or (f" (did you mean {elsewhere[0]!r}?)" if elsewhere else "")
