"""Puts the kernels under a model, and removes them.

`install` replaces the `forward` of single modules, on the instance: names, parameters, state dicts and classes do not
change, and `uninstall` deletes the attribute. Replaced are: q, k and v of an attention layer, which share one product
with x; gated MLPs; every other LoRA layer on a `Linear` or an NF4 `Linear4bit`, and every such `Linear4bit` without an
adapter; norms, residual additions and rotary embeddings (norms.py, decoder_layer.py, rotary.py); optionally the loss
(causal_loss.py), and with it the last layer at labeled positions. On an Unsloth model its fused functions are replaced
instead (unsloth_functions.py), loss and last layer as its code has them (unsloth_layers.py); layers that it did not
fuse (with a bias, as in Qwen2) are treated as any others.

What a layer computes is read at each call; what the kernels cannot compute exactly runs on the stock path, with one
warning. So do up to 16 rows without gradient on a 4-bit layer (generation), for which bitsandbytes has a kernel.

Products run in the dtype in which bitsandbytes runs its own (`compute_dtype`; for 16-bit weights and under autocast as
`torch.nn.Linear`), those of the adapter too; PEFT alone would run the products of a float32 adapter in float32.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from fastprice_kernels.patching import cpu_faults, unsloth_functions, unsloth_layers
from fastprice_kernels.patching.causal_loss import LossPatch, loss_forward, output_class, unsupported_loss
from fastprice_kernels.patching.decoder_layer import LayerPatch, layer_forward
from fastprice_kernels.patching.forwards import linear_forward, mlp_forward, shared_forward
from fastprice_kernels.patching.installation import INSTALLATION, PATCH, Installation, InstallReport, Options, Patch
from fastprice_kernels.patching.linear_layers import Layer, compatible, has_hooks, is_candidate, read_layer
from fastprice_kernels.patching.norms import NormPatch, norm_forward
from fastprice_kernels.patching.resident import make_resident
from fastprice_kernels.patching.rotary import attention_forward, unsupported_attention
from fastprice_kernels.patching.structure import (
    ATTENTION,
    FEED_FORWARD,
    MLP,
    OUTPUT,
    QKV,
    activation_of,
    causal_model,
    decoder_layers,
    is_gated_mlp,
    layer_norms,
    logit_transform,
    norm_kind,
)

__all__ = ["InstallReport", "install", "installed", "uninstall"]

_REPLACED = "a forward that something else replaced"
_OTHER_LAYER = "its code is not x + attention(norm(x)), then x + mlp(norm(x))"
_ACCELERATE = "_original_forward"  # the attribute with the forward that accelerate wraps


def install(
    model: nn.Module,
    *,
    loss_head: bool = False,
    last_layer: bool = False,
    keep_dense: bool = False,
    augmented: bool = False,
    free_loss_bytes: int = 0,
    mlp_tile: int | None = None,
    dense_layers: int = 0,
) -> InstallReport:
    """Puts the kernels under a PEFT or Unsloth model, or a plain transformers model with 4-bit layers.

    Args:
        loss_head: with labels, compute the loss by `completion_cross_entropy`; the output's `logits` are then None, and
            it has `num_valid_tokens`, `num_correct_tokens` and `entropy_sum`.
        last_layer: run the last layer's output projection and MLP at labeled positions alone.
        keep_dense: under activation checkpointing save a layer's dequantized weights from its recomputation to its
            backward: a step dequantizes twice instead of three times, for the memory of one layer's weights.
        augmented: the augmented form of the LoRA products (see ops/lora_products.py).
        free_loss_bytes: bytes of memory, needed by nothing else, that a chunk of `loss_head` may take: enough of them
            read the output layer once a product, not once for each of many chunks (`chunk_rows`).
        mlp_tile: compute MLPs for so many rows at a time (see ops/lora_mlp.py), for packs whose gate, up and product
            would not fit; the backward computes them again.
        dense_layers: dequantize the NF4 weights of so many decoder layers, the last ones, once (see resident.py). The
            report has their bytes; a layer with hooks before its forward, which may move its weights, is left out.

    The MLP of a decoder layer with `recompute_mlp = True` in its `__dict__` saves neither gate nor up.

    Installing again changes nothing, or the options. Layers that stay stock are in the report and in one warning.

    While the kernels are installed, bitsandbytes repacks no 4-bit layer for inference on a CPU. Layers that an
    evaluation repacked before are unpacked, with a warning: their scales remain rounded to bf16.

    Raises:
        ValueError: `last_layer` without `loss_head`, or a number that is impossible.
        RuntimeError: repacked 4-bit layers in another layout than that of bitsandbytes 0.50.2, or an Unsloth with other
            functions than the one this was written for.
    """
    if last_layer and not loss_head:
        raise ValueError("last_layer=True computes nothing at positions without a label: it needs loss_head=True")
    if dense_layers < 0 or (mlp_tile is not None and mlp_tile < 1):
        raise ValueError(f"dense_layers={dense_layers} and mlp_tile={mlp_tile}: a number of layers, and rows of a tile")
    options = Options(loss_head, last_layer, keep_dense, augmented, free_loss_bytes, mlp_tile, dense_layers)
    before: Installation | None = model.__dict__.get(INSTALLATION)
    if before is not None:
        if before.options == options:
            return before.report
        uninstall(model)
    repacked = [module for module in model.modules() if cpu_faults.is_repacked(module)]
    for layer in repacked:
        cpu_faults.unpack(layer)
    if repacked:
        warnings.warn(cpu_faults.unpacked_warning(len(repacked)), stacklevel=2)
    made = Installation(options, repackable=cpu_faults.prevent_repacking(model))
    done: set[nn.Module] = set()
    if unsloth_functions.is_unsloth(model):
        _install_unsloth(model, made, done)
    _install_layers(model, made, done)
    if not made.unsloth:  # whose layers have fused norms and rotary embeddings of their own
        _install_norms(model, made)
        _install_decoder_layers(model, made)
    if loss_head:
        _install_loss(model, made)
    if dense_layers:
        make_resident(model, made.report, dense_layers)
    model.__dict__[INSTALLATION] = made
    reasons = Counter(made.report.skipped.values())
    if reasons:
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
        warnings.warn(f"fastprice_kernels leaves these on the stock path: {listed}", stacklevel=2)
    return made.report


def uninstall(model: nn.Module) -> None:
    """Restores what `install` replaced; does nothing to a model without kernels.

    Raises:
        RuntimeError: something else replaced a forward after `install`; remove that first.
    """
    made: Installation | None = model.__dict__.get(INSTALLATION)
    if made is None:
        return
    for module, name, _, ours in made.attributes:
        if ours not in (module.__dict__.get(name), module.__dict__.get(_ACCELERATE)):
            raise RuntimeError(f"the {name} of a {type(module).__name__} was replaced after install: undo that first")
    for module, name, previous, ours in made.attributes:
        module.__dict__.pop(PATCH, None)  # an attention layer of Unsloth has two attributes and one patch
        # Accelerate wraps a model's forward for good; its wrapper then finds no patch and runs the stock forward.
        slot = name if module.__dict__[name] == ours else _ACCELERATE
        del module.__dict__[slot]
        if previous is not None or slot == _ACCELERATE:
            module.__dict__[slot] = previous or MethodType(type(module).forward, module)
    for module in made.repackable:
        module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
    unsloth_functions.unpatch(made.unsloth)
    del model.__dict__[INSTALLATION]


@contextmanager
def installed(model: nn.Module, **options: Any) -> Iterator[InstallReport]:
    """`install` on entry; on exit the state of before."""
    before: Installation | None = model.__dict__.get(INSTALLATION)
    try:
        yield install(model, **options)
    finally:
        if before is None:
            uninstall(model)
        else:
            install(model, **vars(before.options))


def _install_unsloth(model: nn.Module, made: Installation, done: set[nn.Module]) -> None:
    """Unsloth's functions, in its modules and on this model; adds the layers they run to `done`."""
    places = unsloth_functions.patch(unsloth_functions.CORE)
    made.unsloth = unsloth_functions.CORE
    made.report.replaced.update((place, f"Unsloth's {place.rpartition('.')[2]}") for place in places)
    for name, module in model.named_modules():
        patch = Patch(made, _recomputed_around(model, name))
        for fused in unsloth_functions.find_fused(module):
            layers = [f"{name}.{layer}" for layer in fused.layers]
            _replace(made, layers, module, fused.attribute, fused.ours, patch, fused.kernel)
            parts = tuple(module.get_submodule(layer) for layer in fused.layers)
            patch.stacks += (parts[:2], parts[2:]) if fused.kernel == "lora_mlp" else (parts,)
            done.update(part for layer in fused.layers for part in module.get_submodule(layer).modules())
            if fused.attribute == "forward":
                done.add(module)


def _install_layers(model: nn.Module, made: Installation, done: set[nn.Module]) -> None:
    """Every layer that is not in `done`."""
    named = [(name, module, dict(module.named_children())) for name, module in model.named_modules()]

    def take(names: Sequence[str], modules: Sequence[nn.Module], forward: Any, patch: Patch, kernel: str) -> None:
        for name, module in zip(names, modules, strict=True):
            _replace(made, [name], module, "forward", MethodType(forward, module), patch, kernel)
            done.update(module.modules())

    for name, module, children in named:
        if module in done or any(child in done for child in children.values()):
            continue
        patch = Patch(made, _recomputed_around(model, name))
        if all(part in children for part in MLP):
            patch.activation = activation_of(module) or ""
            gate, up, down = (children[part] for part in MLP)
            patch.stacks = ((gate, up), (down,))
            if patch.activation and _is_lora_mlp(module, [gate, up, down]):
                take([name], [module], mlp_forward, patch, "lora_mlp")
        elif all(part in children for part in QKV):
            siblings = tuple(children[part] for part in QKV)
            patch.stacks = (siblings,)
            if _can_share(siblings):
                take([f"{name}.{part}" for part in QKV], siblings, shared_forward, patch, "lora_qkv")
    for name, module, _ in named:
        if module in done or not is_candidate(module):
            continue
        found = read_layer(module)
        if _is_replaced(module):
            made.report.skipped[name] = _REPLACED
        elif isinstance(found, Layer):
            patch = Patch(made, _recomputed_around(model, name), ((module,),))
            take([name], [module], linear_forward, patch, "lora_linear")
        else:
            reason = found or "an adapter that is merged or disabled"
            made.report.skipped[name] = reason + _stock_fault(module)
        done.update(module.modules())  # a base layer is not a candidate of its own


def _install_norms(model: nn.Module, made: Installation) -> None:
    for name, module in model.named_modules():
        found = None if _is_replaced(module) else norm_kind(module)
        if found is not None:
            _replace(made, [name], module, "forward", MethodType(norm_forward, module), NormPatch(*found), "norm")


def _install_decoder_layers(model: nn.Module, made: Installation) -> None:
    """Rotary embeddings, and residual additions with the norms behind them."""
    names = {module: name for name, module in model.named_modules()}
    for layer in decoder_layers(causal_model(model)):
        attention = getattr(layer, ATTENTION, None)
        if isinstance(attention, nn.Module):
            name, attention_class = names[attention], _class_of(attention)
            reason = _REPLACED if _is_replaced(attention) else unsupported_attention(attention_class)
            if reason is None:
                ours = MethodType(attention_forward(attention_class), attention)
                _replace(made, [name], attention, "forward", ours, None, "rotary embedding")
            else:
                made.report.skipped[name] = f"rotary embedding: {reason}"
        norms = None if _is_replaced(layer) else layer_norms(_class_of(layer))
        if norms is None:
            reason = (
                _REPLACED if _is_replaced(layer) else "its code is not x + attention(norm(x)), then x + mlp(norm(x))"
            )
            made.report.skipped[names[layer]] = f"residual additions: {reason}"
            continue
        ours = MethodType(layer_forward, layer)
        _replace(made, [names[layer]], layer, "forward", ours, LayerPatch(norms), "residual additions")
        for norm, part, projections in (
            (norms.before_attention, ATTENTION, QKV),
            (norms.before_feed_forward, FEED_FORWARD, MLP[:2]),
        ):
            patch, reader = getattr(layer, norm).__dict__.get(PATCH), getattr(layer, part)
            if isinstance(patch, NormPatch):
                patch.feeds_projections = all(hasattr(reader, projection) for projection in projections)


def _class_of(module: nn.Module) -> Any:
    """Its class, which can be the key of a cache, though by its type hints it cannot."""
    return type(module)


def _is_replaced(module: nn.Module) -> bool:
    return "forward" in module.__dict__


def _stock_fault(module: nn.Module) -> str:
    """The fault of the stock path of a layer that stays on it, to be added to the reason."""
    weight: Any = getattr(getattr(module, "base_layer", module), "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is None or weight.device.type != "cpu" or cpu_faults.stock_is_exact(state.shape[-1], state.blocksize):
        return ""
    return f" (and bitsandbytes computes rows of {state.shape[-1]} 4-bit weights with wrong scales on this CPU)"


def _can_share(layers: Sequence[nn.Module]) -> bool:
    return (
        any(map(is_candidate, layers))
        and not any(map(_is_replaced, layers))
        and compatible([read_layer(layer) for layer in layers]) is not None
    )


def _is_lora_mlp(module: nn.Module, layers: Sequence[nn.Module]) -> bool:
    return _can_share(layers) and not _is_replaced(module) and not has_hooks(*layers) and is_gated_mlp(type(module))


def _recomputed_around(model: nn.Module, name: str) -> nn.Module | None:
    """The nearest module around `name` that transformers may recompute in the backward."""
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if hasattr(module, "gradient_checkpointing"):
            return module
    return None


def _replace(
    made: Installation, names: Sequence[str], module: nn.Module, attribute: str, ours: Any, patch: Any, kernel: str
) -> None:
    """Sets the attribute to `ours`; `names`: of the layers that `kernel` then runs."""
    made.attributes.append((module, attribute, module.__dict__.get(attribute), ours))
    module.__dict__[attribute], module.__dict__[PATCH] = ours, patch
    made.report.replaced.update(dict.fromkeys(names, kernel))


def _install_loss(model: nn.Module, made: Installation) -> None:
    causal = causal_model(model)
    names = {module: name for name, module in model.named_modules()}
    name = names[causal] or type(causal).__name__
    theirs = bool(made.unsloth)
    reason = unsloth_layers.unsupported_loss(causal) if theirs else unsupported_loss(causal)
    if reason is not None:
        made.report.skipped[name] = f"output layer and loss: {reason}"
        return
    rows = False
    if made.options.last_layer:
        reason = _restrict_last_layer(made, causal, names)
        rows = reason is None
        if reason is not None:
            made.report.skipped[f"{name}, last layer"] = f"the last layer: {reason}"
    softcap, scale = logit_transform(causal)
    free = made.options.free_loss_bytes
    patch = LossPatch(causal.__dict__.get("forward"), rows, softcap, scale, output_class(), free)
    ours = MethodType(loss_forward(type(causal)), causal)
    _replace(made, [name], causal, "forward", ours, patch, "completion_cross_entropy")


def _restrict_last_layer(made: Installation, causal: Any, names: Mapping[nn.Module, str]) -> str | None:
    """Lets the last layer run at labeled positions alone, or returns the reason why it cannot."""
    layers = decoder_layers(causal)
    if not layers:
        return "the decoder has no list of layers"
    last, kernel = layers[-1], "last layer at labeled positions"
    if made.unsloth:
        reason = unsloth_layers.unsupported_last_layer(last)
        if reason is None:
            _replace(made, [names[last]], last, "forward", MethodType(unsloth_layers.layer_forward, last), None, kernel)
        return reason
    patch = last.__dict__.get(PATCH)
    if not isinstance(patch, LayerPatch):
        return _REPLACED if _is_replaced(last) else _OTHER_LAYER
    if not isinstance(getattr(getattr(last, ATTENTION), OUTPUT, None), nn.Module):
        return f"its attention has no {OUTPUT}"
    patch.takes_rows = True
    made.report.replaced[names[last]] = kernel
    return None
