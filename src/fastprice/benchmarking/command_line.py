"""The one front end of the benchmarks: `fastprice bench` and `python -m fastprice.benchmarking`.

It is argparse, so that it runs on a machine that has only what training needs (no typer, rich, polars), and `fastprice
bench` hands its arguments on to it, so that every option is declared here alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fastprice.errors import ConfigError

if TYPE_CHECKING:
    from fastprice.benchmarking.suite_plan import SuitePlan

__all__ = ["main"]

_RESULTS = Path("benchmarks/results")
_STATIC = Path("benchmarks/static.json")
_TRAFFIC = Path("benchmarks/traffic.json")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def main(arguments: Sequence[str], prog: str = "fastprice bench") -> int:
    """Runs what `arguments` say; returns the exit status. ConfigError and DataError for what the user can correct.

    prog: the name that the help texts show.
    """
    options = _parser(prog).parse_args(arguments)
    if options.command == "report":
        from fastprice.benchmarking.reporting.page import write_report

        text, page = write_report(options.folder, options.page)
        print(f"{text}\nreport: {page}")
        return 0
    if options.command == "static":
        from fastprice.benchmarking.static_figures import check_static, update_static

        return check_static(options.file) if options.check else update_static(options.file)
    if options.command == "traffic":
        from fastprice.benchmarking.traffic import check_traffic, update_traffic, where_table

        if options.where:
            print(where_table(options.where))
            return 0
        if options.page:
            from fastprice.benchmarking.step_times import step_time_page

            options.page.write_text(step_time_page(options.file), encoding="utf-8")
            return 0
        return check_traffic(options.file) if options.check else update_traffic(options.file)
    if options.command == "host":
        from fastprice.benchmarking.host_time import measure_host_time

        print(measure_host_time(rounds=options.host_rounds))
        return 0
    return _run(options)


def _parser(prog: str) -> argparse.ArgumentParser:
    from fastprice.benchmarking.peers import PEERS
    from fastprice.benchmarking.suite import STAGES
    from fastprice.benchmarking.workload import MODELS

    stages = {name: stage.description for name, stage in STAGES.items()}
    peers = {name: peer.description for name, peer in PEERS.items()}
    tables = [
        "\n".join([f"{title}, the most important first:", *(f"  {name:16} {what}" for name, what in table.items())])
        for title, table in (("stages", stages), ("peers", peers))
    ]
    parser = _Parser(
        prog=prog,
        description="Measures this machine: kernels, training steps, memory and prediction beside their peers.\n"
        "Without a GPU a small model runs through the same code, and everything written says CPU.",
        epilog="\n\n".join([*tables, f"models: {', '.join(MODELS)}"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="under three minutes; ends with a line to paste")
    parser.add_argument("--minutes", type=float, metavar="N", help="time for everything (default 9; 2.8 with --quick)")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="DIR", help="result files (default %(default)s)")
    parser.add_argument("--stages", type=_names, metavar="A,B", help="some of the stages (default all)")
    parser.add_argument("--models", type=_names, metavar="A,B", help="the most important first")
    parser.add_argument("--tokens", type=_numbers, metavar="A,B", help="of a pack (default 4096,2048,8192)")
    parser.add_argument("--batch", type=int, metavar="N", help="rows of a padded micro-batch (default 4)")
    parser.add_argument("--rank", type=_numbers, metavar="A,B", help="of the adapters (default 16,32)")
    parser.add_argument("--peers", type=_names, metavar="A,B", help="of the training steps (default all)")
    parser.add_argument("--rounds", type=int, metavar="N", help="of all peers (default 2)")
    parser.add_argument(
        "--tests", type=shlex.split, action="append", default=[], metavar="ARGUMENTS",
        help="first run pytest with these arguments, at most a third of the time; its counts go into the "
        "result; may be repeated",
    )  # fmt: skip
    parser.add_argument("--commit", metavar="ID", help="for the record, where the checkout has no .git")
    parser.add_argument("--cpu", action="store_true", help="the CPU, even where there is a GPU")

    commands = parser.add_subparsers(dest="command", metavar="{report,static,traffic,host}")
    report = commands.add_parser("report", help="tables and a page of plots from the newest result")
    report.add_argument("folder", type=Path, nargs="?", default=_RESULTS, metavar="DIR", help="default %(default)s")
    report.add_argument("--out", type=Path, dest="page", metavar="FILE", help="the page (default report.html in DIR)")
    static = commands.add_parser("static", help="the kernels' machine code, compiled without a GPU")
    static.add_argument("file", type=Path, nargs="?", default=_STATIC, metavar="FILE", help="default %(default)s")
    host = commands.add_parser("host", help="the host's time for a layer, kernels stubbed, beside stock PEFT")
    host.add_argument("--rounds", type=int, dest="host_rounds", default=40, metavar="N", help="default %(default)s")
    static.add_argument("--check", action="store_true", help="compare with FILE instead of writing it")
    traffic = commands.add_parser("traffic", help="launches and bytes of a layer in training, counted without a GPU")
    traffic.add_argument("file", type=Path, nargs="?", default=_TRAFFIC, metavar="FILE", help="default %(default)s")
    traffic.add_argument("--check", action="store_true", help="compare with FILE and the bars instead of writing it")
    traffic.add_argument("--where", metavar="MODEL", help="only list the lines that issue a layer's eager launches")
    traffic.add_argument("--page", type=Path, metavar="PAGE", help="only write the table of step times from FILE")
    return parser


def _run(options: argparse.Namespace) -> int:
    from fastprice.benchmarking.reporting.results import load_result
    from fastprice.benchmarking.reporting.tables import paste_line, short_table
    from fastprice.benchmarking.suite import run_suite

    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the workers too
    path = run_suite(
        options.out,
        minutes=(2.8 if options.quick else 9.0) if options.minutes is None else options.minutes,
        plan=_plan(options),
        stages=("headline", "kernels") if options.quick and options.stages is None else options.stages,
        tests=options.tests,
        commit=options.commit,
    )
    result = load_result(path)
    print(f"\n{paste_line(result) if options.quick else short_table(result)}\nresults: {path}")
    return 0


def _plan(options: argparse.Namespace) -> SuitePlan:
    import torch

    from fastprice.benchmarking.environment import gpu_memory_bytes
    from fastprice.benchmarking.suite_plan import SuitePlan

    if options.cpu or not torch.cuda.is_available():
        plan = SuitePlan.for_cpu()
        if options.quick:
            plan = replace(plan, peers=("peft", "trl-packed"), kernel_families=("dequantize",))
    elif options.quick:
        plan = SuitePlan.quick(gpu_memory_bytes())
    else:
        plan = SuitePlan.full(gpu_memory_bytes())
    chosen = {
        name: value for name in ("models", "batch", "peers", "rounds") if (value := getattr(options, name)) is not None
    }
    if options.tokens or options.rank:
        tokens, ranks = options.tokens or [plan.tokens], options.rank or [plan.rank]
        chosen |= {
            "tokens": tokens[0],
            "rank": ranks[0],
            "variants": [(each, ranks[0]) for each in tokens[1:]] + [(tokens[0], each) for each in ranks[1:]],
        }
    return replace(plan, **chosen)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, such as 4096,2048") from None
