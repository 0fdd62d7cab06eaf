"""A preview of what the model will read: prompts as tokens, the labeled ones in color, before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastprice.data.items import Item
from fastprice.errors import TrainingError
from fastprice.prompts.template import IGNORE, TEXT, AnswerFormat, TrainingRow, encode_rows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["inspect_items"]

_SHADES = ("", "on grey15")  # neighboring tokens alternate, so that token boundaries show
_LABELED = "bold black on green"
_INCOMPLETE = "\ufffd"  # decoders write it for the first bytes of a character whose other bytes are still to come


def inspect_items(
    tokenizer: Any,
    items: Sequence[Item],
    max_tokens: int,
    console: Console,
    *,
    form: AnswerFormat = TEXT,
    examples: int = 3,
) -> None:
    """Prints the first `examples` items as the model reads them, and the share of labeled tokens among all.

    Raises TrainingError when no token of any item is labeled: such a run would learn nothing.
    """
    rows = encode_rows(tokenizer, items, max_tokens, form)
    total = sum(len(row.ids) for row in rows)
    labeled = sum(label != IGNORE for row in rows for label in row.labels)
    for number, (item, row) in enumerate(zip(items[:examples], rows, strict=False), 1):
        in_row = sum(label != IGNORE for label in row.labels)
        where = "" if item.row is None else f", row {item.row}"
        cut = f", text truncated by {row.cut} or more tokens" if row.cut else ""
        console.rule(f"example {number}{where}: {len(row.ids)} tokens, {in_row} labeled{cut}", align="left")
        console.print(_colored(tokenizer, row))
    console.rule()
    cut_rows = sum(row.cut > 0 for row in rows)
    console.print(
        f"{len(rows):,} items, {total:,} tokens, {labeled:,} of them labeled (in the completion-only loss: "
        f"{100 * labeled / max(total, 1):.1f} %); {cut_rows:,} texts are truncated at {max_tokens} tokens"
    )
    if labeled == 0:
        raise TrainingError("no token is labeled, so nothing would be learned; check the prices and the tokenizer")


def _colored(tokenizer: Any, row: TrainingRow) -> Text:
    from rich.text import Text

    """The row as text. Tokens that share a character (é may be two, an emoji four) are decoded and colored as one."""
    text = Text()
    printed = 0
    for position, label in enumerate(row.labels):
        # A token alone may decode to less than it does in place (SentencePiece drops a leading space).
        decoded: str = tokenizer.decode(row.ids[: position + 1])
        labels_change = (label == IGNORE) != (row.labels[min(position + 1, len(row.ids) - 1)] == IGNORE)
        if decoded.endswith(_INCOMPLETE) and position + 1 < len(row.ids) and not labels_change:
            continue
        text.append(decoded[printed:], style=_SHADES[position % 2] if label == IGNORE else _LABELED)
        printed = len(decoded)
    return text
