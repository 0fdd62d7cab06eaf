"""Puts the kernels under a model, and takes them out again.

What is replaced is the `forward` of single modules, on the instance, so that names, parameters, state dicts and classes
stay what they were, and `uninstall` only has to delete it:

- q, k and v of an attention layer: whichever is called first computes all three with one pass over x for their
  down-projections, the other two pick up their results. The rest of the attention layer runs as it was written.
- an MLP whose code is `down(act(gate(x)) * up(x))` with silu or gelu (found out by running it, see _layers.py):
  `lora_mlp`.
- every other LoRA layer on a `Linear` or an NF4 `Linear4bit`, and every such `Linear4bit` without an adapter.
- on request the loss of the causal language model (`loss_head`) and the last layer's work at unlabelled positions
  (`last_layer`); see last_layer.py.

A model of Unsloth's keeps Unsloth's fused layers; the dequantisation that they call is replaced for the whole process
(_unsloth.py).

What a layer computes is read at each call, because adapters come, go, merge and change their dropout while a model
lives; whatever the kernels cannot do exactly goes to the stock path, with one warning that says why. Up to 16 rows
without gradient on a 4-bit layer (generation) go there too: bitsandbytes has a kernel of its own for them.

Precision. Products run in the dtype in which bitsandbytes runs its own (`compute_dtype`; for 16-bit weights and under
autocast as `torch.nn.Linear`), the adapter's with it; PEFT alone runs a float32 adapter's products in float32.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastprice_kernels import _unsloth
from fastprice_kernels import last_layer as heads
from fastprice_kernels._layers import Layer, activation_of, hooked, is_candidate, is_gated, read, together
from fastprice_kernels.last_layer import PATCH
from fastprice_kernels.lora import Projection, lora_mlp, lora_projections

__all__ = ["InstallReport", "install", "installed", "uninstall"]

_INSTALLATION = "_fastprice_installation"
_ACCELERATE = "_original_forward"  # where accelerate keeps the forward that it wraps
_DECODE_ROWS = 16
_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class InstallReport:
    """What `install` did: `replaced` maps a module's name to the kernel it runs now, `kept` to why it stays stock."""

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{count} x {kernel}" for kernel, count in Counter(self.replaced.values()).items()]
        lines += [f"{count} x stock: {reason}" for reason, count in Counter(self.kept.values()).items()]
        return "\n".join(lines) or "nothing to replace"


@dataclass(frozen=True)
class _Options:
    loss_head: bool = False
    last_layer: bool = False
    keep_dense: bool = False
    augmented: bool = False


@dataclass
class _Installation:
    options: _Options
    report: InstallReport = field(default_factory=InstallReport)
    forwards: list[tuple[nn.Module, Any, Any]] = field(default_factory=list)  # module, its own forward before, ours
    spared: list[nn.Module] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    unsloth: bool = False


@dataclass
class _Pending:
    """Results of one x that wait to be picked up by the modules that share it. It holds x, whose identity counts."""

    x: Tensor
    key: tuple[Any, ...]
    results: dict[int, Tensor]


@dataclass
class _Patch:
    """Beside the replaced forward of linear layers and MLPs: the installation, the layer around that may be recomputed,
    the modules that share x with it, and an MLP's activation."""

    installation: _Installation
    around: nn.Module | None
    siblings: tuple[nn.Module, ...] = ()
    activation: str = "silu"
    pending: _Pending | None = None

    @property
    def arguments(self) -> dict[str, bool]:
        options, around = self.installation.options, self.around
        recomputes = around is not None and around.training and bool(getattr(around, "gradient_checkpointing", False))
        return {"keep_dense": options.keep_dense and recomputes, "augmented": options.augmented}


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

    Raises:
        ValueError: `last_layer` without `loss_head`.
        RuntimeError: an Unsloth whose functions have another shape than the ones this was written for.
    """
    if last_layer and not loss_head:
        raise ValueError("last_layer=True drops positions that only a loss can do without: it needs loss_head=True")
    options = _Options(loss_head, last_layer, keep_dense, augmented)
    before: _Installation | None = model.__dict__.get(_INSTALLATION)
    if before is not None:
        if before.options == options:
            return before.report
        uninstall(model)
    made = _Installation(options)
    if _unsloth.is_unsloth(model):
        made.report.replaced.update(dict.fromkeys(_unsloth.patch(), "dequantize_nf4"))
        made.unsloth = True
    else:
        _install_layers(model, made)
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
    made: _Installation | None = model.__dict__.get(_INSTALLATION)
    if made is None:
        return
    for module, _, ours in made.forwards:
        if ours not in (module.__dict__.get("forward"), module.__dict__.get(_ACCELERATE)):
            raise RuntimeError(f"the forward of a {type(module).__name__} was replaced after install: undo that first")
    for module, previous, ours in made.forwards:
        del module.__dict__[PATCH]
        # Accelerate wraps a model's forward for good; its wrapper then finds no patch and runs the stock forward.
        slot = "forward" if module.__dict__["forward"] == ours else _ACCELERATE
        del module.__dict__[slot]
        if previous is not None or slot == _ACCELERATE:
            module.__dict__[slot] = previous or MethodType(type(module).forward, module)
    for module in made.spared:
        module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
    if made.unsloth:
        _unsloth.unpatch()
    del model.__dict__[_INSTALLATION]


@contextmanager
def installed(model: nn.Module, **options: bool) -> Iterator[InstallReport]:
    """`install` on entry, what was there before on exit."""
    before: _Installation | None = model.__dict__.get(_INSTALLATION)
    try:
        yield install(model, **options)
    finally:
        if before is None:
            uninstall(model)
        else:
            install(model, **vars(before.options))


def _install_layers(model: nn.Module, made: _Installation) -> None:
    done: set[nn.Module] = set()
    named = [(name, module, dict(module.named_children())) for name, module in model.named_modules()]

    def take(names: Sequence[str], modules: Sequence[nn.Module], forward: Any, patch: _Patch, kernel: str) -> None:
        for name, module in zip(names, modules, strict=True):
            _replace(made, name, module, forward, patch, kernel)
            done.update(module.modules())
            _spare_weights(made, module)

    for name, module, children in named:
        patch = _Patch(made, _around(model, name))
        if all(part in children for part in _MLP):
            patch.activation = activation_of(module) or ""
            if patch.activation and _is_lora_mlp(module, [children[part] for part in _MLP]):
                take([name], [module], _mlp_forward, patch, "lora_mlp")
        elif all(part in children for part in _QKV):
            parts = patch.siblings = tuple(children[part] for part in _QKV)
            if (
                any(map(is_candidate, parts))
                and together([read(p) for p in parts])
                and not any(map(_is_replaced, parts))
            ):
                take([f"{name}.{part}" for part in _QKV], parts, _shared_forward, patch, "lora_qkv")
    for name, module, _ in named:
        if module in done or not is_candidate(module):
            continue
        found = read(module)
        if _is_replaced(module):
            made.report.kept[name] = "a forward that something else replaced"
        elif isinstance(found, Layer):
            take([name], [module], _linear_forward, _Patch(made, _around(model, name)), "lora_linear")
        else:
            made.report.kept[name] = found or "an adapter that is merged or switched off"
        done.update(module.modules())  # a base layer is no candidate of its own


def _is_replaced(module: nn.Module) -> bool:
    return "forward" in module.__dict__


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
    made: _Installation, name: str, module: nn.Module, forward: Callable[..., Any], patch: Any, kernel: str
) -> None:
    ours = MethodType(forward, module)
    made.forwards.append((module, module.__dict__.get("forward"), ours))
    module.__dict__["forward"], module.__dict__[PATCH] = ours, patch
    made.report.replaced[name] = kernel


def _spare_weights(made: _Installation, module: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in place when a model is evaluated on a CPU with AVX512-BF16:
    only its inference kernel reads what it leaves there, and training would go on with wrong weights."""
    for part in module.modules():
        if getattr(part, "support_avx512bf16_for_cpu", False):
            part.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            made.spared.append(part)


def _install_head(model: nn.Module, made: _Installation) -> None:
    get_base = getattr(model, "get_base_model", None)
    causal: Any = get_base() if get_base is not None else model
    names = {module: name for name, module in model.named_modules()}
    name = names[causal] or type(causal).__name__
    if made.unsloth:
        made.report.kept[name] = "the loss of an Unsloth model, whose forward follows conventions of its own"
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
            _replace(made, names[layer], layer, heads.layer_forward, None, "last layer at labelled positions")
            rows = True
        else:
            made.report.kept[f"{name}, last layer"] = f"the last layer: {trouble}"
    head = heads.Head(causal.__dict__.get("forward"), rows, *heads.logit_transform(causal), heads.output_class())
    _replace(made, name, causal, heads.head_forward(type(causal)), head, "completion_cross_entropy")


# What runs in place of a stock forward


def _stock(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


def _layers_for(patch: _Patch, x: Tensor, reads: Sequence[Layer | str | None]) -> list[Layer] | None:
    """The layers if the kernels are to run them on x; None sends the call to the stock path, after one warning."""
    layers = together(reads)
    if layers is None:
        for reason in reads:
            if isinstance(reason, str) and reason not in patch.installation.warned:
                patch.installation.warned.add(reason)
                warnings.warn(f"fastprice_kernels goes back to the stock path: {reason}", stacklevel=4)
        return None
    decodes = not torch.is_grad_enabled() and x.numel() <= _DECODE_ROWS * x.shape[-1]
    return None if decodes and layers[0].projection.quant_state is not None else layers


def _run(function: Callable[..., Any], x: Tensor, layers: Sequence[Layer], **options: Any) -> tuple[Tensor, ...]:
    """`function(x, projections)` in the dtype that 4-bit layers compute in, its results in that of x."""
    projections = [layer.projection for layer in layers]
    if projections[0].quant_state is None:
        return function(x, projections, **options)  # type: ignore[no-any-return]
    with torch.autocast(x.device.type, enabled=False):
        results = function(x.to(layers[0].dtype or x.dtype), projections, **options)
    return tuple(result.to(x.dtype) for result in results)


def _mlp(x: Tensor, projections: Sequence[Projection], **options: Any) -> tuple[Tensor]:
    return (lora_mlp(x, *projections, **options),)


def _linear_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    patch: _Patch = self.__dict__[PATCH]
    layers = None if args or kwargs else _layers_for(patch, x, [read(self)])
    if layers is None:
        return _stock(self, x, *args, **kwargs)
    return _run(lora_projections, x, layers, **patch.arguments)[0]


def _shared_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    patch: _Patch = self.__dict__[PATCH]
    me = patch.siblings.index(self)
    # Compiled code makes a graph break of every question about a version counter; inference tensors have none.
    version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
    key = (version, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
    pending = patch.pending
    if pending is not None and pending.x is x and pending.key == key and me in pending.results:
        y = pending.results.pop(me)
        patch.pending = pending if pending.results else None
        return y
    patch.pending = None
    layers = None if args or kwargs else _layers_for(patch, x, [read(sibling) for sibling in patch.siblings])
    if layers is None:
        return _linear_forward(self, x, *args, **kwargs)
    y, *others = _run(lora_projections, x, layers[me:] + layers[:me], **patch.arguments)
    patch.pending = _Pending(x, key, {(me + 1 + i) % len(layers): other for i, other in enumerate(others)})
    return y


def _mlp_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    patch: _Patch = self.__dict__[PATCH]
    parts = [self.gate_proj, self.up_proj, self.down_proj]
    reads: list[Layer | str | None] = ["hooks on the layers of an MLP"] if hooked(*parts) else [read(p) for p in parts]
    layers = None if args or kwargs else _layers_for(patch, x, reads)
    if layers is None:
        return _stock(self, x, *args, **kwargs)
    return _run(_mlp, x, layers, activation=patch.activation, **patch.arguments)[0]
