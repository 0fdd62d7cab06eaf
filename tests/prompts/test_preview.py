"""What `fastprice inspect` prints: every character as it is, the labeled tokens in color."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fastprice.data.items import Item
from fastprice.errors import TrainingError
from fastprice.models.base_models import load_tokenizer
from fastprice.prompts.preview import inspect_items
from fastprice.prompts.template import encode_row

TEXT = "Café table – 100 € 🚲 non‑slip 木 ñandú"


def preview(text: str, *, max_tokens: int = 256, color: bool = False) -> str:
    screen = io.StringIO()
    console = Console(file=screen, width=200, force_terminal=color, color_system="truecolor" if color else None)
    inspect_items(load_tokenizer("nano"), [Item(text, 129.0)], max_tokens, console)
    return screen.getvalue()


def test_characters_of_several_tokens_are_shown_whole() -> None:
    tokenizer = load_tokenizer("nano")
    assert len(tokenizer("🚲", add_special_tokens=False)["input_ids"]) > 1  # or this test shows nothing
    shown = preview(TEXT)
    assert TEXT in shown
    assert "\ufffd" not in shown


def test_labeled_tokens_alone_are_in_the_color_of_labels() -> None:
    tokenizer = load_tokenizer("nano")
    shown = preview(TEXT, color=True)
    labeled = "".join(part.split("\x1b[0m")[0] for part in shown.split("\x1b[1;30;42m")[1:])
    assert labeled == f"129{tokenizer.eos_token}"


def test_a_text_truncated_within_a_character_keeps_its_answer_apart() -> None:
    tokenizer = load_tokenizer("nano")
    row = encode_row(tokenizer, Item("🚲" * 20, 129.0), 41)
    assert row.cut
    shown = preview("🚲" * 20, max_tokens=41)
    assert "Price is $129" in shown
    assert "truncated by" in shown


def test_counts_are_of_tokens() -> None:
    tokenizer = load_tokenizer("nano")
    row = encode_row(tokenizer, Item(TEXT, 129.0), 256)
    labeled = len(row.labels) - row.labels.count(-100)
    assert f"1 items, {len(row.ids)} tokens, {labeled} of them labeled" in preview(TEXT)


def test_no_items_are_refused() -> None:
    with pytest.raises(TrainingError, match="no token is labeled"):
        inspect_items(load_tokenizer("nano"), [], 64, Console(file=io.StringIO()))
