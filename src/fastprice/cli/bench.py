"""`bench`: the benchmarks on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bench_app = typer.Typer(help="Measure this machine: kernels, training steps, memory.")


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Under three minutes; ends with a line to paste.")] = False,
    minutes: Annotated[float, typer.Option(help="Time for the whole suite.")] = 9.0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for result files.")] = Path("benchmarks/results"),
) -> None:
    """Run the benchmarks; on a machine without a GPU they run the nano model and say CPU."""
    if context.invoked_subcommand is not None:
        return
    from fastprice import benchmarking as benchmarks

    if quick:
        print(benchmarks.quick(out))
    else:
        print(f"results: {benchmarks.full(out, minutes=minutes)}")


@bench_app.command("report")
def bench_report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of result files.")] = Path("benchmarks/results"),
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Page with plots to write.")] = None,
) -> None:
    """Tables of the newest result, compared with the one before it, and a page with plots."""
    from fastprice import benchmarking as benchmarks

    print(benchmarks.write_report(folder, out))
