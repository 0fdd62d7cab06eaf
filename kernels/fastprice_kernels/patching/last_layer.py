"""The end of a causal language model: its loss without logits, and its last layer at labelled positions alone.

With labels, the model's forward runs the decoder, and `completion_cross_entropy` in place of head and loss. What the
model does to its logits (a cap, a scale) is taken from its configuration and then compared with what its own code does
to made-up logits; a model that does anything else keeps its own head.

The last layer's output at a position without a label goes nowhere: no later layer attends to it, and the loss does not
read it. Its keys and values are needed, its output projection, MLP and final norm are not. So between attention and
output projection the labelled rows are gathered, and the rest of the model sees (1, M, D) hidden states in place of
(B, S, D), M labelled positions. For Llama-3.1-8B that leaves out 193 of the layer's 218 million weights' products at
those positions: 2.8 % of the whole model's at a small share of labels, 5.6 % for Llama-3.2-1B. The positions travel as
a keyword argument through the decoder (its layers hand unknown ones on to attention, which ignores them), so that a
layer recomputed in the backward gets the ones of its own forward.

A batch may bring the positions as `label_positions`, made where it was collated: else the host waits for the device to
learn how many there are. To give batches one static shape they may be padded with positions that predict nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastprice_kernels.ops.completion_cross_entropy import (
    chunk_rows,
    completion_cross_entropy_with_statistics,
    labelled_positions,
    shifted_labels,
)
from fastprice_kernels.patching.layers import Symbol

__all__ = ["Head", "head_forward", "head_trouble", "last_decoder_layer", "layer_forward", "layer_trouble"]

PATCH = "_fastprice_patch"  # in the __dict__ of a module whose forward was replaced: what that forward needs
POSITIONS = "label_positions"  # what a batch may bring: `labelled_positions` of its labels
_ROWS = "fastprice_rows"
_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "ignore_index")


@dataclass(frozen=True)
class Head:
    """Beside a causal model's replaced forward: the one before, whether the last layer takes rows, cap and scale of the
    logits, and what the forward returns."""

    previous: Callable[..., Any] | None
    rows: bool
    softcap: float | None
    scale: float
    output: type[Any]


def head_trouble(causal: Any) -> str | None:
    """Why `completion_cross_entropy` cannot stand in for the model's head and loss, if it cannot."""
    get_head = getattr(causal, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, not a plain Linear"
    loss = getattr(getattr(causal, "loss_function", None), "__name__", "none")
    if loss != "ForCausalLMLoss":
        return f"its loss function is {loss}"
    decoder = getattr(causal, causal.base_model_prefix, None)
    if not isinstance(decoder, nn.Module):
        return "it has no decoder of its own"
    previous = causal.__dict__.get("forward")
    if previous is not None and getattr(previous, "__name__", "") != "_chunked_ce_forward":  # TRL's chunked loss
        return "its forward was replaced by something else"
    made_up = torch.linspace(-60, 60, 3 * head.out_features, device=head.weight.device).view(1, 3, -1)
    softcap, scale = logit_transform(causal)
    want = made_up * scale
    want = want if softcap is None else softcap * torch.tanh(want / softcap)
    try:
        got = _run_with_logits(causal, decoder, head, made_up)
    except (
        Exception
    ) as error:  # the forward of a model that was never seen: whatever it does not stand becomes a reason
        return f"its forward does not run on stand-ins for decoder and head: {error}"
    if got is None or got.shape != want.shape or not torch.allclose(got, want, rtol=1e-4, atol=1e-4):
        return "it does something to its logits that is neither a scale nor a cap from its configuration"
    return None


def logit_transform(causal: Any) -> tuple[float | None, float]:
    """(softcap, scale) of the logits by the configuration: Gemma's cap, Cohere's factor, Granite's divisor."""
    config = causal.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        scale = 1 / getattr(config, "logits_scaling", 1.0)
    return None if softcap is None else float(softcap), float(scale)


def _run_with_logits(causal: Any, decoder: nn.Module, head: nn.Linear, logits: Tensor) -> Tensor | None:
    """What the model's own code makes of `logits` (1, S, V), its decoder and head being stood in for."""
    width = head.in_features
    hidden = logits.new_zeros(1, logits.shape[1], width)

    class Output(SimpleNamespace):
        def __getattr__(self, name: str) -> None:
            return None

    stands: list[tuple[nn.Module, Callable[..., Any]]] = [
        (decoder, lambda self, *args, **kwargs: Output(last_hidden_state=hidden)),
        (head, lambda self, x: logits),
    ]
    before = [(module, module.__dict__.get("forward")) for module, _ in stands]
    try:
        for module, stand in stands:
            module.__dict__["forward"] = MethodType(stand, module)
        with torch.no_grad():
            ids = torch.zeros(1, logits.shape[1], dtype=torch.long, device=logits.device)
            output = type(causal).forward(causal, input_ids=ids, use_cache=False)
    finally:
        for module, forward in before:
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward
    logits_out = getattr(output, "logits", None)
    return logits_out if isinstance(logits_out, Tensor) else None


@functools.cache
def output_class() -> type[Any]:
    """A `CausalLMOutputWithPast` that carries what the loss head knows besides."""
    from transformers.modeling_outputs import CausalLMOutputWithPast  # the model at hand is one of transformers'

    @dataclass
    class LossHeadOutput(CausalLMOutputWithPast):  # type: ignore[misc]
        """A `CausalLMOutputWithPast` without logits; the last three as TRL's trainer reads them (0-dim tensors)."""

        num_valid_tokens: Tensor | None = None
        num_correct_tokens: Tensor | None = None
        entropy_sum: Tensor | None = None

    return LossHeadOutput


def head_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """The forward for causal models of class `kind`: its own signature, and no logits where there are labels."""
    stock = kind.forward
    names = list(inspect.signature(stock).parameters)[1:]

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch: Head | None = self.__dict__.get(PATCH)
        if patch is None:  # uninstalled, but still inside accelerate's wrapper
            return stock(self, *args, **kwargs)
        kwargs.update(zip(names, args, strict=False))
        positions = kwargs.pop(POSITIONS, None)
        labelled = kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None
        keep = kwargs.get("logits_to_keep", 0)
        wants_logits = isinstance(keep, Tensor) or bool(keep) or kwargs.get("return_dict") is False
        if not labelled or wants_logits or kwargs.get("output_router_logits"):
            return stock(self, **kwargs) if patch.previous is None else patch.previous(**kwargs)
        return _forward_with_loss(self, patch, positions, kwargs)

    return forward


def _forward_with_loss(self: Any, patch: Head, positions: Tensor | None, kwargs: dict[str, Any]) -> Any:
    labels, shifted, items, _, ignore = (kwargs.pop(name, None) for name in _LOSS_ARGUMENTS)
    ignore = -100 if ignore is None else ignore
    head = self.get_output_embeddings()
    shift = shifted is None
    labels = (labels if shift else shifted).to(head.weight.device)
    wants_states = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
    rows = chunk = None
    if patch.rows and not wants_states:
        rows = labelled_positions(labels, ignore_index=ignore, shift=shift) if positions is None else positions
        rows = rows if rows.numel() else None
        kwargs |= {} if rows is None else {_ROWS: rows}
    outputs = getattr(self, self.base_model_prefix)(**kwargs)
    hidden = outputs.last_hidden_state
    if rows is not None:
        # One chunk's size goes by all positions: those that were left out make no room scarcer.
        trains = head.weight.requires_grad and torch.is_grad_enabled()
        capped = patch.softcap is not None
        chunk = chunk_rows(hidden, head.weight, labels.numel(), rows.numel(), capped=capped, trains=trains)
        # The label that a position predicts is the next one, which is never in the next row of the batch.
        labels, shift = shifted_labels(labels, ignore, shift)[rows][None], False
        positions = torch.arange(rows.numel(), device=labels.device)
    loss, statistics = completion_cross_entropy_with_statistics(
        hidden,
        head.weight,
        labels,
        bias=head.bias,
        ignore_index=ignore,
        num_items=items,
        softcap=patch.softcap,
        logit_scale=patch.scale,
        shift=shift,
        positions=positions,
        chunk=chunk,
    )
    return patch.output(
        loss=loss,
        logits=None,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        num_valid_tokens=statistics.labelled,
        num_correct_tokens=statistics.correct,
        entropy_sum=statistics.entropy,
    )


def last_decoder_layer(causal: Any) -> nn.Module | None:
    """The last layer that the decoder runs, if it keeps them in `layers`."""
    layers = getattr(getattr(causal, causal.base_model_prefix, None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    last: nn.Module = layers[min(len(layers), causal.config.get_text_config().num_hidden_layers) - 1]
    return last


def layer_trouble(layer: nn.Module | None) -> str | None:
    """Why the layer cannot run from the output projection on at some positions alone, if it cannot."""
    if layer is None:
        return "the decoder does not keep its layers in `layers`"
    if "forward" in layer.__dict__:
        return "its forward was replaced by something else"
    x = Symbol("x")
    stub = SimpleNamespace(
        input_layernorm=lambda x: Symbol("norm", x),
        post_attention_layernorm=lambda x: Symbol("norm 2", x),
        mlp=lambda x: Symbol("mlp", x),
        self_attn=lambda hidden_states, **_: (Symbol("attention", hidden_states), None),
    )
    between = x + Symbol("attention", Symbol("norm", x))
    want = between + Symbol("mlp", Symbol("norm 2", between))
    try:
        same = bool(type(layer).forward(stub, x) == want)
    except (AttributeError, TypeError):  # it has other parts, or does something else with them
        same = False
    if not same:
        return "its code is not x + attention(norm(x)), then x + mlp(norm(x))"
    if not isinstance(getattr(getattr(layer, "self_attn", None), "o_proj", None), nn.Module):
        return "its attention has no o_proj"
    return None


def layer_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A decoder layer that gives (1, M, D), the rows asked for in `fastprice_rows`; without those its stock forward."""
    rows: Tensor | None = kwargs.pop(_ROWS, None)
    if rows is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)

    def gather(x: Tensor) -> Tensor:
        return x.flatten(0, -2)[rows][None]

    if args:
        raise TypeError(
            f"{type(self).__name__} at labelled positions takes its arguments by name, got {len(args)} more"
        )
    hook = self.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: gather(inputs[0]))
    try:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    finally:
        hook.remove()
    between = gather(hidden_states) + attended
    return between + self.mlp(self.post_attention_layernorm(between))
