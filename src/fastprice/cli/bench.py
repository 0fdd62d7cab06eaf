"""`bench`: the benchmarks on this machine."""

from __future__ import annotations

import typer

__all__ = ["PASS_ON", "bench"]

# fastprice.benchmarking.command_line declares the options: it also runs where typer is not installed.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench(context: typer.Context) -> None:
    """Measure this machine: kernels, training steps, memory, prediction; `fastprice bench --help` lists the options."""
    from fastprice.benchmarking import main

    raise typer.Exit(main(context.args))
