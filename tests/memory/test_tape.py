"""The tape of buffer sizes: peaks worked out by hand."""

from __future__ import annotations

from fastprice.memory.tape import Peak, Tape, Value


def test_saved_tensors_outlive_their_names() -> None:
    tape = Tape()
    x = tape.source(100)
    y = tape.apply(100, [x], saves_output=True)
    z = tape.apply(10, [y])
    tape.release(y, z)
    assert tape.total == 100
    tape.peak = Peak()
    tape.backward(z)
    # z's gradient and y's; then y's and x's; y itself until its operation's backward is done
    assert tape.peak.total == 300
    assert tape.total == 0


def test_nothing_is_saved_without_a_gradient_or_without_recording() -> None:
    for tape, needs_gradient in ((Tape(), False), (Tape(record=False), True)):
        x = tape.source(100, gradient=needs_gradient)
        y = tape.apply(100, [x], saves_output=True)
        tape.release(y)
        assert tape.total == 0


def test_a_second_gradient_is_added_in_place() -> None:
    tape = Tape()
    x = tape.source(1000)
    a, b = tape.apply(100, [x]), tape.apply(100, [x])
    total = tape.apply(100, [a, b], passes_gradient=True)
    tape.release(a, b, total)
    tape.peak = Peak()
    tape.backward(total)
    # the shared incoming gradient, x's gradient from b, and that from a, which is added to it
    assert tape.peak.total == 100 + 1000 + 1000


def test_a_second_gradient_is_added_into_a_new_buffer_if_the_first_is_shared() -> None:
    tape = Tape()
    x = tape.source(100)
    doubled = tape.apply(100, [x, x], passes_gradient=True)
    tape.release(doubled)
    tape.peak = Peak()
    tape.backward(doubled)
    assert tape.peak.total == 100 + 100


def test_scratch_counts_only_while_its_operation_runs() -> None:
    tape = Tape()
    x = tape.source(10)
    y = tape.apply(10, [x], scratch=1000, backward_scratch=500, scratch_kind="dequantized")
    assert (tape.peak.total, tape.total) == (1010, 10)
    tape.peak = Peak()
    tape.backward(y)
    assert tape.peak.total == 10 + 10 + 500 + 10
    assert tape.peak.parts["dequantized"] == 500


def test_a_recomputed_value_is_not_saved_and_computed_once_in_backward() -> None:
    tape = Tape()
    x = tape.source(100)

    def double(inner: Tape, value: Value) -> Value:
        return inner.apply(100, [value], saves=[value])

    h = tape.apply(100, [x])
    y = tape.recompute(double, [h])
    z = tape.apply(10, [y], saves=[y])
    tape.release(h, y, z)
    assert tape.total == 100  # h alone
    tape.peak = Peak()
    tape.backward(z)
    # h, y computed again, y's gradient, h's gradient
    assert tape.peak.total == 400
    assert tape.total == 0
