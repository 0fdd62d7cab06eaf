"""An autograd tape of buffer sizes: which buffers are alive when in a forward and backward pass, without tensors.

The operations of a layer are written down by hand (layer_costs.py), each with what it allocates, what autograd saves
for it, and what its backward allocates. The rules are those of PyTorch's eager autograd:

- a buffer lives while Python, a saved tensor or a pending gradient refers to it;
- backward runs the operations in the reverse order of their creation and skips those that no gradient reaches;
- an operation's gradients exist together with its incoming gradient and its saved tensors, which are released after it;
- a second gradient of a tensor is added in place if nothing else refers to the first, else into a new buffer;
- the output of `recompute` (selective_recompute.py) is not saved by the operations that use it: the first of them to
  run its backward computes it again, with its graph, which then serves its own backward.

Sizes are bytes; the allocator's rounding and fragmentation are not modeled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Buffer", "Peak", "Tape", "Value"]


@dataclass(eq=False)
class Buffer:
    """Memory of `size` bytes, freed when `references` falls to 0; `kind` says where the breakdown counts it.

    recomputation   how it is computed again, if operations that save it need not hold it
    """

    size: int
    kind: str
    references: int = 0
    recomputation: _Recomputation | None = None


@dataclass(eq=False)
class Value:
    """A tensor: its buffer, the bytes of its gradient, and the number of the operation that made it (None: no
    gradient)."""

    buffer: Buffer
    size: int
    operation: int | None


@dataclass(frozen=True)
class _Operation:
    inputs: tuple[tuple[int, int], ...]  # (operation, bytes of the gradient) of each input that requires one
    passes_gradient: bool  # backward hands the gradient on without a copy (add, view, clone)
    saved: tuple[Buffer, ...]
    backward_scratch: tuple[Buffer, ...]  # alive only while its backward runs
    recomputations: tuple[_Recomputation, ...] = ()  # of what it would have saved
    recomputed: _Recomputation | None = None  # of its own output


@dataclass(eq=False)
class _Recomputation:
    """Operations that run again, on a tape of their own, when the first of their `users` needs their output."""

    function: Callable[..., Value]
    inputs: tuple[Value, ...]  # those with a recomputation of their own are computed again, the others were saved
    users: int = 0
    tape: Tape | None = None
    leaves: tuple[Value, ...] = ()
    output: Value | None = None


@dataclass
class Peak:
    """The highest sum of live bytes seen, and its parts by kind of buffer."""

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class Tape:
    """Records operations in the forward pass and plays them back.

    record              whether operations save for a backward pass, as under autograd
    parent              the tape whose memory this one uses
    peak                highest sum of live bytes so far; assign Peak() to begin anew
    peak_at_last_save   the same up to the last saved tensor, where a recomputed forward pass stops early. Autograd
                        saves an operation's inputs before it computes the output.
    """

    def __init__(self, *, record: bool = True, parent: Tape | None = None) -> None:
        self.record = record
        self.live: dict[str, int] = {} if parent is None else parent.live
        self.peak = Peak()
        self.peak_at_last_save = Peak()
        self._parent = parent
        self._operations: list[_Operation] = []

    @property
    def total(self) -> int:
        """Bytes alive now."""
        return sum(self.live.values())

    def source(self, size: int, *, gradient: bool = True) -> Value:
        """A tensor from outside the tape, counted there; its gradient is counted here."""
        operation = self._add_operation((), False, (), ()) if gradient else None
        return Value(Buffer(0, "outside", 1), size, operation)

    def apply(
        self,
        size: int,
        inputs: Sequence[Value],
        *,
        saves: Sequence[Value | Buffer] = (),
        saves_output: bool = False,
        saves_constant: bool = False,
        passes_gradient: bool = False,
        trainable: bool = False,
        saves_last: bool = False,
        scratch: int = 0,
        backward_scratch: int = 0,
        scratch_kind: str = "temporary",
        kind: str = "temporary",
    ) -> Value:
        """A new tensor of `size` bytes computed from `inputs`.

        saves             buffers that autograd saves for the backward pass (only if a gradient is required); from then
                          on they count as "saved"
        saves_output      the new tensor as well; saves_constant: a weight or a number, which takes no further memory
        passes_gradient   its backward hands the incoming gradient on to every input without a copy
        saves_last        it saves after its output is computed, as a function written by hand does
        trainable         the operation has a trainable weight, and so a backward whatever its inputs require
        scratch, backward_scratch   bytes alive only while the operation, or its backward, runs; of `scratch_kind`
        """
        if saves or saves_constant:
            self.peak_at_last_save = self.peak
        buffer = Buffer(size, kind)
        self._retain(buffer)
        if scratch:
            workspace = Buffer(scratch, scratch_kind)
            self._retain(workspace)
            self.release(workspace)
        input_gradients = _gradients_of(inputs)
        if saves_output or saves_last:
            self.peak_at_last_save = self.peak
        if not (input_gradients or trainable):
            return Value(buffer, size, None)
        saved: tuple[Buffer, ...] = ()
        if self.record:
            saved = tuple(item.buffer if isinstance(item, Value) else item for item in saves)
            saved += (buffer,) if saves_output else ()
        recomputations = tuple(item.recomputation for item in saved if item.recomputation is not None)
        for recomputation in recomputations:
            recomputation.users += 1
        saved = tuple(item for item in saved if item.recomputation is None)
        self._save(saved)
        workspaces = (Buffer(backward_scratch, scratch_kind),) if backward_scratch else ()
        operation = self._add_operation(input_gradients, passes_gradient, saved, workspaces, recomputations)
        return Value(buffer, size, operation)

    def recompute(
        self, function: Callable[..., Value], inputs: Sequence[Value], *, saves: Sequence[Buffer] = ()
    ) -> Value:
        """`function(tape, *inputs)`, which saves its inputs and `saves` and runs again in the backward pass."""
        detached = (Value(value.buffer, value.size, None) for value in inputs)
        output = function(Tape(record=False, parent=self), *detached)
        if not self.record:
            return Value(output.buffer, output.size, None)
        recomputation = output.buffer.recomputation = _Recomputation(function, tuple(inputs))
        for value in inputs:
            if value.buffer.recomputation is None:
                self._save([value.buffer])
            else:
                value.buffer.recomputation.users += 1
        input_gradients = _gradients_of(inputs)
        if not input_gradients:
            return Value(output.buffer, output.size, None)
        recomputation.users = 1
        self._save(saves)
        operation = self._add_operation(input_gradients, False, tuple(saves), (), (), recomputation)
        return Value(output.buffer, output.size, operation)

    def view(self, value: Value) -> Value:
        """Another reference to the same memory."""
        self._retain(value.buffer)
        return Value(value.buffer, value.size, value.operation)

    def allocate(self, size: int, kind: str) -> Buffer:
        """A buffer without a gradient, such as a cast weight."""
        buffer = Buffer(size, kind)
        self._retain(buffer)
        return buffer

    def release(self, *items: Value | Buffer) -> None:
        """Drops one reference to each."""
        for item in items:
            buffer = item.buffer if isinstance(item, Value) else item
            buffer.references -= 1
            if buffer.references == 0 and buffer.size:
                self.live[buffer.kind] -= buffer.size

    def backward(self, last: Value) -> None:
        """Plays the gradient of `last` back through every operation."""
        assert last.operation is not None, "no operation requires a gradient"
        gradient = Buffer(last.size, "temporary")
        self._retain(gradient)
        self._play(last.operation, gradient, ())

    def _play(self, last: int, gradient_of_last: Buffer, leaves: Sequence[int]) -> list[Buffer]:
        """Backward from the operation `last`; returns the gradients of `leaves`."""
        pending = {last: gradient_of_last}
        for number in range(len(self._operations) - 1, -1, -1):
            if number in leaves:
                continue
            gradient = pending.pop(number, None)
            if gradient is None:
                continue
            operation = self._operations[number]
            for recomputation in operation.recomputations:
                self._run_recomputation(recomputation)
            for workspace in operation.backward_scratch:
                self._retain(workspace)
            if operation.recomputed is not None:
                results = self._backward_through(operation.recomputed, gradient)
            elif operation.passes_gradient:
                results = [gradient for _ in operation.inputs]
            else:
                results = [Buffer(size, "temporary") for _, size in operation.inputs]
            if operation.recomputed is None:
                for result in results:
                    self._retain(result)
            self.release(*operation.backward_scratch, *operation.saved, gradient)
            for recomputation in operation.recomputations:
                self._release_user(recomputation)
            for (producer, _), result in zip(operation.inputs, results, strict=True):
                self._accumulate(pending, producer, result)
        leaf_gradients = [pending.pop(leaf) for leaf in leaves]
        assert not pending, "a gradient was left over"
        return leaf_gradients

    def _run_recomputation(self, recomputation: _Recomputation) -> None:
        """Computes the output again, with its graph, unless it is there."""
        if recomputation.tape is None:
            recomputation.tape = tape = Tape(parent=self)
            leaves = []
            for value in recomputation.inputs:
                buffer, inner = value.buffer, value.buffer.recomputation
                if inner is not None:
                    self._run_recomputation(inner)
                    assert inner.output is not None
                    buffer = inner.output.buffer
                operation = None if value.operation is None else tape._add_operation((), False, (), ())
                leaves.append(Value(buffer, value.size, operation))
            recomputation.leaves = tuple(leaves)
            recomputation.output = recomputation.function(tape, *leaves)

    def _backward_through(self, recomputation: _Recomputation, gradient: Buffer) -> list[Buffer]:
        """The gradients of the recomputation's inputs; `gradient` stays alive until they are there."""
        self._run_recomputation(recomputation)
        assert recomputation.tape is not None
        assert recomputation.output is not None
        assert recomputation.output.operation is not None
        self._retain(gradient)
        leaves = [leaf.operation for leaf in recomputation.leaves if leaf.operation is not None]
        results = recomputation.tape._play(recomputation.output.operation, gradient, leaves)
        self._release_user(recomputation)
        return results

    def _release_user(self, recomputation: _Recomputation) -> None:
        recomputation.users -= 1
        if recomputation.users == 0:
            output = [] if recomputation.output is None else [recomputation.output]
            self.release(*output)
            for value in recomputation.inputs:
                if value.buffer.recomputation is None:
                    self.release(value)
                else:
                    self._release_user(value.buffer.recomputation)

    def _save(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            self._retain(buffer)
            if buffer.kind == "temporary":
                self.live["temporary"] -= buffer.size
                self.live["saved"] = self.live.get("saved", 0) + buffer.size
                buffer.kind = "saved"

    def _accumulate(self, pending: dict[int, Buffer], operation: int, gradient: Buffer) -> None:
        first = pending.get(operation)
        if first is None:
            pending[operation] = gradient
        elif first.references == 1:
            self.release(gradient)
        else:
            total = Buffer(first.size, "temporary")
            self._retain(total)
            self.release(first, gradient)
            pending[operation] = total

    def _add_operation(
        self,
        inputs: tuple[tuple[int, int], ...],
        passes_gradient: bool,
        saved: tuple[Buffer, ...],
        backward_scratch: tuple[Buffer, ...],
        recomputations: tuple[_Recomputation, ...] = (),
        recomputed: _Recomputation | None = None,
    ) -> int:
        self._operations.append(
            _Operation(inputs, passes_gradient, saved, backward_scratch, recomputations, recomputed)
        )
        return len(self._operations) - 1

    def _retain(self, buffer: Buffer) -> None:
        buffer.references += 1
        if buffer.references > 1:
            return
        self.live[buffer.kind] = self.live.get(buffer.kind, 0) + buffer.size
        self._update_peak()

    def _update_peak(self) -> None:
        if self._parent is not None:
            self._parent._update_peak()
        elif self.total > self.peak.total:
            self.peak = Peak(self.total, dict(self.live))


def _gradients_of(inputs: Sequence[Value]) -> tuple[tuple[int, int], ...]:
    return tuple((value.operation, value.size) for value in inputs if value.operation is not None)
