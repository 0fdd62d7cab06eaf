"""Makes each layer of a decoder keep what its level says (levels.py), and leaves the model as it was afterwards.

    with keeping(model, ["input"] * 12 + ["costly"] * 20):
        loss = model(**batch).loss
        loss.backward()

Losses and gradients are the same numbers at every level: what is computed again is computed by the same operations from
the same values, under the autocast state and the random numbers of the forward pass.

How, and what runs again when:

all      Nothing is done to the layer.
costly   Nothing of the layer's own forward runs twice, and none of its hooks. Each norm, and the product of an MLP's
         activation, becomes one autograd function that keeps its inputs alone. Whoever saves its output (a projection,
         for the gradient of its adapter) saves a recipe instead, by way of saved-tensor hooks around the layer: they
         know the tensor by its storage. In the layer's backward the first to ask computes the output again, and
         the function's own backward uses that computation's graph, so that each is done once. It reads the norm's
         weight as it is at that moment. An MLP that runs in one piece (fastprice_kernels) is left alone: it keeps gate
         and up and no product. PEFT's cast of a layer's input to fp32, which autocast undoes at once, is left out.
input    `torch.utils.checkpoint`, non-reentrant, around the layer's `__call__`: in the layer's backward, when the first
         saved tensor is asked for, the whole call runs again, with its forward pre-hooks and (unless it stops before
         them, once everything saved is there) its forward hooks. Whoever exchanges the weights' storage must have the
         layer's weights in place by then: a full-backward pre-hook of the layer runs before.
host     As "input", with the input copied to pinned host memory by a stream of its own while the layer computes, and
         back while the layer after it does its backward. The input of the last such layer stays on the device, so at
         most two are there. On a CPU: a plain copy.

Recognition is by kind and may miss: a norm is a module whose class is named ...Norm, an MLP one that computes
down(act(gate(x)) * up(x)), which is checked. What is not recognized is kept, and nothing but memory is lost.

Checkpointing: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016); recomputing cheap parts alone:
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from fastprice.errors import ConfigError
from fastprice.memory.activation_offload import HostInputs
from fastprice.memory.recompute_levels import check_levels
from fastprice.models.parts import layers_of, plain_model

__all__ = ["Keeping", "decoder_layers", "keeping"]

_SLOTS = ("gradient_checkpointing", "_gradient_checkpointing_func")
_MISSING = object()


@contextmanager
def keeping(
    model: nn.Module, levels: Sequence[str], *, host: HostInputs | None = None, random: bool = True
) -> Iterator[Keeping]:
    """`Keeping` for the time of the block."""
    made = Keeping(model, levels, host=host, random=random)
    try:
        yield made
    finally:
        made.remove()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a transformers model, with or without PEFT around it.

    Raises ConfigError when there are none that can be recomputed one by one.
    """
    layers = layers_of(model)
    if not layers or not all(hasattr(layer, _SLOTS[0]) for layer in layers):
        name = type(plain_model(model)).__name__
        raise ConfigError(f"recompute: the layers of a {name} cannot be told apart; use recompute='all'")
    return list(layers)


class Keeping:
    """The levels in force on a model: `levels`, changed by `set`, undone by `remove`.

    random   whether layers draw random numbers (dropout), which a layer that runs again must draw again. Their state
             cannot be read while a CUDA graph is captured.

    Raises ConfigError for a model without layers of its own, or levels that do not fit it.
    """

    def __init__(
        self, model: nn.Module, levels: Sequence[str], *, host: HostInputs | None = None, random: bool = True
    ) -> None:
        self.layers = decoder_layers(model)
        self._functions = {
            "input": partial(checkpoint, use_reentrant=False, preserve_rng_state=random),
            "host": partial((HostInputs() if host is None else host).checkpoint, random=random),
        }
        self._before = [{name: layer.__dict__.get(name, _MISSING) for name in _SLOTS} for layer in self.layers]
        self._costly: dict[int, _CostlyLayer] = {}
        self.levels: tuple[str, ...] = ()
        self.set(levels)

    def set(self, levels: Sequence[str]) -> None:
        """Other levels, from the next forward pass on."""
        levels = check_levels(levels, len(self.layers))
        for i, (layer, level) in enumerate(zip(self.layers, levels, strict=True)):
            layer.__dict__["gradient_checkpointing"] = level in self._functions
            if level in self._functions:
                layer.__dict__["_gradient_checkpointing_func"] = self._functions[level]
            if level == "costly" and i not in self._costly:
                self._costly[i] = _CostlyLayer(layer)
            elif level != "costly" and i in self._costly:
                self._costly.pop(i).remove()
        self.levels = levels

    def remove(self) -> None:
        """Leaves the model as it was before; doing so twice is harmless."""
        for made in self._costly.values():
            made.remove()
        self._costly.clear()
        for layer, before in zip(self.layers, self._before, strict=True):
            for name, value in before.items():
                layer.__dict__.pop(name, None)
                if value is not _MISSING:
                    layer.__dict__[name] = value


class _Recipe:
    """How to compute a tensor again: a function of its inputs and, inside it, of parameters that may train."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self._function = function
        self._inputs = [(x.detach(), x.requires_grad, x._version) for x in inputs]
        device = inputs[0].device.type
        self._autocast: dict[str, Any] = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        self._made: tuple[Tensor, list[Tensor]] | None = None

    def graph(self) -> tuple[Tensor, list[Tensor]]:
        """The tensor with its graph, and the leaves that stand for the inputs."""
        if self._made is None:
            if not self._inputs:
                raise RuntimeError(
                    "a layer at recompute='costly' gives one backward pass: retain_graph needs recompute='all'"
                )
            if any(x._version != version for x, _, version in self._inputs):
                raise RuntimeError("the input of a norm or an activation was modified in place: use recompute='all'")
            leaves = [x.detach().requires_grad_(wanted) for x, wanted, _ in self._inputs]
            with torch.enable_grad(), torch.autocast(**self._autocast):
                self._made = self._function(*leaves), leaves
        return self._made

    def free(self) -> None:
        """Lets go of everything: the graph around it may live on with the loss."""
        self._made, self._inputs = None, []


class _Again(torch.autograd.Function):
    """`function(*inputs)` of a recipe, keeping no more than the recipe does. Parameters follow the inputs."""

    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, function: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
        ctx.recipe, ctx.parameters = recipe, tensors[count:]
        return function(*tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        output, leaves = ctx.recipe.graph()
        tensors = (*leaves, *ctx.parameters)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, gradients))
        ctx.recipe.free()
        return None, None, None, *(next(found) if tensor.requires_grad else None for tensor in tensors)


class _CostlyLayer:
    """Keeps norms, products of activations and PEFT's casts of one layer from being saved."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._recipes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage of an output -> (recipe, its version)
        self._saving: Any = None
        self._casting: list[Any] = []
        self._patched: list[nn.Module] = []
        for module in layer.modules():
            if "forward" in module.__dict__:  # replaced by something else, which keeps what it keeps
                continue
            if type(module).__name__.endswith("Norm"):
                self._patch(module, partial(self._norm, module))
            elif _is_gated(module):
                self._patch(module, partial(self._mlp, module))
        self._hooks = [
            layer.register_forward_pre_hook(self._enter),
            layer.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in self._patched:
            del module.__dict__["forward"]

    def _patch(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        module.__dict__["forward"] = forward
        self._patched.append(module)

    def _enter(self, layer: nn.Module, arguments: Any) -> None:
        if not (layer.training and torch.is_grad_enabled()):
            return
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._saving.__enter__()
        device = next(layer.parameters()).device.type
        if torch.is_autocast_enabled(device):
            self._casting = [module for module in layer.modules() if _casts_in_vain(module)]
        for module in self._casting:
            module.cast_input_dtype_enabled = False

    def _leave(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        """Also when the layer raised."""
        for module in self._casting:
            module.cast_input_dtype_enabled = True
        self._casting = []
        if self._saving is not None:
            self._saving.__exit__(None, None, None)
            self._saving = None
        self._recipes.clear()

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        return self._cheap(partial(type(norm).forward, norm), [x], norm.parameters())

    def _mlp(self, mlp: Any, x: Tensor) -> Tensor:
        product = self._cheap(lambda gate, up: mlp.act_fn(gate) * up, [mlp.gate_proj(x), mlp.up_proj(x)])
        output: Tensor = mlp.down_proj(product)
        return output

    def _cheap(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Iterator[nn.Parameter] = iter(())
    ) -> Tensor:
        if self._saving is None:
            return function(*inputs)
        recipe = _Recipe(function, inputs)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        output: Tensor = _Again.apply(recipe, function, len(inputs), *inputs, *trained)
        self._recipes[output.untyped_storage()] = (recipe, output._version)
        return output

    def _pack(self, tensor: Tensor) -> Any:
        recipe, version = self._recipes.get(tensor.untyped_storage(), (None, 0))
        if recipe is None or tensor._version != version:
            return tensor
        return recipe, tensor.size(), tensor.stride(), tensor.storage_offset()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recipe, size, stride, offset = packed
    output: Tensor = recipe.graph()[0]
    return output.detach().as_strided(size, stride, offset)


def _is_gated(module: Any) -> bool:
    """Whether the module computes down(act(gate(x)) * up(x)) and nothing more: tried on numbers in place of layers."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
        return False
    stand = SimpleNamespace(
        gate_proj=lambda x: x + 1, up_proj=lambda x: 3 * x, act_fn=lambda x: x**2, down_proj=lambda x: x - 5
    )
    try:
        return bool(type(module).forward(stand, 2) == (2 + 1) ** 2 * (3 * 2) - 5)
    except (AttributeError, TypeError):  # it has other parts, or wants more than x
        return False


def _casts_in_vain(module: Any) -> bool:
    """Whether this is a PEFT layer whose cast of its input to fp32 autocast undoes, nothing being done in between."""
    dropouts = getattr(module, "lora_dropout", None)
    return (
        bool(getattr(module, "cast_input_dtype_enabled", False))
        and dropouts is not None
        and all(isinstance(dropout, nn.Identity) for dropout in dropouts.values())
    )
