"""The plots of one result: training speed, ratios to peers, memory over a step, kernels under the roofline.

Each draws on a matplotlib figure and returns whether there was anything to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastprice.benchmarking.peers import PEERS
from fastprice.benchmarking.reporting.results import Result
from fastprice.benchmarking.reporting.summaries import ok_rows, step_groups, summarize_kernels, summarize_steps
from fastprice.benchmarking.workload import GIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["memory_plot", "ratio_plot", "roofline_plot", "speed_plot"]

_COLORS = {"fastprice": "#1b6ca8", "peer": "#9aa5b1", "limit": "#c0392b"}


def _is_ours(peer: str) -> bool:
    return PEERS[peer].trainer == "fastprice"


def speed_plot(figure: Figure, result: Result) -> bool:
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


def ratio_plot(figure: Figure, result: Result) -> bool:
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


def memory_plot(figure: Figure, result: Result) -> bool:
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


def roofline_plot(figure: Figure, result: Result) -> bool:
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
