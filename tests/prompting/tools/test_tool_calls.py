"""Tool calls in generated lines: parsing, answers, error messages."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fastprice.prompting.tools.tool_calls import format_number, run_call


@settings(max_examples=300)
@given(
    st.one_of(st.text(max_size=120), st.text(max_size=60).map("CALL calc({})".format), st.text().map("CALL {}".format))
)
def test_no_line_raises(line: str) -> None:
    call = run_call(line)
    if call is not None:
        assert "\n" not in call.argument
        assert call.answer


def test_calls_are_answered_or_have_an_error_message() -> None:
    answered = run_call("CALL calc(3 * 4.50)")
    assert answered is not None
    assert (answered.answer, answered.failed) == ("13.5", False)
    for line, message in [
        ("CALL calc(1/0)", "division by zero"),
        ("CALL calc(", "write CALL calc(...)"),
        ("CALL open(/etc/passwd)", "write CALL calc(...)"),
        ("CALL convert(1 kg to m)", "kg is mass and m is length"),
    ]:
        failed_call = run_call(line)
        assert failed_call is not None
        assert failed_call.failed
        assert message in failed_call.answer
    assert run_call("DONE") is None
    assert run_call("I CALL calc(1)") is None
    assert run_call("Call of Duty (used)") is None


def test_numbers_have_six_digits_at_most() -> None:
    assert [format_number(value) for value in (13.5, 1 / 3, 2e6, 1e15)] == [
        "13.5",
        "0.333333",
        "2000000",
        "1" + "0" * 15,
    ]
