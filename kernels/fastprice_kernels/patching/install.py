"""Puts the kernels under a model, and takes them out again.

What is replaced is the `forward` of single modules, on the instance, so that names, parameters, state dicts and classes
stay what they were, and `uninstall` only has to delete it:

- q, k and v of an attention layer: whichever is called first computes all three with one pass over x for their
  down-projections, the other two pick up their results. The rest of the attention layer runs as it was written.
- an MLP whose code is `down(act(gate(x)) * up(x))` with silu or gelu (found out by running it, see layers.py):
  `lora_mlp`.
- every other LoRA layer on a `Linear` or an NF4 `Linear4bit`, and every such `Linear4bit` without an adapter.
- on request the loss of the causal language model (`loss_head`) and the last layer's work at unlabelled positions
  (`last_layer`); see last_layer.py.

On a model of Unsloth's the fused functions that it hung on attention layers and MLPs give way to the same kernels, and
for the whole process its dequantisation and, with `loss_head`, its fused loss (unsloth_functions.py). Layers that it
did not fuse (with a bias, as Qwen2's) are treated as any others. Its last layer stays: its code is Unsloth's.

What a layer computes is read at each call, because adapters come, go, merge and change their dropout while a model
lives; whatever the kernels cannot do exactly goes to the stock path, with one warning that says why. Up to 16 rows
without gradient on a 4-bit layer (generation) go there too: bitsandbytes has a kernel of its own for them.

Precision. Products run in the dtype in which bitsandbytes runs its own (`compute_dtype`; for 16-bit weights and under
autocast as `torch.nn.Linear`), the adapter's with it; PEFT alone runs a float32 adapter's products in float32.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from fastprice_kernels.patching import cpu_faults, unsloth_functions
from fastprice_kernels.patching import last_layer as heads
from fastprice_kernels.patching.forwards import (
    Installation,
    InstallReport,
    Options,
    Patch,
    linear_forward,
    mlp_forward,
    shared_forward,
)
from fastprice_kernels.patching.last_layer import PATCH
from fastprice_kernels.patching.layers import Layer, activation_of, hooked, is_candidate, is_gated, read, together

__all__ = ["InstallReport", "install", "installed", "uninstall"]

_INSTALLATION = "_fastprice_installation"
_ACCELERATE = "_original_forward"  # where accelerate keeps the forward that it wraps
_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def install(
    model: nn.Module,
    *,
    loss_head: bool = False,
    last_layer: bool = False,
    keep_dense: bool = False,
    augmented: bool = False,
) -> InstallReport:
    """Puts the kernels under a PEFT or Unsloth model, or a plain transformers model with 4-bit layers.

    Args:
        loss_head: with labels, compute the loss by `completion_cross_entropy`; the output's `logits` are then None, and
            it carries `num_valid_tokens`, `num_correct_tokens` and `entropy_sum`.
        last_layer: and run the last layer's output projection and MLP at labelled positions alone.
        keep_dense: under gradient checkpointing keep a layer's dequantised weights from its recomputation to its
            backward: two dequantisations a step in place of three, for one layer's weights in memory.
        augmented: the augmented form of the LoRA products (see lora.py).

    Installing again changes nothing, or the options. Layers that stay stock are in the report, and in one warning.

    While the kernels are in, no 4-bit layer, stock or not, is repacked by bitsandbytes for inference on a CPU. Layers
    that an evaluation has repacked before are unpacked, with a warning: their scales stay rounded to bf16.

    Raises:
        ValueError: `last_layer` without `loss_head`.
        RuntimeError: repacked 4-bit layers whose layout is another than that of bitsandbytes 0.50.2.
        RuntimeError: an Unsloth whose functions have another shape than the ones this was written for.
    """
    if last_layer and not loss_head:
        raise ValueError("last_layer=True drops positions that only a loss can do without: it needs loss_head=True")
    options = Options(loss_head, last_layer, keep_dense, augmented)
    before: Installation | None = model.__dict__.get(_INSTALLATION)
    if before is not None:
        if before.options == options:
            return before.report
        uninstall(model)
    repacked = [module for module in model.modules() if cpu_faults.is_repacked(module)]
    for layer in repacked:
        cpu_faults.unpack(layer)
    if repacked:
        warnings.warn(cpu_faults.unpacked_warning(len(repacked)), stacklevel=2)
    made = Installation(options, spared=cpu_faults.spare(model))
    done: set[nn.Module] = set()
    if unsloth_functions.is_unsloth(model):
        _install_unsloth(model, made, done)
    _install_layers(model, made, done)
    if loss_head:
        _install_head(model, made)
    model.__dict__[_INSTALLATION] = made
    stock = Counter(made.report.kept.values())
    if stock:
        said = "; ".join(f"{count} x {reason}" for reason, count in stock.items())
        warnings.warn(f"fastprice_kernels leaves these on the stock path: {said}", stacklevel=2)
    return made.report


def uninstall(model: nn.Module) -> None:
    """Brings back what `install` replaced; a model without kernels is left alone.

    Raises:
        RuntimeError: something else replaced a forward after `install`; take that out first.
    """
    made: Installation | None = model.__dict__.get(_INSTALLATION)
    if made is None:
        return
    for module, name, _, ours in made.attributes:
        if ours not in (module.__dict__.get(name), module.__dict__.get(_ACCELERATE)):
            raise RuntimeError(f"the {name} of a {type(module).__name__} was replaced after install: undo that first")
    for module, name, previous, ours in made.attributes:
        module.__dict__.pop(PATCH, None)  # an attention layer of Unsloth's has two attributes and one patch
        # Accelerate wraps a model's forward for good; its wrapper then finds no patch and runs the stock forward.
        slot = name if module.__dict__[name] == ours else _ACCELERATE
        del module.__dict__[slot]
        if previous is not None or slot == _ACCELERATE:
            module.__dict__[slot] = previous or MethodType(type(module).forward, module)
    for module in made.spared:
        module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
    unsloth_functions.unpatch(made.unsloth)
    del model.__dict__[_INSTALLATION]


@contextmanager
def installed(model: nn.Module, **options: bool) -> Iterator[InstallReport]:
    """`install` on entry, what was there before on exit."""
    before: Installation | None = model.__dict__.get(_INSTALLATION)
    try:
        yield install(model, **options)
    finally:
        if before is None:
            uninstall(model)
        else:
            install(model, **vars(before.options))


def _install_unsloth(model: nn.Module, made: Installation, done: set[nn.Module]) -> None:
    """Unsloth's functions for the process, and what it hung on this model; `done`: the layers that are taken."""
    places = unsloth_functions.patch(unsloth_functions.CORE)
    made.unsloth = unsloth_functions.CORE
    made.report.replaced.update((place, f"Unsloth's {place.rpartition('.')[2]}") for place in places)
    for name, module in model.named_modules():
        found = unsloth_functions.find_fused(module)
        patch = Patch(made, _around(model, name))
        for attribute, ours, parts, kernel in found:
            _replace(made, [f"{name}.{part}" for part in parts], module, attribute, ours, patch, kernel)
            done.update(part for layer in parts for part in module.get_submodule(layer).modules())
        done.update([module] if any(attribute == "forward" for attribute, *_ in found) else [])


def _install_layers(model: nn.Module, made: Installation, done: set[nn.Module]) -> None:
    """Every layer but those that are `done`."""
    named = [(name, module, dict(module.named_children())) for name, module in model.named_modules()]

    def take(names: Sequence[str], modules: Sequence[nn.Module], forward: Any, patch: Patch, kernel: str) -> None:
        for name, module in zip(names, modules, strict=True):
            _replace(made, [name], module, "forward", MethodType(forward, module), patch, kernel)
            done.update(module.modules())

    for name, module, children in named:
        if module in done or any(child in done for child in children.values()):
            continue
        patch = Patch(made, _around(model, name))
        if all(part in children for part in _MLP):
            patch.activation = activation_of(module) or ""
            if patch.activation and _is_lora_mlp(module, [children[part] for part in _MLP]):
                take([name], [module], mlp_forward, patch, "lora_mlp")
        elif all(part in children for part in _QKV):
            parts = patch.siblings = tuple(children[part] for part in _QKV)
            if (
                any(map(is_candidate, parts))
                and together([read(p) for p in parts])
                and not any(map(_is_replaced, parts))
            ):
                take([f"{name}.{part}" for part in _QKV], parts, shared_forward, patch, "lora_qkv")
    for name, module, _ in named:
        if module in done or not is_candidate(module):
            continue
        found = read(module)
        if _is_replaced(module):
            made.report.kept[name] = "a forward that something else replaced"
        elif isinstance(found, Layer):
            take([name], [module], linear_forward, Patch(made, _around(model, name)), "lora_linear")
        else:
            reason = found or "an adapter that is merged or switched off"
            made.report.kept[name] = reason + _stock_fault(module)
        done.update(module.modules())  # a base layer is no candidate of its own


def _is_replaced(module: nn.Module) -> bool:
    return "forward" in module.__dict__


def _stock_fault(module: nn.Module) -> str:
    """What is wrong with the stock path of a layer that stays on it, to be added to the reason."""
    weight: Any = getattr(getattr(module, "base_layer", module), "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is None or weight.device.type != "cpu" or cpu_faults.stock_is_exact(state.shape[-1], state.blocksize):
        return ""
    return f" (and bitsandbytes computes rows of {state.shape[-1]} 4-bit weights with wrong scales on this CPU)"


def _is_lora_mlp(module: nn.Module, parts: Sequence[nn.Module]) -> bool:
    return (
        any(map(is_candidate, parts))
        and not any(map(_is_replaced, [module, *parts]))
        and together([read(part) for part in parts]) is not None
        and not hooked(*parts)
        and is_gated(type(module))
    )


def _around(model: nn.Module, name: str) -> nn.Module | None:
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
    """Puts `ours` on the module; `names`: of the layers that `kernel` then runs."""
    made.attributes.append((module, attribute, module.__dict__.get(attribute), ours))
    module.__dict__[attribute], module.__dict__[PATCH] = ours, patch
    made.report.replaced.update(dict.fromkeys(names, kernel))


def _install_head(model: nn.Module, made: Installation) -> None:
    get_base = getattr(model, "get_base_model", None)
    causal: Any = get_base() if get_base is not None else model
    names = {module: name for name, module in model.named_modules()}
    name = names[causal] or type(causal).__name__
    if made.unsloth:
        reason = unsloth_functions.loss_trouble(causal)
        if reason is None:
            places = unsloth_functions.patch([unsloth_functions.LOSS])
            made.unsloth = (*made.unsloth, unsloth_functions.LOSS)
            made.report.replaced.update(dict.fromkeys(places, "completion_cross_entropy"))
        else:
            made.report.kept[name] = reason
        if made.options.last_layer:
            made.report.kept[f"{name}, last layer"] = "the last layer of an Unsloth model, whose code is Unsloth's"
        return
    trouble = heads.head_trouble(causal)
    if trouble is not None:
        made.report.kept[name] = f"head and loss: {trouble}"
        return
    rows = False
    if made.options.last_layer:
        layer = heads.last_decoder_layer(causal)
        trouble = heads.layer_trouble(layer)
        if layer is not None and trouble is None:
            ours = MethodType(heads.layer_forward, layer)
            _replace(made, [names[layer]], layer, "forward", ours, None, "last layer at labelled positions")
            rows = True
        else:
            made.report.kept[f"{name}, last layer"] = f"the last layer: {trouble}"
    head = heads.Head(causal.__dict__.get("forward"), rows, *heads.logit_transform(causal), heads.output_class())
    ours = MethodType(heads.head_forward(type(causal)), causal)
    _replace(made, [name], causal, "forward", ours, head, "completion_cross_entropy")
