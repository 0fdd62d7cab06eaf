"""The command line: one module a command, named as the command. It parses, calls and prints.

Everything heavy (torch, transformers, scikit-learn) is imported inside the command that needs it.
"""

from __future__ import annotations

import os
import sys

import typer

from fastprice import __version__
from fastprice.cli import (
    bench,
    compare,
    demo,
    doctor,
    evaluate,
    explain,
    inspect,
    plan,
    predict,
    quantize,
    settings,
    train,
)
from fastprice.cli.options import MANY_VALUES
from fastprice.errors import FastpriceError

__all__ = ["app", "main"]

app = typer.Typer(
    name="fastprice",
    help="Fine-tunes language models to estimate product prices from text.",
    epilog="fastprice COMMAND --help lists a command's options; --debug with any command shows tracebacks.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    demo.demo,
    train.train,
    inspect.inspect,
    predict.predict,
    evaluate.evaluate,
    explain.explain,
    compare.compare,
    plan.plan,
    quantize.quantize,
    settings.settings,
    doctor.doctor,
):
    app.command()(command)
app.command(context_settings=bench.PASS_ON)(bench.bench)


def main() -> None:
    """Entry point of the `fastprice` command: user errors are one line and status 2, tracebacks need `--debug`."""
    # Idle OpenMP threads must sleep: spinning ones compete for the cores with everything else that runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = sys.argv[1:] or ["--help"]
    debug = "--debug" in arguments
    if arguments == ["--version"]:
        print(f"fastprice {__version__}")
        return
    try:
        arguments = _one_value_each([argument for argument in arguments if argument != "--debug"])
        status = app(arguments, prog_name="fastprice", standalone_mode=False)
    except (FastpriceError, typer.TyperException) as error:
        if debug:
            raise
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(status or 0)


def _one_value_each(arguments: list[str]) -> list[str]:
    """`--text a b` as `--text a --text b`, the only form that click parses."""
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
