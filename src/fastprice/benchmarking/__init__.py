"""Benchmarks that people can run and believe; behind `fastprice bench`.

    quick(out)            under three minutes on any CUDA card; returns one line to paste
    full(out, ...)        all stages (suite.py) in a number of minutes; returns the result file
    write_report(folder, out)   tables and a page from result files; returns the Markdown

A result is one JSON file, `<device>-<date>-<commit>.json`, that is never overwritten. Without a GPU the same code runs
the nano model, and everything it writes says CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

__all__ = ["full", "quick", "write_report"]


def quick(out: Path, *, minutes: float = 2.8) -> str:
    """Measures what matters in less than three minutes; writes a result file to `out`; returns the line to paste."""
    import torch

    from fastprice.benchmarking.report import load_result, paste_line
    from fastprice.benchmarking.suite import Plan, run_suite

    if torch.cuda.is_available():
        plan = Plan.quick(_memory_of_gpu())
    else:
        plan = replace(Plan.for_cpu(), peers=("peft", "trl-packed"), families=("dequantize",))
    path = run_suite(out, minutes=minutes, plan=plan, stages=("kernels", "steps"))
    return paste_line(load_result(path))


def full(
    out: Path,
    *,
    minutes: float = 9.0,
    models: Sequence[str] = ("llama-3.2-1b", "llama-3.1-8b"),
    stages: Sequence[str] | None = None,
) -> Path:
    """Runs every stage, or `stages`, within `minutes`; returns the result file in `out`. ConfigError: unknown names."""
    import torch

    from fastprice.benchmarking.cases import shape_of
    from fastprice.benchmarking.suite import Plan, run_suite

    for model in models:
        shape_of(model)
    plan = Plan(models=tuple(models)) if torch.cuda.is_available() else Plan.for_cpu()
    return run_suite(out, minutes=minutes, plan=plan, stages=stages)


def write_report(folder: Path, out: Path | None = None) -> str:
    """The newest result in `folder` as Markdown, compared with the one before it of the same device.

    Writes the page with plots to `out` (default: `report.html` in `folder`), with the kernels' static figures where
    there is a static.json beside the folder. DataError where there are no results.
    """
    from fastprice.benchmarking.page import write_page
    from fastprice.benchmarking.report import compare, comparison_table, find_results, load_result, markdown
    from fastprice.benchmarking.static import read_static

    results = [load_result(path) for path in find_results(folder)]
    newest = results[-1]
    same = [result for result in results[:-1] if result["environment"]["device"] == newest["environment"]["device"]]
    before = same[-1] if same else None
    static = folder.parent / "static.json"
    write_page(newest, out or folder / "report.html", before, read_static(static)[1] if static.is_file() else ())
    text = markdown(newest)
    if before is not None:
        text += f"\nSince {before['environment']['time'][:10]}, commit {before['environment']['commit']}:\n\n"
        text += comparison_table(compare(before, newest)) + "\n"
    return text


def _memory_of_gpu() -> int:
    """Bytes of the first GPU, by nvidia-smi, so that this process takes no piece of it; 0 where that is silent."""
    from fastprice.benchmarking.environment import gpu_state

    told = gpu_state().get("memory.total", "0 MiB").split()[0]
    return int(told) * 2**20 if told.isdigit() else 0
