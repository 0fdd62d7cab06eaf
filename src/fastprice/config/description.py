"""The settings as the help of the command line, the docs and error messages describe them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from textwrap import wrap
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter

from fastprice.config.sections import RunConfig

__all__ = ["Setting", "adapter_of", "describe_parameters", "json_schema", "list_settings", "section_titles", "sections"]

Config = TypeVar("Config")

LONGEST_METAVAR = 20  # characters; a longer one leaves no room for the help beside it

_TYPES = {"string": "text", "integer": "an integer", "number": "a number", "boolean": "true or false", "null": "null"}
_RANGES = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}


@dataclass(frozen=True)
class Setting:
    """One setting.

    section  name of its section; "" for `seed` and `out`
    type     type and range in words, such as "an integer, at least 8"
    range    the range alone, "" for none
    default  None also where it is required (`required`)
    metavar  what stands for its value in help texts
    choices  its valid values where these are a few names
    """

    section: str
    name: str
    type: str
    range: str
    default: Any
    required: bool
    help: str
    metavar: str
    choices: tuple[str, ...]

    @property
    def key(self) -> str:
        """As files and `--set` name it: train.epochs."""
        return f"{self.section}.{self.name}".lstrip(".")

    @property
    def option(self) -> str:
        """As the command line names it: the name with hyphens, but --data for data.file."""
        return "--data" if self.key == "data.file" else "--" + self.name.replace("_", "-")


@cache
def list_settings() -> tuple[Setting, ...]:
    """Every setting of a run, in the order of declaration."""
    whole = json_schema()
    found = []
    for name in whole["properties"]:
        section = sections().get(name)
        if section is None:
            found.append(_describe("", name, whole, RunConfig))
        else:
            schema = whole["$defs"][section.__name__]
            found += [_describe(name, each, schema, section) for each in schema["properties"]]
    return tuple(found)


@cache
def sections() -> dict[str, type]:
    """The class of each section by its name."""
    hints = get_type_hints(RunConfig)
    return {each.name: hints[each.name] for each in fields(RunConfig) if is_dataclass(hints[each.name])}


def section_titles() -> dict[str, str]:
    """What each section is about, by its name."""
    return {name: (section.__doc__ or "").splitlines()[0] for name, section in sections().items()}


@cache
def json_schema() -> dict[str, Any]:
    """The JSON schema of a YAML file of settings, for editors (YAML language server) and other programs."""
    return adapter_of(RunConfig).json_schema()


@cache
def adapter_of(section: type[Config]) -> TypeAdapter[Config]:
    """What validates a section and writes its JSON schema."""
    return TypeAdapter(section)


def _describe(section: str, name: str, schema: Mapping[str, Any], owner: type) -> Setting:
    described = schema["properties"][name]
    (declared,) = (each for each in fields(owner) if each.name == name)
    return Setting(
        section=section,
        name=name,
        type=_type_in_words(described),
        range=_range_in_words(described),
        default=declared.default_factory() if callable(declared.default_factory) else described.get("default"),
        required=name in schema.get("required", ()),
        help=" ".join(described["description"].split()),
        metavar=described.get("format") or _metavar(described),
        choices=tuple(described.get("enum", ())),
    )


def _type_in_words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        *others, last = (_type_in_words(each) for each in schema["anyOf"])
        words = " or ".join(others)
        return f"{words}, or {last}" if "," in words else f"{words} or {last}"
    if "enum" in schema:
        *others, last = schema["enum"]
        return f"{', '.join(others)} or {last}"
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "array":
        return "a list of texts"
    return ", ".join(filter(None, [_TYPES[schema["type"]], _range_in_words(schema)]))


def _range_in_words(schema: Mapping[str, Any]) -> str:
    alternatives = schema.get("anyOf", [schema])
    return " and ".join(
        words.format(each[key]) for each in alternatives for key, words in _RANGES.items() if key in each
    )


def _metavar(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return _metavar(schema["anyOf"][0])
    if "enum" in schema:
        names = "|".join(schema["enum"])
        return names if len(names) <= LONGEST_METAVAR else "NAME"
    return "TEXT" if schema["type"] == "string" else str(schema["type"]).upper()


def describe_parameters() -> str:
    """The parameters of a `PriceEstimator`, one a line, for its docstring."""
    lines = []
    for each in list_settings():
        if each.section in ("model", "train") or each.name == "seed":
            lines += wrap(
                f"{each.name} ({each.type}; default {each.default!r}): {each.help}",
                width=116,
                initial_indent="    ",
                subsequent_indent="        ",
            )
    return "\n".join(lines)
