import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprice.data.items import Item
from fastprice.errors import ConfigError, DataError
from fastprice.models.base_models import load_tokenizer
from fastprice.prompts.template import (
    FORMS,
    IGNORE,
    JSON,
    PREAMBLE,
    PRICE_CUE,
    TEXT,
    answer_text,
    encode_prompt,
    encode_row,
)

TOKENIZER = load_tokenizer("nano")


def test_a_row_is_the_prompt_and_then_the_price_alone_carries_loss() -> None:
    row = encode_row(TOKENIZER, Item("a red kettle", 129.6), 64)
    labeled = [label for label in row.labels if label != IGNORE]
    assert TOKENIZER.decode(labeled[:-1]) == "130"
    assert labeled[-1] == TOKENIZER.eos_token_id
    assert row.labels[-len(labeled) :] == labeled == row.ids[-len(labeled) :]
    assert TOKENIZER.decode(row.ids[1 : -len(labeled)]) == f"{PREAMBLE}a red kettle{PRICE_CUE}"


def test_training_and_prediction_see_the_same_prompt() -> None:
    text = "Lamp, 40 W"
    row = encode_row(TOKENIZER, Item(text, 5.0), 64)
    prompt = encode_prompt(TOKENIZER, text, 64)
    assert row.ids[: len(prompt.ids)] == prompt.ids


@given(st.text(max_size=400), st.integers(8, 40))
def test_whatever_the_text_the_question_and_its_end_survive(text: str, most: int) -> None:
    prompt = encode_prompt(TOKENIZER, text, most)
    wrapper = encode_prompt(TOKENIZER, "", most).ids
    tail = TOKENIZER(PRICE_CUE, add_special_tokens=False)["input_ids"]
    assert prompt.ids[-len(tail) :] == tail
    assert len(prompt.ids) <= len(wrapper) + most


@given(st.text(max_size=40))
def test_special_tokens_written_in_a_text_are_only_characters(text: str) -> None:
    hostile = f"{text}<|eos|>{text}<|bos|><|pad|>"
    ids = encode_prompt(TOKENIZER, hostile, 200).ids
    assert ids[0] == TOKENIZER.bos_token_id
    assert not set(ids[1:]) & set(TOKENIZER.all_special_ids)
    assert "<|eos|>" in TOKENIZER.decode(ids)


def test_half_a_character_is_no_crash() -> None:
    assert encode_prompt(TOKENIZER, "lamp \ud800", 20) == encode_prompt(TOKENIZER, "lamp", 20)


def test_a_long_text_loses_its_end_and_the_loss_is_counted() -> None:
    long = " ".join(f"word{number}" for number in range(300))
    prompt = encode_prompt(TOKENIZER, long, 20)
    assert prompt.cut > 0
    assert "word0" in TOKENIZER.decode(prompt.ids)
    assert "word299" not in TOKENIZER.decode(prompt.ids)
    assert encode_prompt(TOKENIZER, "short", 20).cut == 0
    assert encode_prompt(TOKENIZER, "x" * 100_000, 20).cut > 0


@pytest.mark.parametrize(("price", "answer"), [(0.4, "1"), (0.5, "1"), (1.4, "1"), (99.5, "100"), (999.49, "999")])
def test_answers_are_whole_dollars_from_one_up(price: float, answer: str) -> None:
    assert answer_text(price) == answer


def test_an_item_without_a_price_is_refused_by_row() -> None:
    with pytest.raises(DataError, match="row 7"):
        encode_row(TOKENIZER, Item("a", None, row=7), 64)


def test_a_json_row_ends_with_a_bracket_that_carries_loss() -> None:
    row = encode_row(TOKENIZER, Item("a red kettle", 129.6), 64, JSON)
    labeled = [label for label in row.labels if label != IGNORE]
    assert TOKENIZER.decode(labeled[:-1]) == "130}"
    assert labeled[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(row.ids[1 : -len(labeled)]) == f'{PREAMBLE}a red kettle\n\n{{"price": '
    assert row.price == 129.6


@pytest.mark.parametrize(
    ("answer", "price"),
    [
        ("130}", 130.0), ("12.5}", 12.5), ("130", None), ("130} and", None), ('"130"}', None), ("0}", None),
        ("-3}", None), ("true}", None), ('5, "currency": "EUR"}', None), ("1e999}", None), ("", None),
    ],
)  # fmt: skip
def test_json_is_read_by_its_schema_alone(answer: str, price: float | None) -> None:
    assert JSON.read(answer) == price


@pytest.mark.parametrize(
    ("answer", "price"),
    [("130", 130.0), ("5 dollars", 5.0), ("1 299\n", 1299.0), ("1\n$12", 1.0), (" 5", None), ("$5", None), ("", None)],
)
def test_text_is_read_from_its_first_character_to_the_end_of_the_line(answer: str, price: float | None) -> None:
    assert TEXT.read(answer) == price


@given(st.text(max_size=30))
def test_whatever_was_written_reading_it_gives_a_price_or_none(answer: str) -> None:
    for form in FORMS.values():
        price = form.read(answer)
        assert price is None or 0 < price < float("inf")


def test_a_tokenizer_that_cannot_close_an_object_in_one_token_is_told() -> None:
    class Bytes:
        eos_token_id = 0

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [1] * 2 * len(text)}

    with pytest.raises(ConfigError, match="use output='text'"):
        JSON.end_id(Bytes())
