"""What the model will see: prompts as tokens, those that carry loss in color, before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastprice.data.items import Item
from fastprice.errors import TrainingError
from fastprice.prompts.template import IGNORE, TEXT, Form, TrainingRow, encode_rows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["inspect_items"]

_SHADES = ("", "on grey15")  # neighboring tokens alternate, so that their borders show
_LOSS = "bold black on green"


def inspect_items(
    tokenizer: Any,
    items: Sequence[Item],
    max_tokens: int,
    console: Console,
    *,
    form: Form = TEXT,
    examples: int = 3,
) -> None:
    """Prints the first `examples` items as the model sees them, and what share of all tokens carries loss.

    Raises TrainingError when no token of any item does: such a run would learn nothing.
    """
    rows = encode_rows(tokenizer, items, max_tokens, form)
    total = sum(len(row.ids) for row in rows)
    labeled = sum(label != IGNORE for row in rows for label in row.labels)
    for number, (item, row) in enumerate(zip(items[:examples], rows, strict=False), 1):
        at_loss = sum(label != IGNORE for label in row.labels)
        where = "" if item.row is None else f", row {item.row}"
        cut = f", {row.cut} or more tokens of its text cut" if row.cut else ""
        console.rule(f"example {number}{where}: {len(row.ids)} tokens, {at_loss} carry loss{cut}", align="left")
        console.print(_colored(tokenizer, row))
    console.rule()
    cut_rows = sum(row.cut > 0 for row in rows)
    console.print(
        f"{len(rows):,} items, {total:,} tokens, {labeled:,} of them carry loss "
        f"({100 * labeled / max(total, 1):.1f} %); {cut_rows:,} texts are cut at {max_tokens} tokens"
    )
    if labeled == 0:
        raise TrainingError("no token carries loss: nothing would be learnt; check the prices and the tokenizer")


def _colored(tokenizer: Any, row: TrainingRow) -> Text:
    from rich.text import Text

    text = Text()
    shown = ""
    for position, label in enumerate(row.labels):
        # A token alone may decode to less than it does in place (SentencePiece drops a leading space).
        whole: str = tokenizer.decode(row.ids[: position + 1])
        text.append(whole[len(shown) :], style=_SHADES[position % 2] if label == IGNORE else _LOSS)
        shown = whole
    return text
