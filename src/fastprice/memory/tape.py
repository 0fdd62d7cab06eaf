"""Which buffers are alive when: PyTorch's forward and backward pass as book-keeping, with sizes in place of tensors.

The operations of a layer are written down by hand (layers.py), each with what it allocates, what autograd saves for it,
and what its backward allocates. The rules here are those of PyTorch's eager autograd:

- a buffer lives while Python, a saved tensor or a waiting gradient refers to it;
- backward runs the operations in the reverse order of their creation, skipping those that no gradient reaches;
- an operation's gradients exist together with its incoming gradient and its saved tensors, which are let go after it;
- a second gradient for the same tensor is added in place when nothing else refers to the first, else into a new buffer;
- what is made by `again` (checkpointing.py) is not saved by those who use it: the first of them to run backward has it
  computed again, with its graph, which then serves its own backward.

Sizes are bytes; the allocator's rounding and fragmentation are no part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Buffer", "Peak", "Tape", "Value"]


@dataclass(eq=False)
class Buffer:
    """Memory of `size` bytes, freed when `holders` falls to 0; `kind` says where the breakdown counts it.

    recipe   how it is computed again, if those who save it need not hold it
    """

    size: int
    kind: str
    holders: int = 0
    recipe: _Recipe | None = None


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
    recipes: tuple[_Recipe, ...] = ()  # what it would have saved
    own: _Recipe | None = None  # what it is itself


@dataclass(eq=False)
class _Recipe:
    """Operations that are played again, on a tape of their own, once one of their `users` asks for their result."""

    function: Callable[..., Value]
    inputs: tuple[Value, ...]
    users: int = 0
    tape: Tape | None = None
    leaves: tuple[Value, ...] = ()
    output: Value | None = None


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

    def __init__(self, *, record: bool = True, around: Tape | None = None) -> None:
        self.record = record
        self.live: dict[str, int] = {} if around is None else around.live
        self.peak = Peak()
        self.peak_at_last_save = Peak()
        self._around = around  # the tape whose memory this one uses
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
        recipes = tuple(item.recipe for item in saved if item.recipe is not None)
        for recipe in recipes:
            recipe.users += 1
        saved = tuple(item for item in saved if item.recipe is None)
        self._save(saved)
        after = (Buffer(scratch_backward, scratch_kind),) if scratch_backward else ()
        return Value(buffer, size, self._node(wanted, passes, saved, after, recipes))

    def again(self, function: Callable[..., Value], inputs: Sequence[Value]) -> Value:
        """`function(tape, *inputs)`, which keeps its inputs alone and is played again in the backward pass."""
        output = function(Tape(record=False, around=self), *(Value(value.buffer, value.size, None) for value in inputs))
        if not self.record:
            return Value(output.buffer, output.size, None)
        recipe = output.buffer.recipe = _Recipe(function, tuple(inputs))
        self._save([value.buffer for value in inputs])
        wanted = tuple((value.maker, value.size) for value in inputs if value.maker is not None)
        if not wanted:
            return Value(output.buffer, output.size, None)
        recipe.users = 1
        return Value(output.buffer, output.size, self._node(wanted, False, (), (), (), recipe))

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
        self._play(last.maker, start, ())

    def _play(self, last: int, start: Buffer, leaves: Sequence[int]) -> list[Buffer]:
        """Backward from the operation `last`, whose gradient is `start`; gives the gradients of `leaves`."""
        waiting = {last: start}
        for number in range(len(self._operations) - 1, -1, -1):
            if number in leaves:
                continue
            gradient = waiting.pop(number, None)
            if gradient is None:
                continue
            operation = self._operations[number]
            for recipe in operation.recipes:
                self._follow(recipe)
            for scratch in operation.scratch:
                self._take(scratch)
            if operation.own is not None:
                results = self._through(operation.own, gradient)
            elif operation.passes:
                results = [gradient for _ in operation.inputs]
            else:
                results = [Buffer(size, "flow") for _, size in operation.inputs]
            if operation.own is None:
                for result in results:
                    self._take(result, again=operation.passes)
            self.drop(*operation.scratch, *operation.saved, gradient)
            for recipe in operation.recipes:
                self._leave(recipe)
            for (maker, _), result in zip(operation.inputs, results, strict=True):
                self._accumulate(waiting, maker, result)
        found = [waiting.pop(leaf) for leaf in leaves]
        assert not waiting, "a gradient was left over"
        return found

    def _follow(self, recipe: _Recipe) -> None:
        """Computes the recipe's output again, with its graph, unless it is there."""
        if recipe.tape is None:
            recipe.tape = inner = Tape(around=self)
            recipe.leaves = tuple(
                Value(value.buffer, value.size, None if value.maker is None else inner._node((), False, (), ()))
                for value in recipe.inputs
            )
            recipe.output = recipe.function(inner, *recipe.leaves)

    def _through(self, recipe: _Recipe, gradient: Buffer) -> list[Buffer]:
        """The gradients of the recipe's inputs; `gradient` stays until they are there."""
        self._follow(recipe)
        assert recipe.tape is not None
        assert recipe.output is not None
        assert recipe.output.maker is not None
        self._take(gradient, again=True)
        wanted = [leaf.maker for leaf in recipe.leaves if leaf.maker is not None]
        found = recipe.tape._play(recipe.output.maker, gradient, wanted)
        self._leave(recipe)
        return found

    def _leave(self, recipe: _Recipe) -> None:
        recipe.users -= 1
        if recipe.users == 0:
            self.drop(*recipe.inputs, *([] if recipe.output is None else [recipe.output]))

    def _save(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            self._take(buffer, again=True)
            self._call(buffer, "saved")

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
        self,
        inputs: tuple[tuple[int, int], ...],
        passes: bool,
        saved: tuple[Buffer, ...],
        scratch: tuple[Buffer, ...],
        recipes: tuple[_Recipe, ...] = (),
        own: _Recipe | None = None,
    ) -> int:
        self._operations.append(_Operation(inputs, passes, saved, scratch, recipes, own))
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
        self._measure()

    def _measure(self) -> None:
        if self._around is not None:
            self._around._measure()
        elif self.total > self.peak.total:
            self.peak = Peak(self.total, dict(self.live))
