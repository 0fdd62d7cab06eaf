"""Which buffers are alive when: PyTorch's forward and backward pass as book-keeping, with sizes in place of tensors.

The operations of a layer are written down by hand (layers.py), each with what it allocates, what autograd saves for it,
and what its backward allocates. The rules here are those of PyTorch's eager autograd:

- a buffer lives while Python, a saved tensor or a waiting gradient refers to it;
- backward runs the operations in the reverse order of their creation, skipping those that no gradient reaches;
- an operation's gradients exist together with its incoming gradient and its saved tensors, which are let go after it;
- a second gradient for the same tensor is added in place when nothing else refers to the first, else into a new buffer.

Sizes are bytes; the allocator's rounding and fragmentation are no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Buffer", "Peak", "Tape", "Value"]


@dataclass(eq=False)
class Buffer:
    """Memory of `size` bytes, freed when `holders` falls to 0; `kind` says where the breakdown counts it."""

    size: int
    kind: str
    holders: int = 0


@dataclass(eq=False)
class Value:
    """A tensor: its buffer, its size as a gradient (bytes), and the operation that made it (None: no gradient)."""

    buffer: Buffer
    size: int
    maker: int | None


@dataclass(frozen=True)
class _Operation:
    inputs: tuple[tuple[int, int], ...]  # (maker, bytes of the gradient) of each input that wants one
    passes: bool  # the gradient goes through as it is, without a copy (add, view, clone)
    saved: tuple[Buffer, ...]
    scratch: tuple[Buffer, ...]  # buffers alive only while its backward runs


@dataclass
class Peak:
    """The highest sum of live bytes seen, and its parts by kind."""

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class Tape:
    """Records operations in the forward pass (with `record`, as under autograd) and plays them back.

    peak                highest sum of live bytes so far; set it to Peak() to begin anew
    peak_at_last_save   the same, up to the last saved tensor: where a recomputed forward pass stops early. Autograd
                        saves an operation's inputs before it computes the output.
    """

    def __init__(self, *, record: bool = True) -> None:
        self.record = record
        self.live: dict[str, int] = {}
        self.peak = Peak()
        self.peak_at_last_save = Peak()
        self._operations: list[_Operation] = []

    @property
    def total(self) -> int:
        return sum(self.live.values())

    def source(self, size: int, *, gradient: bool = True) -> Value:
        """A tensor that comes from outside the tape and is counted there; its gradient is counted here."""
        return Value(Buffer(0, "outside", 1), size, self._node((), False, (), ()) if gradient else None)

    def apply(
        self,
        size: int,
        inputs: Sequence[Value],
        *,
        saves: Sequence[Value | Buffer] = (),
        saves_output: bool = False,
        saves_constant: bool = False,
        passes: bool = False,
        trains: bool = False,
        scratch: int = 0,
        scratch_backward: int = 0,
        scratch_kind: str = "flow",
        kind: str = "flow",
    ) -> Value:
        """A new tensor of `size` bytes computed from `inputs`.

        saves              buffers that autograd keeps for the backward pass (only where a gradient is wanted); from
                           then on they count as "saved"
        saves_output       the new tensor as well; saves_constant: a weight or a number, which takes no further memory
        trains             the operation has a trainable weight, so that it has a backward whatever its inputs want
        passes             its backward hands the incoming gradient on to every input without a copy
        scratch, scratch_backward   bytes alive only while the operation runs, counted as `scratch_kind`
        """
        if saves or saves_constant:
            self.peak_at_last_save = self.peak
        buffer = Buffer(size, kind)
        self._take(buffer)
        if scratch:
            passing = Buffer(scratch, scratch_kind)
            self._take(passing)
            self.drop(passing)
        wanted = tuple((value.maker, value.size) for value in inputs if value.maker is not None)
        if saves_output:
            self.peak_at_last_save = self.peak
        if not (wanted or trains):
            return Value(buffer, size, None)
        saved: tuple[Buffer, ...] = ()
        if self.record:
            saved = tuple(item.buffer if isinstance(item, Value) else item for item in saves)
            saved += (buffer,) if saves_output else ()
        for item in saved:
            self._take(item, again=True)
            self._call(item, "saved")
        after = (Buffer(scratch_backward, scratch_kind),) if scratch_backward else ()
        return Value(buffer, size, self._node(wanted, passes, saved, after))

    def view(self, value: Value) -> Value:
        """The same memory under another name."""
        self._take(value.buffer, again=True)
        return Value(value.buffer, value.size, value.maker)

    def hold(self, size: int, kind: str) -> Buffer:
        """A buffer without a gradient, such as a cast weight."""
        buffer = Buffer(size, kind)
        self._take(buffer)
        return buffer

    def drop(self, *items: Value | Buffer) -> None:
        """Lets go of one reference to each."""
        for item in items:
            buffer = item.buffer if isinstance(item, Value) else item
            buffer.holders -= 1
            if buffer.holders == 0 and buffer.size:
                self.live[buffer.kind] -= buffer.size

    def backward(self, last: Value, *, incoming: int | None = None) -> None:
        """Plays the gradient of `last` (`incoming` bytes, else its own size) back through every operation."""
        assert last.maker is not None, "nothing here wants a gradient"
        start = Buffer(last.size if incoming is None else incoming, "flow")
        self._take(start)
        waiting = {last.maker: start}
        for number in range(len(self._operations) - 1, -1, -1):
            gradient = waiting.pop(number, None)
            if gradient is None:
                continue
            operation = self._operations[number]
            for scratch in operation.scratch:
                self._take(scratch)
            if operation.passes:
                results = [gradient for _ in operation.inputs]
            else:
                results = [Buffer(size, "flow") for _, size in operation.inputs]
            for result in results:
                self._take(result, again=operation.passes)
            self.drop(*operation.scratch, *operation.saved, gradient)
            for (maker, _), result in zip(operation.inputs, results, strict=True):
                self._accumulate(waiting, maker, result)
        assert not waiting, "a gradient was left over"

    def _accumulate(self, waiting: dict[int, Buffer], maker: int, gradient: Buffer) -> None:
        first = waiting.get(maker)
        if first is None:
            waiting[maker] = gradient
        elif first.holders == 1:
            self.drop(gradient)
        else:
            total = Buffer(first.size, "flow")
            self._take(total)
            self.drop(first, gradient)
            waiting[maker] = total

    def _node(
        self, inputs: tuple[tuple[int, int], ...], passes: bool, saved: tuple[Buffer, ...], scratch: tuple[Buffer, ...]
    ) -> int:
        self._operations.append(_Operation(inputs, passes, saved, scratch))
        return len(self._operations) - 1

    def _call(self, buffer: Buffer, kind: str) -> None:
        if buffer.kind == "flow":
            self.live["flow"] -= buffer.size
            self.live[kind] = self.live.get(kind, 0) + buffer.size
            buffer.kind = kind

    def _take(self, buffer: Buffer, *, again: bool = False) -> None:
        buffer.holders += 1
        if again and buffer.holders > 1:
            return
        self.live[buffer.kind] = self.live.get(buffer.kind, 0) + buffer.size
        if self.total > self.peak.total:
            self.peak = Peak(self.total, dict(self.live))
