"""Options of the commands: those made from the settings, and those that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from fastprice.config import Setting, list_settings, section_titles
from fastprice.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "MANY_VALUES",
    "ConfigFile",
    "Criterion",
    "ModelDir",
    "Plot",
    "Price",
    "Text",
    "make_console",
    "settings_options",
]

ConfigFile = Annotated[
    Path | None, typer.Argument(metavar="CONFIG.yaml", help="YAML file of settings; options override it.")
]
ModelDir = Annotated[Path, typer.Option("--model", metavar="DIR", help="A run's folder, or a saved estimator.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also draw a plot: PNG, SVG or PDF.")]
Criterion = Annotated[
    str, typer.Option("--criterion", help="What the estimates minimize: mae, mse, rmsle, mape or hits.")
]
Text = Annotated[list[str] | None, typer.Option("--text", metavar="COL...", help="Text columns; else the run's.")]
Price = Annotated[str | None, typer.Option("--price", metavar="COL", help="Price column; else the run's.")]

_SET = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE...", help="Any setting by its key: train.epochs=2.", rich_help_panel="run"
    ),
]

# Options that take several values after one name.
MANY_VALUES = frozenset(
    {"--set", "--item", "--strategies", *(each.option for each in list_settings() if isinstance(each.default, list))}
)


def settings_options(*chosen: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command that takes `given`, the settings from the command line by key, with an option for each one.

    `chosen` are sections (`train`) and keys (`model.base`); `--set` reaches every other setting.
    """
    offered = [each for each in list_settings() if each.section in chosen or each.key in chosen]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(context: typer.Context, set_: list[str] | None, **values: Any) -> None:
            given = {each.key: values.pop(each.name) for each in offered}
            used = {
                each.key: given[each.key]
                for each in offered
                if (source := context.get_parameter_source(each.name)) is not None and source.name == "COMMANDLINE"
            }
            command(**values, given={**used, **_key_values(set_ or [])})

        own = signature(command, eval_str=True).parameters
        parameters = [
            Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *(each.replace(kind=Parameter.KEYWORD_ONLY) for name, each in own.items() if name != "given"),
            *(_option(each) for each in offered),
            Parameter("set_", Parameter.KEYWORD_ONLY, default=None, annotation=_SET),
        ]
        run.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _option(setting: Setting) -> Parameter:
    """Its value stays text: pydantic checks all settings together, those of the file and of the options."""
    title = section_titles().get(setting.section)
    panel = f"{setting.section}: {title[:1].lower()}{title[1:].rstrip('.')}" if title else "run"
    limits = setting.type if setting.choices and setting.metavar == "NAME" else setting.range
    help_ = f"{setting.help} {limits[:1].upper()}{limits[1:]}." if limits else setting.help
    if isinstance(setting.default, bool):
        name = setting.option.removeprefix("--")
        option = typer.Option(f"--{name}/--no-{name}", help=setting.help, rich_help_panel=panel)
        return Parameter(
            setting.name, Parameter.KEYWORD_ONLY, default=setting.default, annotation=Annotated[bool, option]
        )
    option = typer.Option(setting.option, metavar=setting.metavar, help=help_, rich_help_panel=panel)
    if isinstance(setting.default, list):
        return Parameter(
            setting.name,
            Parameter.KEYWORD_ONLY,
            default=setting.default or None,
            annotation=Annotated[list[str] | None, option],
        )
    default = None if setting.default is None else str(setting.default)
    return Parameter(setting.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[str | None, option])


def _key_values(pairs: Iterable[str]) -> dict[str, Any]:
    """The settings of `--set`, their values read as YAML."""
    given = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {pair!r}: write KEY=VALUE, such as train.epochs=2")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {pair!r}: {value!r} is not a YAML value") from error
    return given


def make_console() -> Console:
    from rich.console import Console

    return Console()
