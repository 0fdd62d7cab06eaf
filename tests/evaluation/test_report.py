"""The report: complete, self-contained, written whole or not at all, and harmless whatever the items say.

What a browser makes of it is tested in a real one (Chromium) where there is one.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastprice.data.items import Item
from fastprice.errors import DataError
from fastprice.evaluation.compare import Evaluation, evaluate_all
from fastprice.evaluation.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">{{ 7 * 7 }}</td></table>"
)
CURVES: list[dict[str, float | None]] = [
    *({"step": step, "loss": 3 - step / 50, "tokens_per_second": 5400.0, "eval_mae": None} for step in range(1, 101)),
    {"step": 50, "eval_mae": 61.25},
    {"step": 100, "eval_mae": 48.5},
]


def evaluation(n: int = 60, models: int = 3, hostile: bool = False) -> Evaluation:
    random = np.random.default_rng(0)
    truths = np.round(random.lognormal(4, 1, n), 2)
    items = [
        Item(f"product {index}\nsize {index % 7}", float(truth), None, index + 2) for index, truth in enumerate(truths)
    ]
    if hostile:
        items[0] = Item(f"{HOSTILE} \ud800 \x00 $a_b$", 5000.0, None, 2)
    names = ["tuned", "constant", *(f"model {number}" for number in range(2, models))]
    names = names[:models]
    names[0] = f"tuned {HOSTILE}" if hostile else names[0]
    guesses = [truths * random.lognormal(0, 0.2 + 0.2 * number, n) for number in range(models)]
    return evaluate_all(
        {name: lambda texts, g=g: g for name, g in zip(names, guesses, strict=True)}, items, resamples=50
    )


def written(path: Path, measured: Evaluation, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "title": "Prices of things",
        "evaluation": measured,
        "curves": CURVES,
        "settings": {"base": "nano", "lora": {"r": 16, "targets": ["q", "v"]}, "seed": None},
        "counts": {"read": 12345, "rejected: no price": 45, "train": 900, "test": 60},
        "notes": ["a note to the reader"],
        "focus": measured.results[0].name if measured.results else None,
    }
    assert write_report(path, **{**arguments, **changes}) == path
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def measured() -> Evaluation:
    return evaluation()


@pytest.fixture(scope="module")
def html(measured: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("report") / "report.html", measured)


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of <style>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def charts(html: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html.replace("xlink:", ""), re.DOTALL)]


def test_everything_promised_is_there(measured: Evaluation, html: str) -> None:
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


def test_bands_hold_every_item_once_and_weigh_to_the_mean_error(tmp_path: Path) -> None:
    measured = evaluation(500)
    html = written(tmp_path / "report.html", measured)
    table = html[html.index("The same as numbers") : html.index("<h2>Training")]
    rows = re.findall(
        r'<tr><th scope="row">[^<]*</th><td class="number">([\d,]+)</td><td class="number">\$([\d,.]+)', table
    )
    counts, errors = (np.array([float(row[column].replace(",", "")) for row in rows]) for column in (0, 1))
    assert counts.sum() == 500
    assert (counts >= 25).all()
    assert len(rows) >= 5
    assert (counts * errors).sum() / 500 == pytest.approx(measured.results[0].scores.mae, abs=0.01)


def test_bands_between_cents_are_named_to_the_cent(tmp_path: Path) -> None:
    prices = [0.2, 0.3, 2.0, 2.6, 3.0, 4.0]
    items = [Item("x", price) for price in prices]
    text = Page(written(tmp_path / "r.html", evaluate_all({"m": lambda texts: prices}, items, resamples=5))).text
    for label in ("< $0.25", "$0.25–0.50", "$0.50–2.50", "≥ $2.50"):
        assert label in text


def test_every_item_is_a_dot_in_the_scatter(html: str) -> None:
    assert max(path.get("d", "").count("h0") for path in charts(html)[0].iter("path")) == 60


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


def test_hostile_texts_are_shown_as_they_are(tmp_path: Path) -> None:
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
    measured = evaluate_all({"m": lambda texts: [1000.0, 20.0]}, items, resamples=5)
    html = written(tmp_path / "report.html", measured)
    assert html.count("long ") < 60
    assert len(html) < 100_000


def test_charts_have_texts_for_those_who_cannot_see_them(html: str) -> None:
    for chart in charts(html):
        assert chart.get("role") == "img"
        assert len(chart.get("aria-label", "")) > 40


def test_charts_follow_the_colors_of_the_page(tmp_path: Path) -> None:
    html = written(tmp_path / "report.html", evaluation(20, models=8))
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #\w+", drawn)
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    assert used <= set(re.findall(r"--([\w-]+):", html))
    assert "prefers-color-scheme: dark" in html


def test_no_identifier_twice(html: str) -> None:
    """Clip paths of the same shape have the same name and mean the same; nothing else may repeat."""
    page = Page(html)
    identifiers = [
        attributes["id"] for tag, attributes in page.tags if "id" in attributes and tag not in ("clippath", "path")
    ]
    assert len(identifiers) == len(set(identifiers))


def test_many_items_are_sampled_the_caption_says_so_and_the_file_stays_small(tmp_path: Path) -> None:
    html = written(tmp_path / "report.html", evaluation(4_000, models=6))
    assert "2,000 of 4,000 items, chosen at random." in html
    assert max(path.get("d", "").count("h0") for path in charts(html)[0].iter("path")) == 2_000
    assert len(html.encode()) < 2**19


@pytest.mark.parametrize(
    ("prices", "guesses"),
    [
        ([10.0], [12.0]),
        ([10.0, 10.0, 10.0], [1.0, 10.0, 10.0]),
        ([0.01, 1e6], [0.0, 1e12]),
        ([13.0, 40.0, 20.0], [-5.0, 1e90, 20.0]),
        ([0.1, 0.25, 0.3, 0.7], [0.1, 0.1, 0.1, 0.1]),
    ],
    ids=["one item", "one price", "eight decades", "beyond the axes", "cents"],
)
def test_odd_sets(tmp_path: Path, prices: list[float], guesses: list[float]) -> None:
    items = [Item(f"item {price}", price) for price in prices]
    measured = evaluate_all({"odd": lambda texts: guesses, "exact": lambda texts: prices}, items, resamples=20)
    html = written(tmp_path / "report.html", measured, curves=[], notes=(), counts={}, settings={})
    assert "No loss or validation error was logged." in html
    assert not re.findall(r"[ \d(](?:nan|inf)[ ,.)]", Page(html).text)
    for chart in charts(html):
        assert "nan" not in "".join(path.get("d", "") for path in chart.iter("path"))
        assert [text for text in chart.iter("text") if "$" in (text.text or "")], "an axis without a price"


def test_edge_of_the_scatter_is_declared(tmp_path: Path) -> None:
    measured = evaluate_all({"wild": lambda texts: [1e9, -4.0, 30.0]}, [Item("a", 10.0)] * 3, resamples=5)
    html = written(tmp_path / "report.html", measured)
    assert "On the edge: 3 estimates beyond the axes." in html
    assert html.count("$1e+09") >= 1


@pytest.mark.parametrize(
    ("curves", "panels"),
    [
        ([{"step": 1, "loss": 2.0}], 1),
        ([{"step": 5, "eval_mae": 50.0}], 1),
        ([{"step": 1, "loss": 2.0}, {"step": 1, "eval_mae": 50.0}], 2),
        ([{"step": 1, "loss": math.nan}, {"step": 2, "loss": None}, {"learning_rate": 0.1}], 0),
    ],
)
def test_curves_show_what_was_logged(tmp_path: Path, curves: list[Mapping[str, float | None]], panels: int) -> None:
    html = written(tmp_path / "report.html", evaluation(20, models=1), curves=curves)
    training = html[html.index("<h2>Training") : html.index("largest errors")]
    shown = [name for name in (">training loss", ">validation error") if name in training]
    assert len(shown) == panels
    assert ("No loss or validation error was logged." in training) is (panels == 0)


def test_the_sentence_is_honest_when_the_model_is_worse_or_no_better(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    items = [Item("x", float(price)) for price in random.lognormal(4, 1, 80)]
    truths = np.array([item.price for item in items])
    worse = evaluate_all({"rival": lambda texts: truths + 1, "tuned": lambda texts: truths + 30}, items, resamples=20)
    assert "is $29.00 ($29.00 to $29.00) above that of “rival”" in written(tmp_path / "a.html", worse, focus="tuned")
    noise = random.permutation(np.tile([1.0, 2.0], 40))
    equal = evaluate_all(
        {"rival": lambda texts: truths + noise, "tuned": lambda texts: truths + 3 - noise}, items, resamples=20
    )
    assert "too few to tell its mean error from that of “rival”" in written(tmp_path / "b.html", equal, focus="tuned")


def test_focus_is_the_last_model_unless_named(tmp_path: Path, measured: Evaluation) -> None:
    assert "The estimates of “model 2” are" in written(tmp_path / "report.html", measured, focus=None)
    with pytest.raises(DataError, match="no model is called 'absent': the evaluation has tuned, constant, model 2"):
        written(tmp_path / "report.html", measured, focus="absent")


def test_the_same_measurements_give_the_same_bytes(tmp_path: Path, measured: Evaluation, html: str) -> None:
    assert written(tmp_path / "again.html", measured) == html


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_nothing_measured_is_refused(tmp_path: Path) -> None:
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
