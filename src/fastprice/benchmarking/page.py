"""A page of plots for one benchmark result: speeds, ratios, memory over a step, roofline. One HTML file, no script."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprice.benchmarking.analysis import ok_rows, step_groups, summarize_kernels, summarize_steps
from fastprice.benchmarking.cases import MODELS
from fastprice.benchmarking.report import compare, comparison_table, limits_table, markdown, title
from fastprice.benchmarking.static import static_table

__all__ = ["write_page"]

GIB = 2**30
_COLORS = {"fastprice": "#1b6ca8", "peer": "#9aa5b1", "limit": "#c0392b"}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2933 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem }
th, td { border-bottom: 1px solid #d9e2ec; padding: 0.3rem 0.8rem; text-align: left }
.cpu { background: #fff3cd; padding: 0.6rem 1rem; border-left: 4px solid #f0b429 }
img { max-width: 100% }
"""


def write_page(
    result: Mapping[str, Any],
    out: Path,
    before: Mapping[str, Any] | None = None,
    static: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes the page of `result` to `out`, with what changed since `before` where that is given; returns `out`.

    static: rows of `static.read_static`, for the table of what the compiler says of the kernels.
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
        ("Training speed", _speed_plot),
        ("How many times as fast as each peer", _ratio_plot),
        ("Memory over a training step", _memory_plot),
        ("Kernels against the machine's limits", _roofline_plot),
    ):
        image = _image(draw, result)
        if image:
            parts.append(f"<h2>{heading}</h2>{image}")
    if before is not None:
        parts.append(f"<h2>Since {html.escape(title(before))}</h2>" + _table(comparison_table(compare(before, result))))
    if static:
        parts.append("<h2>The kernels' machine code (read off, not measured)</h2>" + _table(static_table(static)))
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


def _image(draw: Callable[[Any, Mapping[str, Any]], bool], result: Mapping[str, Any]) -> str:
    """An SVG by `draw`, which says whether there was anything to draw; empty where there was not."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    if not draw(figure, result):
        return ""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return f'<img alt="" src="data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _is_ours(peer: str) -> bool:
    return peer in ("peft", "peft-graphs", "peft-off", "unsloth-kernels") or peer.startswith("fastprice")


def _speed_plot(figure: Any, result: Mapping[str, Any]) -> bool:
    entries = [entry for entry in summarize_steps(result["rows"], result["limits"]) if entry["ok"]]
    if not entries:
        return False
    axes = figure.subplots()
    names = [f"{entry['model']}, {entry['tokens']}: {entry['peer']}" for entry in entries]
    middles = [entry["tokens_per_second"] for entry in entries]
    reach = [
        [middle - entry["rates"][0] for middle, entry in zip(middles, entries, strict=True)],
        [entry["rates"][-1] - middle for middle, entry in zip(middles, entries, strict=True)],
    ]
    colors = [_COLORS["fastprice" if _is_ours(entry["peer"]) else "peer"] for entry in entries]
    axes.barh(names, middles, xerr=reach, color=colors)
    axes.set_xlabel("real tokens a second (bar: median of rounds, line: slowest to fastest)")
    return True


def _ratio_plot(figure: Any, result: Mapping[str, Any]) -> bool:
    """A bar for each peer of the training steps and of each kernel; its line spans rounds, or a kernel's cases."""
    bars = [
        (f"{entry['model']}, {entry['tokens']}: {entry['peer']}", *(entry["ratio"][k] for k in ("low", "mid", "high")))
        for entry in summarize_steps(result["rows"], result["limits"])
        if entry["ratio"]
    ]
    bars += [
        (f"{each['family']}: {each['peer']}", each["smallest"], each["mean"], each["largest"])
        for each in summarize_kernels(result["rows"])
    ]
    if not bars:
        return False
    names, lows, middles, highs = zip(*bars, strict=True)
    axes = figure.subplots()
    reach = [
        [middle - low for low, middle in zip(lows, middles, strict=True)],
        [high - middle for high, middle in zip(highs, middles, strict=True)],
    ]
    axes.barh(names, middles, xerr=reach, color=_COLORS["fastprice"])
    axes.axvline(1.0, color=_COLORS["limit"])
    axes.set_xlabel("speed of fastprice over the peer's (line: all rounds, or all cases of a kernel)")
    return True


def _memory_plot(figure: Any, result: Mapping[str, Any]) -> bool:
    """The allocator over one step of each peer, for the first group that has such curves."""
    for (model, tokens, _, _), peers in step_groups(result["rows"]).items():
        curves = {peer: rounds[0]["memory_curve"] for peer, rounds in peers.items() if rounds[0]["memory_curve"]}
        if not curves:
            continue
        axes = figure.subplots()
        for peer, curve in curves.items():
            shares, sizes = zip(*curve, strict=True)
            axes.plot(shares, [size / GIB for size in sizes], label=peer, linewidth=2 if _is_ours(peer) else 1)
        axes.set_title(f"{model}, {tokens} tokens")
        axes.set_xlabel("share of the step (forward and backward, in the host's time)")
        axes.set_ylabel("GiB allocated")
        axes.set_ylim(bottom=0)
        axes.legend()
        return True
    return False


def _roofline_plot(figure: Any, result: Mapping[str, Any]) -> bool:
    limits, rows = result["limits"], ok_rows(result["rows"], "kernels")
    points = [row for row in rows if row["flops"]]
    if not points or not limits:
        return False
    axes = figure.subplots()
    intensity = [row["flops"] / row["bytes_moved"] for row in points]
    reach = [min(intensity) / 4, max(intensity) * 4]
    ridge = limits["matmul_flops"] / limits["copy_bytes_per_second"]
    line = sorted({*reach, min(max(ridge, reach[0]), reach[1])})
    roof = [min(limits["matmul_flops"], each * limits["copy_bytes_per_second"]) / 1e12 for each in line]
    axes.plot(line, roof, color=_COLORS["limit"], label="measured limits")
    for name, color in (("fastprice", _COLORS["fastprice"]), ("the best peer", _COLORS["peer"])):
        rates = [row["flops"] / _seconds(row, name) / 1e12 for row in points]
        axes.scatter(intensity, rates, label=name, color=color)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP a byte, at the least bytes the work needs")
    axes.set_ylabel("TFLOP/s")
    axes.legend()
    return True


def _seconds(row: Mapping[str, Any], name: str) -> float:
    times: Mapping[str, Any] = row["seconds"]
    if name == "fastprice":
        return float(times["fastprice"]["p50"])
    peers: Sequence[float] = [each["p50"] for peer, each in times.items() if not peer.startswith("fastprice")]
    return min(peers, default=float("nan"))
