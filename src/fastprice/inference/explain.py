"""Explanation of an estimate by occlusion: what it would be without each word of the text.

Occlusion (Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2014; for words: Li, Monroe and
Jurafsky, "Understanding Neural Networks through Representation Erasure", 2016) removes one span of words from the text,
estimates again, and takes the difference as the effect of the span in dollars: the estimate of the text less that of
the text without the span. It uses the model itself, no gradient or approximation of it. But effects are no causes of
prices in the world, and they do not add up: of two words with the same meaning, each has next to no effect, since the
other one stays; and a text without a word may be unlike any that the model was trained on.

It takes n + 2 estimates for n spans (the text, the empty text, the text without each span), at most `SPANS` + 2, in one
call of the estimator and so in batches; each is about a forward pass. A text that is too long is cut first: words that
the model does not read must not move up when another one is removed.
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

SPANS = 64  # of a text, at most
_LISTED = 15  # spans in a list or a plot
# A word with the blanks before it; one of more than 24 characters (a script without spaces, a link) is split.
_WORD = re.compile(r"\s*\S{1,24}")
_RAISES, _LOWERS = "#1a7f37", "#b3261e"


@dataclass(frozen=True, slots=True)
class Span:
    """A run of words of an explained text, and its effect on the estimate.

    Attributes:
        start: index of its first character in `Explanation.text`; `end`: the index after its last one.
        end: see `start`.
        text: its words, without blanks around them.
        without: the estimate for the text without it, dollars.
        effect: the estimate for the whole text less `without`, dollars; above 0 where the span raised the estimate.
        share: `effect` over the estimate for the whole text: 0.25 is a quarter of it.
    """

    start: int
    end: int
    text: str
    without: float
    effect: float
    share: float


@dataclass(frozen=True)
class Explanation:
    """The effect of each word of a text on its estimate, as `PriceEstimator.explain` returns it.

    `print` shows it; a notebook or a page can show `to_html()`.

    Attributes:
        text: as the model read it: repaired, and cut where it is too long.
        estimate: for the whole text, dollars.
        empty: the estimate for a text without a word, dollars.
        criterion: what the estimates minimize.
        spans: the words, or runs of words, in the order of the text; together they are the text.
        cut: whether the end of the text was cut.
    """

    text: str
    estimate: float
    empty: float
    criterion: str
    spans: tuple[Span, ...]
    cut: bool

    def ranked(self) -> list[Span]:
        """The spans by the absolute size of their effect, the largest first."""
        return sorted(self.spans, key=lambda span: -abs(span.effect))

    def __str__(self) -> str:
        return str(self.__rich__())

    def __rich__(self) -> Text:
        """The text with its spans in color, and a list of the strongest spans; readable without colors."""
        from rich.text import Text

        strongest = max((abs(span.effect) for span in self.spans), default=0.0)
        page = Text(f"{_dollars(self.estimate)}  (without a text: {_dollars(self.empty)})\n\n")
        for span in self.spans:
            page.append(self.text[span.start : span.end], style=_style(span.effect, strongest))
        page.append("\n")
        if self.cut:
            page.append("(the end of the text was cut: the model does not read it)\n")
        for span in self.ranked()[:_LISTED]:
            page.append(f"\n{_signed(span.effect):>9}  {span.share:>+7.1%}  ", style=_style(span.effect, strongest))
            page.append(_one_line(span.text, 60))
        if not self.spans:
            page.append("\nthe text has no words: nothing to remove")
        return page

    def plot(self, path: str | Path) -> Path:
        """Writes a bar chart of the strongest spans, in the order of the text: PNG, SVG or PDF by the ending.

        Raises ConfigError for another ending or a missing folder, MissingDependencyError without matplotlib.
        """
        target = check_plot(path)
        save_plot(self._figure(), target)
        return target

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure

        chosen = sorted(self.ranked()[:_LISTED], key=lambda span: -span.start)
        figure = Figure(figsize=(8, 1.4 + 0.32 * max(len(chosen), 1)), layout="constrained")
        axes = figure.subplots()
        # By position, since a word may occur twice; without math, since a "$" would begin a formula.
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
        """The text as an HTML fragment; the background of a span is green or red, as strong as its effect."""
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


def explain(estimator: Any, text: str, *, criterion: str = "mae") -> Explanation:
    """The effect of each word of `text`, or of each of at most `SPANS` runs of words, on a PriceEstimator's estimate.

    criterion  what the estimates minimize, as in `PriceEstimator.predict`

    Raises NotFittedError, and ConfigError for an unknown criterion or an engine that gives no distributions.
    """
    read, cut = _readable_part(estimator, repair_text(text))
    places = spans_of(read)
    variants = [read, "", *(read[:start] + read[end:] for start, end in places)]
    estimates = estimator.estimates(estimator.distributions(estimator.prompts(variants)), criterion)
    estimate, empty, *others = (float(each) for each in estimates)
    spans = tuple(
        Span(start, end, read[start:end].strip(), without, estimate - without, (estimate - without) / estimate)
        for (start, end), without in zip(places, others, strict=True)
    )
    return Explanation(read, estimate, empty, criterion, spans, cut)


def spans_of(text: str, limit: int = SPANS) -> list[tuple[int, int]]:
    """(start, end) of each word, or of at most `limit` runs of equally many words; together they are the text."""
    words = [match.span() for match in _WORD.finditer(text)]
    run = -(-len(words) // limit) or 1
    groups = [words[at : at + run] for at in range(0, len(words), run)]
    return [(group[0][0], group[-1][1]) for group in groups]


def _readable_part(estimator: Any, text: str) -> tuple[str, bool]:
    """(The first words of a repaired text that fit into a prompt, whether there are more)."""

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
    """A color for at least a tenth of the strongest effect, bold from half of it on."""
    size = abs(effect) / strongest if strongest else 0.0
    if size < 0.1:
        return ""
    return ("bold " if size >= 0.5 else "") + ("green" if effect > 0 else "red")


def _dollars(amount: float) -> str:
    return f"${amount:,.0f}"


def _signed(amount: float) -> str:
    return f"{'-' if amount < 0 else '+'}${abs(amount):,.0f}"


def _one_line(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
