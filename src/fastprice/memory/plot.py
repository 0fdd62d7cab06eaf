"""A plot of GPU memory over a training step by `estimate_memory`: arithmetic, and labeled as such."""

from __future__ import annotations

import os
from pathlib import Path

from fastprice.common.plots import check_plot, save_plot
from fastprice.memory.byte_sizes import GIB
from fastprice.memory.estimate import MemoryEstimate

__all__ = ["plot_memory"]

_COLORS = "tab20"


def plot_memory(estimate: MemoryEstimate, path: str | os.PathLike[str], title: str = "", limit: int = 0) -> Path:
    """Draws a stacked bar for each moment of the step, writes it to `path` (PNG, SVG or PDF by its suffix) and returns
    the path.

    limit   bytes of the GPU, drawn as a line; 0: no line

    Raises ConfigError for another suffix or a folder that does not exist.
    """
    target = check_plot(path)
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    moments = [name for name, _ in estimate.step]
    bottom = [0.0] * len(moments)
    for index, kind in enumerate(estimate.breakdown):
        sizes = [parts[kind] / GIB for _, parts in estimate.step]
        if max(sizes) >= 0.005:
            axes.bar(moments, sizes, 0.6, bottom=bottom, label=kind, color=colormaps[_COLORS](index))
            bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    for place, height in enumerate(bottom):
        axes.text(place, height, f"{height:.1f}", ha="center", va="bottom")
    if limit:
        axes.axhline(limit / GIB, color="#c0392b", linestyle="--", label="the GPU")
    axes.set_ylabel("GiB (arithmetic, not measured)")
    axes.set_ylim(0, 1.1 * max(*bottom, limit / GIB))
    axes.set_title(title)
    figure.legend(loc="outside right upper", fontsize="small")
    save_plot(figure, target)
    return target
