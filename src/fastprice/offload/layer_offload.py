"""Streaming: the frozen weights of decoder layers come from the host just before they are needed.

Every streamed layer has one slot for good: the k-th of them the slot k modulo the number of slots. Its tensors are
views of that slot from beginning to end, so nothing that autograd keeps between forward and backward (bitsandbytes
holds on to the packed weight and its statistics, our kernels likewise) ever looks at another address, and bringing a
layer back is one copy into its slot. Neighbors have different slots, in both directions: while one layer computes, the
next one (forward the one behind, backward the one before) is on its way into a slot that was left already. Nothing is
copied back: the weights do not change.

A layer is visited twice a micro-batch: once forward, once backward, whose recomputation under gradient checkpointing
falls into the same visit. The layers at the turn, still in their slots, are not copied again, and neither are the first
ones at the start of the next step: a step of m streamed layers in s slots costs 2 (m - s) copies.

What is not done: one visit for several micro-batches of an accumulated step. It would have to run all of them through
one layer before the next, against the order of every trainer, and keep all their inputs; a larger micro-batch gives
the same ratio of computing to copying.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprice.errors import ConfigError, StreamingError
from fastprice.models.parts import plain_model
from fastprice.offload.host_embedding import HostEmbedding
from fastprice.offload.host_layer import HostLayer, decoder_layers
from fastprice.offload.transfers import Boundary, boundary_for

__all__ = ["Streaming", "spread", "stream"]

_FORWARD, _BACKWARD = 1, -1


def spread(layers: int, count: int) -> list[int]:
    """Which `count` of `layers` to stream: evenly apart, the first and the last resident as far as possible.

    A copy into a slot can run while the layers since the last streamed one compute; between neighbors that is one
    layer's time, so streamed layers in one block would wait for the bus while resident ones elsewhere leave it idle.
    """
    if not 0 <= count <= layers:
        raise ConfigError(f"streaming: {count} of {layers} layers cannot be streamed")
    return [(2 * k + 1) * layers // (2 * count) for k in range(count)]


def stream(
    model: Any,
    streamed_layers: int | Sequence[int],
    *,
    slots: int = 2,
    boundary: Boundary | None = None,
    host_embedding: bool = False,
) -> Streaming:
    """Puts the frozen 4-bit weights of decoder layers on the host and streams them from there; a context manager.

    Args:
        model: a transformers causal model with bitsandbytes' Linear4bit layers, before or after PEFT put adapters on
            it, with or without `fastprice_kernels` under it.
        streamed_layers: how many (see `spread`), or the indices of which.
        slots: layers on the device at once; one computes, the others arrive.
        boundary: default: that of the model's device.
        host_embedding: keep the embedding's table on the host too, and send the rows that a batch looks up. Not for a
            table that is the head's weight as well.

    Raises:
        ConfigError: layers that are not there or have no frozen 4-bit weights, fewer than one slot, a tied table.
    """
    layers = decoder_layers(model)
    chosen = spread(len(layers), streamed_layers) if isinstance(streamed_layers, int) else sorted(set(streamed_layers))
    if any(not 0 <= index < len(layers) for index in chosen):
        raise ConfigError(f"streaming: the model has layers 0 to {len(layers) - 1}, not {chosen}")
    made = boundary or boundary_for(next(model.parameters()).device)
    hosts = {index: HostLayer(layers[index], made, f"layer {index}") for index in chosen}
    return Streaming(model, hosts, slots=slots, boundary=made, host_embedding=host_embedding)


@dataclass
class _Slot:
    """layer: which streamed layer (by its turn) it holds or awaits; arrival: the event of a copy nobody waited for;
    free: the event after its last reader."""

    flat: Tensor
    layer: int | None = None
    arrival: Any = None
    free: Any = None


class Streaming:
    """The streaming of one model; `stream` makes it. `visits` counts how often each layer (by its index) came in.

    `close` (also on leaving the context, also by an exception) takes it out and frees the slots. Until then the
    transformers model has an attribute `streamed_layers`, how many.
    """

    def __init__(
        self,
        model: Any,
        hosts: Mapping[int, HostLayer],
        *,
        slots: int = 2,
        boundary: Boundary,
        host_embedding: bool = False,
    ) -> None:
        if slots < 1:
            raise ConfigError(f"streaming: {slots} slots hold no layer; give at least 1")
        layers = decoder_layers(model)
        self.visits: Counter[int] = Counter()
        self.boundary = boundary
        self._indices = sorted(hosts)
        self._hosts = [hosts[index] for index in self._indices]
        self._open: int | None = None
        self._closed = False
        self._model = plain_model(model)
        self._handles: list[Any] = []
        self._slots: list[_Slot] = []
        self._embedding: HostEmbedding | None = None
        try:
            self._embedding = HostEmbedding(model, boundary) if host_embedding else None
            for turn in range(min(slots, len(self._hosts))):
                self._slots.append(_Slot(boundary.slot(max(host.size for host in self._hosts[turn::slots]))))
            for turn, (index, host) in enumerate(zip(self._indices, self._hosts, strict=True)):
                host.show(self._slot(turn).flat)
                self._hook(layers[index], turn)
            self._model.streamed_layers = len(self._hosts)
        except BaseException:
            self.close()
            raise

    @property
    def layers(self) -> list[int]:
        """The indices of the streamed layers."""
        return list(self._indices)

    @property
    def device_bytes(self) -> int:
        """Bytes of the slots: what the streamed layers take on the device."""
        return sum(slot.flat.numel() for slot in self._slots)

    @property
    def host_bytes(self) -> int:
        """Bytes of the streamed layers on the host, without the embedding's."""
        return sum(host.size for host in self._hosts)

    def close(self, *, resident: bool = False) -> None:
        """Takes the streaming out of the model and frees the slots; a second call does nothing.

        The weights stay on the host (which on a CPU is where the model computes). `resident` brings them to the
        device, as before `stream`: they must fit there.
        """
        if self._closed:
            return
        self._closed = True
        for handle in self._handles:
            handle.remove()
        self._model.__dict__.pop("streamed_layers", None)
        self.boundary.settle()
        for host in self._hosts:
            host.show(host.flat.to(self.boundary.device) if resident else host.flat)
        if self._embedding is not None:
            self._embedding.close(resident=resident)
        self._slots.clear()
        self._handles.clear()

    def __enter__(self) -> Streaming:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hook(self, layer: nn.Module, turn: int) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._enter(turn, _BACKWARD if _in_backward() else _FORWARD, around=_runs_again(module))
            if not torch.is_grad_enabled():
                return None
            if args:
                return (_AtStart.apply(args[0], self, turn), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": _AtStart.apply(kwargs["hidden_states"], self, turn)}

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if _in_backward():  # a recomputation: the visit lasts until the layer's gradients are there
                return None
            self._leave(turn, _FORWARD, around=_runs_again(module))
            if not torch.is_grad_enabled():
                return None
            if isinstance(output, Tensor):
                return _AtEnd.apply(output, self, turn)
            return (_AtEnd.apply(output[0], self, turn), *output[1:])

        self._handles += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        ]

    def _slot(self, turn: int) -> _Slot:
        return self._slots[turn % len(self._slots)]

    def _enter(self, turn: int, direction: int, *, around: bool = False) -> None:
        """The layer is needed now: what is queued from here on waits for its bytes, and the next layers set out."""
        if self._closed:
            raise StreamingError("the model is no longer streamed: run forward and backward before close()")
        if self._open == turn and direction == _BACKWARD:  # the recomputation within a visit
            return
        if self._open is not None:  # its forward failed, or its input wants no gradient, so nobody said that it left
            self._slot(self._open).free = self.boundary.mark()
        self._open = turn
        self.visits[self._indices[turn]] += 1
        slot = self._slot(turn)
        self._bring(turn)
        if slot.arrival is not None:
            try:
                self.boundary.wait(slot.arrival)
            except Exception as error:
                raise self._failure(turn, error) from error
            slot.arrival = None
        self._bring_next(turn, direction, around)

    def _leave(self, turn: int, direction: int, *, around: bool = False) -> None:
        """The layer has done what it was visited for: the next user of its slot may set out."""
        if self._open == turn:
            self._slot(turn).free = self.boundary.mark()
            self._open = None
            self._bring_next(turn, direction, around)

    def _bring_next(self, turn: int, direction: int, around: bool) -> None:
        """Sends each slot that is not in use its next layer; `around`: the first one follows the last."""
        count = len(self._hosts)
        taken = set() if self._open is None else {self._open % len(self._slots)}
        for ahead in range(1, 2 * len(self._slots)):
            following = turn + direction * ahead
            if around:
                following %= count
            if not 0 <= following < count:
                break
            if following % len(self._slots) not in taken:
                taken.add(following % len(self._slots))
                self._bring(following)

    def _bring(self, turn: int) -> None:
        slot = self._slot(turn)
        if slot.layer == turn:
            return
        host = self._hosts[turn]
        slot.layer = slot.arrival = None
        try:
            slot.arrival = self.boundary.copy(slot.flat[: host.size], host.flat, slot.free)
        except Exception as error:
            raise self._failure(turn, error) from error
        slot.layer = turn

    def _failure(self, turn: int, error: Exception) -> StreamingError:
        self._slot(turn).layer = None
        said = " ".join(str(error).split()) or type(error).__name__
        return StreamingError(
            f"streaming: layer {self._indices[turn]} could not be brought to the device: {said[:200]}"
        )


class _Border(torch.autograd.Function):
    """The identity on a tensor at a layer's border, whose backward tells the streaming."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, streaming: Streaming, turn: int) -> Tensor:
        ctx.streaming, ctx.turn = streaming, turn
        return x.view_as(x)


class _AtStart(_Border):
    """On a layer's input. Its backward runs when all gradients of the layer are there, as all of them that need frozen
    weights flow into the input's."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ctx.streaming._leave(ctx.turn, _BACKWARD)
        return gradient, None, None


class _AtEnd(_Border):
    """On a layer's output. Its backward is the first to run of the layer's."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ctx.streaming._enter(ctx.turn, _BACKWARD)
        return gradient, None, None


def _in_backward() -> bool:
    # What torch.utils.checkpoint asks too; there is no public way.
    return bool(torch._C._current_graph_task_id() != -1)


def _runs_again(layer: nn.Module) -> bool:
    """Whether the pass is followed by another forward pass (prediction), and not by a backward pass."""
    return not layer.training and not torch.is_grad_enabled()
