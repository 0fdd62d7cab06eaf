"""Evaluations to report on, reports of them, and what tests read off the pages."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from fastprice.data.items import Item
from fastprice.evaluation.evaluate import Evaluation, evaluate_models
from fastprice.evaluation.report import write_report

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
    return evaluate_models(
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
