"""Plots as files: PNG, SVG or PDF by the ending. What is drawn stands beside what is shown."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastprice.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_plot", "save_plot"]

ENDINGS = (".png", ".svg", ".pdf")


def check_plot(path: str | os.PathLike[str]) -> Path:
    """`path`, where a plot can be written to it; call it before the work whose result is plotted.

    Raises ConfigError for another ending, a folder in its place or one that is not there, MissingDependencyError
    without matplotlib.
    """
    target = Path(path)
    if target.suffix.lower() not in ENDINGS:
        raise ConfigError(f"plot {target}: the ending must be one of {', '.join(ENDINGS)}")
    if target.is_dir():
        raise ConfigError(f"plot {target}: is a folder; name a file in it")
    if not target.parent.is_dir():
        raise ConfigError(f"plot {target}: the folder {target.parent} does not exist; make it, or name another")
    if find_spec("matplotlib") is None:
        raise MissingDependencyError(f"plot {target}: needs matplotlib: pip install matplotlib, or leave the plot out")
    return target


def save_plot(figure: Figure, target: Path) -> None:
    """Writes `figure` to a path that `check_plot` passed; ConfigError when the file cannot be written."""
    from matplotlib import rc_context

    # No date and no random names of parts: what is drawn alike is the same file.
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(target.suffix.lower())
    try:
        with warnings.catch_warnings(), rc_context({"svg.hashsalt": "fastprice"}):
            # matplotlib's own font has no letters of some scripts, and draws boxes for them.
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            figure.savefig(target, dpi=150, metadata=metadata)
    except OSError as error:
        raise ConfigError(f"plot {target}: cannot be written: {error.strerror}; name another place") from error
