"""The report of a folder of results: Markdown tables, and a page with plots (one HTML file without scripts)."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprice.benchmarking.reporting.plots import memory_plot, ratio_plot, roofline_plot, speed_plot
from fastprice.benchmarking.reporting.results import Result, compare, find_results, load_result
from fastprice.benchmarking.reporting.tables import comparison_table, limits_table, markdown, title
from fastprice.benchmarking.static_figures import read_static, static_table
from fastprice.benchmarking.workload import MODELS

__all__ = ["write_page", "write_report"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2933 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem }
th, td { border-bottom: 1px solid #d9e2ec; padding: 0.3rem 0.8rem; text-align: left }
.cpu { background: #fff3cd; padding: 0.6rem 1rem; border-left: 4px solid #f0b429 }
img { max-width: 100% }
"""


def write_report(folder: Path, page: Path | None = None) -> tuple[str, Path]:
    """The newest result in `folder` as Markdown, compared with the one before it of the same device; and the page.

    page: where to write it, `report.html` in `folder` by default; it has the kernels' static figures where a
    static.json lies beside the folder. Raises DataError where there are no results.
    """
    results = [load_result(path) for path in find_results(folder)]
    newest = results[-1]
    same = [result for result in results[:-1] if result["environment"]["device"] == newest["environment"]["device"]]
    before = same[-1] if same else None
    static = folder.parent / "static.json"
    page = page or folder / "report.html"
    write_page(newest, page, before, read_static(static)[1] if static.is_file() else ())
    text = markdown(newest)
    if before is not None:
        text += f"\nSince {before['environment']['time'][:10]}, commit {before['environment']['commit']}:\n\n"
        text += comparison_table(compare(before, newest)) + "\n"
    return text, page


def write_page(
    result: Result,
    out: Path,
    before: Result | None = None,
    static: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes the page of `result` to `out`, with what changed since `before` where that is given; returns `out`.

    static: rows of `static_figures.read_static`, for the table of the kernels' machine code.
    """
    about = result["environment"]
    parts = [f"<h1>fastprice benchmarks</h1><p>{html.escape(title(result))}</p>"]
    if about["kind"] != "gpu":
        parts.append(
            '<p class="cpu">Measured on a CPU, where the same code runs the nano model to be tested. '
            "Nothing on this page says how fast fastprice is on a GPU.</p>"
        )
    parts += [_table(block) for block in markdown(result).split("\n\n")[1:]]
    for heading, draw in (
        ("Training speed", speed_plot),
        ("How many times as fast as each peer", ratio_plot),
        ("Memory over a training step", memory_plot),
        ("Kernels against the machine's limits", roofline_plot),
    ):
        image = _image(draw, result)
        if image:
            parts.append(f"<h2>{heading}</h2>{image}")
    if before is not None:
        parts.append(f"<h2>Since {html.escape(title(before))}</h2>" + _table(comparison_table(compare(before, result))))
    if static:
        parts.append("<h2>The kernels' machine code (compiled, not measured)</h2>" + _table(static_table(static)))
    parts.append("<h2>Arithmetic limits (not measured)</h2>")
    parts.append(_table(limits_table([model for model in MODELS if model != "nano"])))
    head = f"<meta charset='utf-8'><title>fastprice benchmarks</title><style>{_STYLE}</style>"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n", "utf-8")
    return out


def _table(block: str) -> str:
    """A Markdown table or paragraph, as this project writes them, in HTML."""
    lines = block.strip().splitlines()
    if not lines or not lines[0].startswith("|"):
        return f"<p>{html.escape(block.strip())}</p>"
    rows = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
    head = "".join(f"<th>{cell}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows[2:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _image(draw: Callable[[Any, Result], bool], result: Result) -> str:
    """The SVG that `draw` makes as an <img>; empty where it has nothing to draw."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    if not draw(figure, result):
        return ""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return f'<img alt="" src="data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
