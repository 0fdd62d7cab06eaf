"""Plots as files: where they may go, and that what cannot be written is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fastprice import ConfigError, FastpriceError
from fastprice.common.plots import check_plot, save_plot
from fastprice.errors import MissingDependencyError


def drawn() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2, 4], "o", label="自転車")
    figure.legend()
    return figure


@pytest.mark.parametrize(("name", "begins"), [("p.png", b"\x89PNG"), ("p.SVG", b"<?xml"), ("p.pdf", b"%PDF")])
def test_what_is_drawn_alike_is_the_same_file(tmp_path: Path, name: str, begins: bytes) -> None:
    target = check_plot(str(tmp_path / name))
    save_plot(drawn(), target)
    first = target.read_bytes()
    assert first.startswith(begins)
    save_plot(drawn(), target)
    assert target.read_bytes() == first


@pytest.mark.parametrize(
    ("name", "part"), [("p.doc", r"\.png, \.svg, \.pdf"), ("p", "ending"), ("no/p.png", "does not exist")]
)
def test_a_place_that_cannot_hold_a_plot_is_refused(tmp_path: Path, name: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        check_plot(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        check_plot(tmp_path / "folder.png")


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        check_plot(tmp_path / "p.png")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full on this system")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "p.svg").symlink_to("/dev/full")
    with pytest.raises(FastpriceError, match=r"p\.svg: cannot be written: No space left"):
        save_plot(drawn(), check_plot(tmp_path / "p.svg"))
