"""Which words moved an estimate: what it would have been without them, by occlusion.

Occlusion (Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2014; for words: Li, Monroe and
Jurafsky, "Understanding Neural Networks through Representation Erasure", 2016) takes one span of words out of the text,
asks the model again, and calls the difference the effect of the span:

    effect = estimate(text) - estimate(text without the span)          dollars; above 0: the span raised the price

What it is: the answer of the very model to a question that was really asked; no gradient, no approximation of it. What
it is not: a cause of prices in the world; nor a sum that adds up. Two words that say the same ("road bike, racer") have
next to no effect each, since the other one stays; a word that only means something beside another shares its effect
with it; and a text with a hole may be unlike any that the model was trained on.

Cost: n + 2 estimates for n spans (the text, the empty text, and the text without each of the spans), at most
`SPANS` + 2, in one call of the estimator, so in batches. Each is a short walk of the price trie: about a forward pass.

Only words that the model reads are taken out. Those behind the cut of a long text have no effect, and must not move up
into the room that another one leaves: the text is cut first.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprice.common.plots import check_plot, save_plot
from fastprice.data.cleaning import repair_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.text import Text

__all__ = ["SPANS", "Explanation", "Span", "explain", "spans_of"]

SPANS = 64
SHOWN = 15  # spans in a list or a plot
# A word with the blanks before it; one of more than 24 characters (a script without spaces, a link) is several.
_WORD = re.compile(r"\s*\S{1,24}")
_RAISES, _LOWERS = "#1a7f37", "#b3261e"


@dataclass(frozen=True, slots=True)
class Span:
    """`text[start:end]` of an explanation, what the estimate is without it, and its effect (all in dollars).

    `share` is the effect over the whole estimate: 0.25 is a quarter of it, -0.5 lowered it by a half of what it is.
    """

    start: int
    end: int
    text: str
    without: float
    effect: float
    share: float


@dataclass(frozen=True)
class Explanation:
    """An estimate and its spans, in the order of the text. Amounts are dollars.

    text      as the model read it: repaired, and cut where it is too long
    estimate  for the whole text, under `loss`; `empty` for a text without a word
    cut       whether the end of the text was cut
    """

    text: str
    estimate: float
    empty: float
    loss: str
    spans: tuple[Span, ...]
    cut: bool

    def ranked(self) -> list[Span]:
        """The spans by the size of their effect, the largest first."""
        return sorted(self.spans, key=lambda span: -abs(span.effect))

    def __str__(self) -> str:
        return str(self.__rich__())

    def __rich__(self) -> Text:
        """The text with its spans in color, and the strongest spans with their dollars; readable without colors."""
        from rich.text import Text

        strongest = max((abs(span.effect) for span in self.spans), default=0.0)
        shown = Text(f"{_dollars(self.estimate)}  (without a text: {_dollars(self.empty)})\n\n")
        for span in self.spans:
            shown.append(self.text[span.start : span.end], style=_style(span.effect, strongest))
        shown.append("\n")
        if self.cut:
            shown.append("(the end of the text was cut: the model does not read it)\n")
        for span in self.ranked()[:SHOWN]:
            shown.append(f"\n{_signed(span.effect):>9}  {span.share:>+7.1%}  ", style=_style(span.effect, strongest))
            shown.append(_one_line(span.text, 60))
        if not self.spans:
            shown.append("\nthe text has no words: nothing moved the estimate")
        return shown

    def plot(self, path: str | Path) -> Path:
        """Writes a bar for each of the strongest spans, in the order of the text, as PNG, SVG or PDF by the ending.

        Raises as fastprice.common.plots.check_plot: ConfigError for another ending or a folder that does not exist.
        """
        target = check_plot(path)
        save_plot(self._figure(), target)
        return target

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure

        chosen = sorted(self.ranked()[:SHOWN], key=lambda span: -span.start)
        figure = Figure(figsize=(8, 1.4 + 0.32 * max(len(chosen), 1)), layout="constrained")
        axes = figure.subplots()
        # Positions and not names: a word may come twice. A "$" would begin a formula.
        bars = axes.barh(
            range(len(chosen)),
            [span.effect for span in chosen],
            color=[_RAISES if span.effect > 0 else _LOWERS for span in chosen],
        )
        axes.bar_label(bars, [_signed(span.effect) for span in chosen], padding=3, fontsize=8, parse_math=False)
        names = [_one_line(span.text, 32) for span in chosen]
        axes.set_yticks(range(len(chosen)), names, fontsize=8, parse_math=False)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.margins(x=0.15)
        axes.set_xlabel("effect on the estimate, dollars")
        title = f"estimate {_dollars(self.estimate)}, without a text {_dollars(self.empty)}"
        axes.set_title(title, fontsize=10, parse_math=False)
        return figure

    def to_html(self) -> str:
        """The text as an HTML fragment, each span on a ground of the color and strength of its effect."""
        strongest = max((abs(span.effect) for span in self.spans), default=0.0) or 1.0
        pieces = []
        for span in self.spans:
            color = "26,127,55" if span.effect > 0 else "179,38,30"
            strength = 0.6 * abs(span.effect) / strongest
            pieces.append(
                f'<span style="background:rgba({color},{strength:.2f})" title="{_signed(span.effect)} '
                f'({span.share:+.1%})">{html.escape(self.text[span.start : span.end])}</span>'
            )
        return (
            f"<p>{_dollars(self.estimate)} (without a text: {_dollars(self.empty)})</p>"
            f'<p style="white-space:pre-wrap">{"".join(pieces)}</p>'
        )


def explain(estimator: Any, text: str, *, loss: str = "mae") -> Explanation:
    """The effect of each word of `text`, or of each of at most `SPANS` runs of words, on a PriceEstimator's estimate.

    loss  what the estimates make small, as in `PriceEstimator.predict`

    Raises NotFittedError, and ConfigError for an unknown loss or an engine that gives no distributions.
    """
    seen, cut = _visible(estimator, repair_text(text))
    places = spans_of(seen)
    variants = [seen, "", *(seen[:start] + seen[end:] for start, end in places)]
    guesses = estimator.guesses(estimator.distributions(estimator.prompts(variants)), loss)
    estimate, empty, *others = (float(guess) for guess in guesses)
    spans = tuple(
        Span(start, end, seen[start:end].strip(), without, estimate - without, (estimate - without) / estimate)
        for (start, end), without in zip(places, others, strict=True)
    )
    return Explanation(seen, estimate, empty, loss, spans, cut)


def spans_of(text: str, most: int = SPANS) -> list[tuple[int, int]]:
    """(start, end) of each word of a text, or of at most `most` runs of as many words; together they are the text."""
    words = [match.span() for match in _WORD.finditer(text)]
    run = -(-len(words) // most) or 1
    groups = [words[at : at + run] for at in range(0, len(words), run)]
    return [(group[0][0], group[-1][1]) for group in groups]


def _visible(estimator: Any, text: str) -> tuple[str, bool]:
    """(The words of a repaired text that the model reads whole, whether there are more)."""

    def fits(count: int) -> bool:
        (prompt,) = estimator.prompts([text[: ends[count - 1]] if count else ""])
        return not prompt.cut

    ends = [match.end() for match in _WORD.finditer(text)]
    if fits(len(ends)):
        return text, False
    low, high = 0, len(ends) - 1  # `low` words fit, more than `high` do not
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return text[: ends[low - 1]] if low else "", True


def _style(effect: float, strongest: float) -> str:
    """Colors for what has at least a tenth of the strongest effect, bold from a half on."""
    size = abs(effect) / strongest if strongest else 0.0
    if size < 0.1:
        return ""
    return ("bold " if size >= 0.5 else "") + ("green" if effect > 0 else "red")


def _dollars(amount: float) -> str:
    return f"${amount:,.0f}"


def _signed(amount: float) -> str:
    return f"{'-' if amount < 0 else '+'}${abs(amount):,.0f}"


def _one_line(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
