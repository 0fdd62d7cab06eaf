"""One table for several models: the right numbers, the best marked, any name harmless, missing prices refused."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from fastprice.data.items import Item
from fastprice.errors import DataError
from fastprice.evaluation.evaluate import Evaluation, evaluate_model, evaluate_models
from fastprice.evaluation.metrics import score

ITEMS = [Item(f"item {index}", 10.0 * (index + 1), None, index + 2) for index in range(12)]
TRUTHS = [item.price for item in ITEMS]


def times(factor: float) -> Callable[[list[str]], list[float]]:
    return lambda texts: [factor * 10.0 * (int(text.split()[1]) + 1) for text in texts]


def rendered(evaluation: Evaluation, width: int = 80) -> str:
    console = Console(width=width, color_system="truecolor", force_terminal=True, legacy_windows=False)
    with console.capture() as captured:
        console.print(evaluation.table())
    return captured.get()


def test_every_model_gets_the_same_texts_and_its_own_scores() -> None:
    seen: list[list[str]] = []

    def spying(texts: list[str]) -> list[float]:
        seen.append(texts)
        return times(1.1)(texts)

    evaluation = evaluate_models({"spy": spying, "double": times(2)}, ITEMS, seed=3)
    assert seen == [[item.text for item in ITEMS]]
    assert [result.name for result in evaluation.results] == ["spy", "double"]
    assert evaluation.truths.tolist() == TRUTHS
    assert evaluation.result("double").guesses == pytest.approx([2 * price for price in TRUTHS])
    assert evaluation.result("double").scores == score(TRUTHS, evaluation.result("double").guesses, seed=3)
    with pytest.raises(KeyError, match="triple"):
        evaluation.result("triple")


def test_the_time_of_prediction_is_measured() -> None:
    def slow(texts: list[str]) -> list[float]:
        time.sleep(0.05)
        return times(1)(texts)

    result = evaluate_model("slow", slow, ITEMS)
    assert result.seconds >= 0.05
    assert result.ms_per_item == pytest.approx(1000 * result.seconds / len(ITEMS))


def test_a_missing_estimate_is_replaced_by_the_fallback_and_counted() -> None:
    answer = np.array([math.nan, *TRUTHS[1:-1], math.nan])
    result = evaluate_model("shy", lambda texts: answer, ITEMS, fallback=50.0)
    assert result.unparsed == 2
    assert result.guesses[[0, -1]].tolist() == [50, 50]
    assert result.scores.mae == pytest.approx((40 + 70) / 12)
    assert math.isnan(answer[0])  # the model's own array is unchanged
    evaluation = Evaluation(ITEMS, np.array(TRUTHS), [result])
    assert evaluation.footnotes() == ["shy: no price for 2 of 12 items, where the fallback is scored"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([math.nan] * 12, r"model 'odd': guesses\[0\] is nan"),
        ([1.0] * 11, "model 'odd': 12 truths and 11 guesses"),
        ([math.inf] * 12, r"guesses\[0\] is inf"),
        (["cheap"] * 12, "model 'odd'"),
        ([[1.0]] * 12, "shape"),
    ],
)
def test_unusable_answers_name_the_model(answer: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        evaluate_models({"odd": lambda texts: answer}, ITEMS)
    assert "\n" not in str(caught.value)


def test_an_error_inside_a_model_is_raised_unchanged() -> None:
    def broken(texts: list[str]) -> list[float]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate_models({"broken": broken}, ITEMS)


def test_items_without_a_price_are_named_before_any_model_runs() -> None:
    def never(texts: list[str]) -> list[float]:
        raise AssertionError("a model ran")

    items = [*ITEMS, Item("a", None, None, 40), Item("b"), *(Item("c", None, None, row) for row in range(50, 60))]
    with pytest.raises(DataError, match=r"12 of 24 items have no price \(row 40, item 13, row 50.* and 7 more\)"):
        evaluate_models({"never": never}, items)
    with pytest.raises(DataError, match="test set is empty"):
        evaluate_models({"never": never}, [])


def test_terminal_table_fits_80_columns_and_bolds_the_best() -> None:
    evaluation = evaluate_models(
        {"tuned model": times(1.1), "TF-IDF + LightGBM": times(2.2)}, ITEMS, notes={"tuned model": "4 bits"}
    )
    text = rendered(evaluation)
    assert "…" not in text
    assert "ms/item" in text
    assert "tuned model: 4 bits" in text
    best, other = evaluation.result("tuned model").scores.mae, evaluation.result("TF-IDF + LightGBM").scores.mae
    bold = re.findall(r"\x1b\[1m *([^\x1b]*)\x1b", text)
    assert f"{best:.2f} ({best.low:.2f}–{best.high:.2f})" in bold
    assert f"{other:.2f} ({other.low:.1f}–{other.high:.0f})" in text
    assert f"{other:.2f} ({other.low:.1f}–{other.high:.0f})" not in bold


def test_no_row_of_a_run_is_wrapped_in_80_columns() -> None:
    dear = [Item(f"lot {n}", 500.0 + 40 * n) for n in range(60)]
    factors = {"constant (median)": 0.2, "TF-IDF + LightGBM": 1.3, "base model": 30.0, "tuned, greedy text": 1.2}
    models = {name: lambda texts, factor=factor: [500.0 * factor + 40 * n for n in range(60)]
              for name, factor in factors.items()}  # fmt: skip
    table = re.sub(r"\x1b\[[0-9;]*m", "", rendered(evaluate_models(models, dear)))
    lines = [line.rstrip() for line in table.splitlines() if line.strip()]
    assert len(lines) == 3 + len(models), "title, headings, a rule, one line a model"
    assert all(line.startswith(name) for line, name in zip(lines[3:], models, strict=True))
    assert "14500 (14500–14500)" in table


def test_best_is_the_highest_where_higher_is_better_and_ties_share_it() -> None:
    evaluation = evaluate_models({"good": times(1.1), "bad": times(5), "twin": times(1.1)}, ITEMS)
    headings = evaluation.headings()
    good, bad, twin = (
        {heading: best for heading, (_, best) in zip(headings, row, strict=True)} for row in evaluation.cells()
    )
    assert [name for name, best in good.items() if best] == ["MAE $", "RMSE $", "RMSLE", "MAPE %", "R²", "hits %"]
    assert not any(bad.values())
    assert twin == good


def test_a_single_model_is_not_called_the_best() -> None:
    (row,) = evaluate_models({"alone": times(1.1)}, ITEMS).cells()
    assert not any(best for _, best in row)


def test_an_undefined_figure_is_a_dash() -> None:
    evaluation = evaluate_models({"one": times(1.1), "two": times(1.2)}, ITEMS[:1])
    assert "–" in [text for text, _ in evaluation.cells()[0]]
    json.dumps(evaluation.as_dict(), allow_nan=False)


def test_markdown_has_the_same_numbers_and_escapes_names() -> None:
    evaluation = evaluate_models({"a|b [red]x[/red]\n": times(1.1), "c": times(2)}, ITEMS, notes={"c": "why"})
    lines = evaluation.markdown().splitlines()
    assert lines[0].startswith("| model | MAE $ |")
    assert lines[2].startswith(r"| a\|b [red]x[/red]  | **")
    assert lines[2].replace(r"\|", "").count("|") == lines[0].count("|") == lines[1].count("|")
    assert lines[-1] == "- c: why"
    for text, _ in evaluation.cells()[0][1:]:
        assert text in lines[2]
    assert "[red]x[/red]" in rendered(evaluation, width=120).replace("\n", "")


def test_as_dict_is_valid_json() -> None:
    read = json.loads(json.dumps(evaluate_models({"m": times(1.1)}, ITEMS).as_dict(), allow_nan=False))
    assert read["items"] == 12
    assert read["models"][0]["name"] == "m"
    assert read["models"][0]["scores"]["mae"]["value"] == pytest.approx(6.5)
