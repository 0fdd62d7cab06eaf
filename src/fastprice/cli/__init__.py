"""The command line. It parses, calls, and prints; everything heavy is imported inside the command that needs it.

A module for each group of commands; what they share is in options.py.
"""

from __future__ import annotations

import os
import sys

import typer

from fastprice import __version__
from fastprice.cli import compare, explain, machine, predict, quantize, train
from fastprice.cli.options import MANY_VALUES
from fastprice.errors import FastpriceError

__all__ = ["app", "main"]

app = typer.Typer(
    name="fastprice",
    help="Fine-tunes language models to estimate product prices from text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    train.demo,
    train.train,
    train.inspect,
    predict.predict,
    predict.evaluate,
    explain.explain,
    quantize.quantize,
    compare.compare,
    machine.plan,
    machine.doctor,
):
    app.command()(command)
# Its options are declared in fastprice.benchmarking.command_line, which also runs without typer.
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    machine.bench
)


def main() -> None:
    """Entry point of the `fastprice` command: user errors are one line and status 2, tracebacks need `--debug`."""
    # Idle OpenMP threads must sleep: spinning ones fight over the cores with whatever else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if arguments == ["--version"]:
        print(f"fastprice {__version__}")
        return
    try:
        app(_one_value_each([argument for argument in arguments if argument != "--debug"]), prog_name="fastprice")
    except FastpriceError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _one_value_each(arguments: list[str]) -> list[str]:
    """`--text a b` as `--text a --text b`, which is the only form that click knows."""
    expanded: list[str] = []
    option: str | None = None
    first = False
    for argument in arguments:
        if argument.startswith("-") and len(argument) > 1:
            option, first = (argument, True) if argument in MANY_VALUES else (None, False)
            expanded.append(argument)
        elif option and not first:
            expanded += [option, argument]
        else:
            expanded.append(argument)
            first = False
    return expanded
