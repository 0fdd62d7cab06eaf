"""Explanations: the word that decides comes first, and every figure shown is an estimate of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprice import ConfigError, Item, PriceEstimator
from fastprice.inference.explain import Explanation, explain, spans_of

Run = Callable[..., tuple[int, str, str]]


@given(st.text(max_size=300), st.integers(1, 20))
def test_spans_are_the_text_in_order_and_few(text: str, most: int) -> None:
    text = text.strip()
    spans = spans_of(text, most)
    assert "".join(text[start:end] for start, end in spans) == text
    assert len(spans) <= most
    assert all(text[start:end].strip() for start, end in spans)


@pytest.fixture(scope="module")
def keyword() -> PriceEstimator:
    """A model for which one word, at any place, decides between $8 and $600."""
    fillers = ["lamp", "for the desk", "in good order", "with a box", "number nine", "from the attic"]
    items = []
    for n in range(240):
        words = fillers[n % 6 :] + fillers[: n % 6]
        words = words[: 2 + n % 4]
        if n % 2:
            words.insert(n % len(words), "golden")
        items.append(Item(" ".join(words), 600.0 if n % 2 else 8.0, row=n))
    estimator = PriceEstimator(epochs=6.0, max_tokens=48, pack_tokens=256, evaluations=0, learning_rate=5e-3)
    return estimator.fit(items)


def test_the_word_that_decides_comes_first(keyword: PriceEstimator) -> None:
    for text in ("desk lamp golden with a box", "golden lamp from the attic", "lamp for the desk in golden"):
        explanation = keyword.explain(text)
        first = explanation.ranked()[0]
        assert first.text == "golden"
        assert first.effect > 0.5 * explanation.estimate
        assert first.effect == explanation.estimate - first.without
        assert first.share == pytest.approx(first.effect / explanation.estimate)


def test_every_effect_is_the_estimate_of_the_text_without_the_span(fitted: PriceEstimator) -> None:
    explanation = fitted.explain("Professional racing bicycle,\n carbon frame", criterion="mse")
    assert explanation.text == "Professional racing bicycle,\ncarbon frame"
    assert [span.text for span in explanation.spans] == ["Professional", "racing", "bicycle,", "carbon", "frame"]
    texts = [explanation.text[: span.start] + explanation.text[span.end :] for span in explanation.spans]
    expected = fitted.predict([explanation.text, "", *texts], criterion="mse")
    assert [explanation.estimate, explanation.empty, *(span.without for span in explanation.spans)] == pytest.approx(
        expected.tolist(), rel=1e-3
    )


class Counting:
    """Prices a text by its letters; counts its calls; takes 100 words."""

    calls = 0

    def prompts(self, texts: list[str]) -> list[object]:
        from fastprice.prompts.template import Prompt

        return [Prompt([len(text)], max(0, len(text.split()) - 100)) for text in texts]

    def distributions(self, prompts: list[object]) -> list[object]:
        self.calls += len(prompts)
        return prompts

    def estimates(self, prompts: list[object], criterion: str) -> list[float]:
        return [float(1 + prompt.ids[0]) for prompt in prompts]  # type: ignore[attr-defined]


def test_long_texts_are_explained_in_runs_of_words_that_the_model_reads() -> None:
    estimator = Counting()
    text = " ".join(f"w{n}" for n in range(5_000))
    explanation = explain(estimator, text)
    assert explanation.cut
    assert explanation.text.split()[-1] == "w99"
    assert len(explanation.spans) == 50
    assert explanation.spans[0].text == "w0 w1"
    assert estimator.calls == 52
    assert "cut" in str(explanation)
    assert explain(estimator, "w " * 100).cut is False
    assert explain(Counting(), "").spans == ()
    assert "no words" in str(explain(Counting(), " \n"))


@pytest.mark.parametrize(
    "text", ["", "x" * 100_000, "自転車" * 200, "<|eos|>\x00", "a $5 lamp_{x}^2 $\\frac$ [red] <b>"]
)
def test_any_text_is_explained_and_drawn(fitted: PriceEstimator, text: str, tmp_path: Path) -> None:
    explanation = fitted.explain(text)
    assert len(explanation.spans) <= 64
    assert str(explanation).startswith("$")
    assert "<b>" not in explanation.to_html()
    assert explanation.plot(tmp_path / "p.svg").stat().st_size > 1000


def test_it_is_readable_without_color_and_colored_with(keyword: PriceEstimator) -> None:
    import io

    from rich.console import Console

    explanation = keyword.explain("golden lamp")
    for color in (None, "standard"):
        out = io.StringIO()
        Console(file=out, force_terminal=color is not None, color_system=color, width=100).print(explanation)
        assert ("\x1b[1;32m" in out.getvalue()) == (color is not None)
        assert "+$" in out.getvalue()
        assert "%" in out.getvalue()
    assert "golden" in explanation.to_html()
    assert "26,127,55" in explanation.to_html()


def test_plots_go_where_they_can(keyword: PriceEstimator, tmp_path: Path) -> None:
    explanation: Explanation = keyword.explain("golden lamp, $5")
    assert explanation.plot(tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"\.png, \.svg"):
        explanation.plot(tmp_path / "p.doc")
    with pytest.raises(ConfigError, match="does not exist"):
        explanation.plot(tmp_path / "none" / "p.png")


def test_explain_on_the_command_line(fastprice: Run, keyword: PriceEstimator, tmp_path: Path) -> None:
    folder = keyword.save(tmp_path / "model")
    plot = tmp_path / "p.png"
    status, output, error = fastprice("explain", "--model", folder, "--item", "golden [red]lamp", "--plot", plot)
    assert status == 0, error
    assert "golden [red]lamp" in output
    assert "golden" in output.splitlines()[-3 if "plot" in output.splitlines()[-1] else -2]
    assert plot.is_file()
    for arguments, part in ((("--plot", tmp_path / "p.doc"), ".png"), (("--criterion", "mea"), "mae")):
        status, _, error = fastprice("explain", "--model", folder, "--item", "x", *arguments)
        assert (status, error.count("\n")) == (2, 1)
        assert part in error
