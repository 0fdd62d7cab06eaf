"""The forward of a causal language model with `completion_cross_entropy` in place of its output layer and loss.

With labels, it runs the decoder and then the loss, without logits. What the model does to its logits (a cap, a scale)
is read from its configuration and compared with what its own code does to made-up logits; a model that does anything
else keeps its own loss.

A batch may have `label_positions`, the result of `labeled_positions`, made by the collator: without it the host waits
for the device to count the labels. For batches of one static shape it may be padded with positions that predict
nothing.
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
    cross_entropy_sums,
    labeled_positions,
    mean_loss,
    shift_labels,
)
from fastprice_kernels.patching.decoder_layer import ROWS
from fastprice_kernels.patching.installation import PATCH
from fastprice_kernels.patching.structure import logit_transform

__all__ = ["LossPatch", "loss_forward", "output_class", "unsupported_loss"]

POSITIONS = "label_positions"
_KEEP = ("logits_to_keep", "num_logits_to_keep")  # the second in Unsloth's forwards
_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index", *_KEEP)


@dataclass(frozen=True)
class LossPatch:
    """What the new forward of a causal language model reads.

    Attributes:
        previous: the forward that the model had of its own, or None.
        rows: whether the last layer runs at labeled positions alone.
        softcap, scale: of the logits.
        output: the class of the result.
        free: bytes that a chunk of logits may take at any rate (`chunk_rows`).
    """

    previous: Callable[..., Any] | None
    rows: bool
    softcap: float | None
    scale: float
    output: type[Any]
    free: int


def unsupported_loss(causal: Any) -> str | None:
    """The reason why `completion_cross_entropy` cannot replace the model's output layer and loss; None if it can."""
    get_lm_head = getattr(causal, "get_output_embeddings", None)
    lm_head = get_lm_head() if get_lm_head is not None else None
    if type(lm_head) is not nn.Linear:
        return f"its output layer is a {type(lm_head).__name__}, not a plain Linear"
    loss = getattr(getattr(causal, "loss_function", None), "__name__", "none")
    if loss != "ForCausalLMLoss":
        return f"its loss function is {loss}"
    decoder = getattr(causal, causal.base_model_prefix, None)
    if not isinstance(decoder, nn.Module):
        return "it has no decoder of its own"
    previous = causal.__dict__.get("forward")
    if previous is not None and getattr(previous, "__name__", "") != "_chunked_ce_forward":  # TRL's chunked loss
        return "its forward was replaced by something else"
    made_up = torch.linspace(-60, 60, 3 * lm_head.out_features, device=lm_head.weight.device).view(1, 3, -1)
    softcap, scale = logit_transform(causal)
    want = made_up * scale
    want = want if softcap is None else softcap * torch.tanh(want / softcap)
    try:
        got = _run_with_logits(causal, decoder, lm_head, made_up)
    except Exception as error:  # code of any model, on stand-ins: whatever it raises is the reason
        return f"its forward does not run with stand-ins for decoder and output layer: {error}"
    if got is None or got.shape != want.shape or not torch.allclose(got, want, rtol=1e-4, atol=1e-4):
        return "it does something to its logits that is neither a scale nor a cap from its configuration"
    return None


def _run_with_logits(causal: Any, decoder: nn.Module, lm_head: nn.Linear, logits: Tensor) -> Tensor | None:
    """The logits that the model's own code returns if its output layer gives `logits` (1, S, V)."""
    hidden = logits.new_zeros(1, logits.shape[1], lm_head.in_features)

    class Output(SimpleNamespace):
        def __getattr__(self, name: str) -> None:
            return None

    stand_ins: list[tuple[nn.Module, Callable[..., Any]]] = [
        (decoder, lambda self, *args, **kwargs: Output(last_hidden_state=hidden)),
        (lm_head, lambda self, x: logits),
    ]
    before = [(module, module.__dict__.get("forward")) for module, _ in stand_ins]
    try:
        for module, stand_in in stand_ins:
            module.__dict__["forward"] = MethodType(stand_in, module)
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
    """The class of the new forward's results: a `CausalLMOutputWithPast` with statistics of the loss."""
    from transformers.modeling_outputs import CausalLMOutputWithPast  # installed, since the model is one of its

    @dataclass
    class LossHeadOutput(CausalLMOutputWithPast):  # type: ignore[misc]
        """A `CausalLMOutputWithPast` without logits; TRL's trainer reads the last three, 0-dim tensors."""

        num_valid_tokens: Tensor | None = None
        num_correct_tokens: Tensor | None = None
        entropy_sum: Tensor | None = None

    return LossHeadOutput


def loss_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """The forward for causal language models of class `kind`: its own signature, and no logits where it has labels."""
    stock = kind.forward
    names = list(inspect.signature(stock).parameters)[1:]

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch: LossPatch | None = self.__dict__.get(PATCH)
        if patch is None:  # uninstalled, but still inside accelerate's wrapper
            return stock(self, *args, **kwargs)
        kwargs.update(zip(names, args, strict=False))
        positions = kwargs.pop(POSITIONS, None)
        has_labels = kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None
        keep = [kwargs.get(name, 0) for name in _KEEP]
        wants_logits = any(isinstance(each, Tensor) or each for each in keep) or kwargs.get("return_dict") is False
        if not has_labels or wants_logits or kwargs.get("output_router_logits"):
            return stock(self, **kwargs) if patch.previous is None else patch.previous(**kwargs)
        return _forward_with_loss(self, patch, positions, kwargs)

    return forward


def _forward_with_loss(self: Any, patch: LossPatch, positions: Tensor | None, kwargs: dict[str, Any]) -> Any:
    labels, shifted, items, ignore, *_ = (kwargs.pop(name, None) for name in _LOSS_ARGUMENTS)
    ignore = -100 if ignore is None else ignore
    lm_head = self.get_output_embeddings()
    labels = (shift_labels(labels, ignore) if shifted is None else shifted).to(lm_head.weight.device)
    wants_states = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
    rows = chunk = None
    if patch.rows and not wants_states:
        rows = labeled_positions(labels, ignore_index=ignore, shift=False) if positions is None else positions
        rows = rows if rows.numel() else None
        kwargs |= {} if rows is None else {ROWS: rows}
    outputs = getattr(self, self.base_model_prefix)(**kwargs)
    hidden = outputs.last_hidden_state
    located = positions if rows is None else rows
    if located is not None:
        # The budget of a chunk counts all positions: gathering the labeled ones takes no memory away from it.
        count = located.numel()
        trains = lm_head.weight.requires_grad and torch.is_grad_enabled()
        capped = patch.softcap is not None
        chunk = chunk_rows(hidden, lm_head.weight, labels.numel(), count, capped=capped, trains=trains, free=patch.free)
    if rows is not None:
        labels = labels.reshape(-1)[rows][None]
        positions = torch.arange(rows.numel(), device=labels.device)
    sums = cross_entropy_sums(
        hidden,
        lm_head.weight,
        labels,
        bias=lm_head.bias,
        ignore_index=ignore,
        softcap=patch.softcap,
        logit_scale=patch.scale,
        positions=positions,
        chunk=chunk,
    )
    return patch.output(
        loss=mean_loss(sums, items),
        logits=None,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        num_valid_tokens=sums.labeled,
        num_correct_tokens=sums.correct,
        entropy_sum=sums.entropy,
    )
