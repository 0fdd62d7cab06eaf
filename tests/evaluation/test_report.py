"""The report: self-contained, written completely or not at all, harmless with any text; charts are in test_charts.py.

Its rendering is tested in a real browser (Chromium) where there is one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tests.evaluation.pages import HOSTILE, Page, charts, evaluation, written

from fastprice.data.items import Item
from fastprice.errors import DataError
from fastprice.evaluation.evaluate import Evaluation, evaluate_models

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_all_parts_of_the_page_are_there(measured: Evaluation, html: str) -> None:
    page = Page(html)
    tuned = measured.results[0]
    for words in (
        "Prices of things",
        "Measured on 60 items held out from training.",
        f"${tuned.scores.mae:.2f} off on average",
        "below that of “constant”, the best of the others",
        "a note to the reader",
        "12,345",
        "rejected: no price",
        "lora.targets",
        "['q', 'v']",
        "Median speed: 5,400 tokens a second.",
        "lowest at step 100 with $48.50",
        "The 10 largest errors",
    ):
        assert words in page.text, words
    for row in measured.cells():
        for text, _ in row:
            assert text in page.text
    assert len(charts(html)) == 1 + 2 + 1 + 1  # the tuned scatter, two small ones, bands, curves


def test_the_largest_errors_come_first_with_their_rows(measured: Evaluation, html: str) -> None:
    table = html[html.index("The 10 largest errors") :]
    rows = [int(row) for row in re.findall(r'<td class="number">(\d+)</td><td class="item">', table)]
    errors = np.abs(measured.results[0].guesses - measured.truths)
    assert [row - 2 for row in rows] == np.argsort(-errors)[:10].tolist()
    assert "product" in table
    assert f"product {rows[0] - 2} · size {(rows[0] - 2) % 7}" in table


def test_nothing_is_loaded_and_nothing_can_run(tmp_path: Path) -> None:
    html = written(tmp_path / "report.html", evaluation(hostile=True))
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "src"], tag
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), tag
    assert "url(http" not in html
    assert "@import" not in html
    (policy,) = (meta["content"] for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_hostile_texts_are_shown_literally(tmp_path: Path) -> None:
    measured = evaluation(hostile=True)
    html = written(
        tmp_path / "report.html",
        measured,
        title=HOSTILE,
        notes=[HOSTILE],
        settings={HOSTILE: HOSTILE},
        counts={HOSTILE: 1},
    )
    text = Page(html).text
    assert text.count(HOSTILE) >= 6
    assert "$a_b$" in text
    assert "<script" not in html


def test_long_texts_are_shortened(tmp_path: Path) -> None:
    items = [Item("long " * 5_000, 10.0, None, 2), Item("short", 20.0)]
    measured = evaluate_models({"m": lambda texts: [1000.0, 20.0]}, items, resamples=5)
    html = written(tmp_path / "report.html", measured)
    assert html.count("long ") < 60
    assert len(html) < 100_000


def test_no_identifier_twice(html: str) -> None:
    """Clip paths of the same shape have the same name and mean the same; nothing else may repeat."""
    page = Page(html)
    identifiers = [
        attributes["id"] for tag, attributes in page.tags if "id" in attributes and tag not in ("clippath", "path")
    ]
    assert len(identifiers) == len(set(identifiers))


def test_the_summary_says_when_the_model_is_worse_or_no_better(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    items = [Item("x", float(price)) for price in random.lognormal(4, 1, 80)]
    truths = np.array([item.price for item in items])
    worse = evaluate_models(
        {"rival": lambda texts: truths + 1, "tuned": lambda texts: truths + 30}, items, resamples=20
    )
    assert "is $29.00 ($29.00 to $29.00) above that of “rival”" in written(tmp_path / "a.html", worse, focus="tuned")
    noise = random.permutation(np.tile([1.0, 2.0], 40))
    equal = evaluate_models(
        {"rival": lambda texts: truths + noise, "tuned": lambda texts: truths + 3 - noise}, items, resamples=20
    )
    assert "too few to distinguish its mean error from that of “rival”" in written(
        tmp_path / "b.html", equal, focus="tuned"
    )


def test_the_focus_is_the_last_model_unless_given(tmp_path: Path, measured: Evaluation) -> None:
    assert "The estimates of “model 2” are" in written(tmp_path / "report.html", measured, focus=None)
    with pytest.raises(DataError, match="no model is called 'absent': the evaluation has tuned, constant, model 2"):
        written(tmp_path / "report.html", measured, focus="absent")


def test_the_same_measurements_give_the_same_bytes(tmp_path: Path, measured: Evaluation, html: str) -> None:
    assert written(tmp_path / "again.html", measured) == html


def test_it_is_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "folders" / "report.html"
    written(path, evaluation(20))
    before = path.read_bytes()

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_disk)
        with pytest.raises(DataError, match=r"cannot write the report: No space left on device") as caught:
            written(path, evaluation(30))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write the report"):
        written(tmp_path / "file" / "report.html", evaluation(20))


def test_an_evaluation_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no model was evaluated"):
        written(tmp_path / "report.html", Evaluation([Item("a", 1.0)], np.array([1.0]), []))
    assert not list(tmp_path.iterdir())


def browse(page: Path, profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars "
        "--disable-component-update --disable-sync --disable-quic --disable-dev-shm-usage"
    )
    return subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", *arguments, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_it_and_runs_nothing(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    written(report, evaluation(hostile=True), title="Honest title", notes=[HOSTILE])
    page = Page(browse(report, tmp_path / "profile", "--dump-dom").stdout)
    assert "Honest title" in page.text
    assert HOSTILE in page.text
    assert not page.named("script")
    assert not page.named("img")
    assert len(page.named("svg")) == 5
    assert len(page.named("table")) == 5


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_the_dots_and_bars_in_the_colors_of_the_page(tmp_path: Path) -> None:
    from matplotlib.image import imread

    report, picture = tmp_path / "report.html", tmp_path / "page.png"
    written(report, evaluation(300))
    browse(report, tmp_path / "profile", f"--screenshot={picture}", "--window-size=900,3600")
    pixels = np.round(imread(picture)[:, :, :3] * 255).astype(int)
    assert pixels.shape == (3600, 900, 3)
    for color in ("fdfdfb", "1f5fa6", "cf7a2e", "e9eef3"):  # paper, the tuned model, the next one, the band of hits
        wanted = [int(color[at : at + 2], 16) for at in (0, 2, 4)]
        assert (np.abs(pixels - wanted).max(axis=2) <= 2).sum() > 1_000, color
