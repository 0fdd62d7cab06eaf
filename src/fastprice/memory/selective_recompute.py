"""Selective recomputation of one decoder layer: norms and the product inside the MLP are not saved but computed again.
At level "mlp" gate and up are computed again too.

Each norm, and the product of an MLP's activation, becomes one autograd function that saves its inputs alone. Whoever
saves its output (a projection, for the gradient of its adapter) saves a recomputation instead, through saved-tensor
hooks around the layer, which recognize the tensor by its storage. In the backward pass the first to unpack it computes
the output, and the function's own backward uses the graph of that computation: each runs once, no forward pass and no
hook of the layer runs twice. A norm's weight is read as it is at that moment. A norm that fastprice_kernels runs says
itself how its output is computed again; an MLP that they run saves no product, and at level "mlp" is told by the
layer's attribute `recompute_mlp` not to save gate and up either. PEFT's cast of a layer's input to fp32, which autocast
undoes at once, is turned off.

Modules are recognized by kind: a norm by a class named ...Norm, an MLP by computing down(act(gate(x)) * up(x)), which
is checked. What is not recognized is saved as usual and costs memory only.

Method: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["SelectiveRecompute"]


class SelectiveRecompute:
    """Selective recomputation on one decoder layer, until `remove`.

    mlp                  whether gate and up are computed again too
    preserve_rng_state   whether they may draw random numbers (dropout), which recomputation must draw again
    """

    def __init__(self, layer: nn.Module, *, mlp: bool = False, preserve_rng_state: bool = True) -> None:
        from fastprice_kernels.patching.installation import PATCH, RECOMPUTE_MLP

        self._layer, self._mlp, self._draws = layer, mlp, mlp and preserve_rng_state
        if mlp:
            layer.__dict__[RECOMPUTE_MLP] = True
        self._recomputations: WeakIdKeyDictionary = WeakIdKeyDictionary()  # output storage -> (recomputation, version)
        self._saved_tensor_hooks: Any = None
        self._modules_without_cast: list[Any] = []
        self._patched: list[nn.Module] = []
        self._kernel_norms: list[Any] = []
        for module in layer.modules():
            patch: Any = module.__dict__.get(PATCH)
            if hasattr(patch, "on_output"):
                patch.on_output = self._register
                self._kernel_norms.append(patch)
                continue
            if "forward" in module.__dict__:  # replaced already, by code that decides itself what to save
                continue
            if type(module).__name__.endswith("Norm"):
                self._patch(module, partial(self._norm_forward, module))
            elif _is_gated_mlp(module):
                self._patch(module, partial(self._mlp_forward, module))
        self._hooks = [
            layer.register_forward_pre_hook(self._before_forward),
            layer.register_forward_hook(self._after_forward, always_call=True),
        ]

    def remove(self) -> None:
        """Restores the layer."""
        from fastprice_kernels.patching.installation import RECOMPUTE_MLP

        for hook in self._hooks:
            hook.remove()
        for module in self._patched:
            del module.__dict__["forward"]
        for patch in self._kernel_norms:
            patch.on_output = None
        self._layer.__dict__.pop(RECOMPUTE_MLP, None)

    def _patch(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        module.__dict__["forward"] = forward
        self._patched.append(module)

    def _before_forward(self, layer: nn.Module, arguments: Any) -> None:
        if not (layer.training and torch.is_grad_enabled()):
            return
        self._saved_tensor_hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._saved_tensor_hooks.__enter__()
        device = next(layer.parameters()).device.type
        if torch.is_autocast_enabled(device):
            self._modules_without_cast = [module for module in layer.modules() if _casts_without_effect(module)]
        for module in self._modules_without_cast:
            module.cast_input_dtype_enabled = False

    def _after_forward(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        """Runs also when the layer raised."""
        for module in self._modules_without_cast:
            module.cast_input_dtype_enabled = True
        self._modules_without_cast = []
        if self._saved_tensor_hooks is not None:
            self._saved_tensor_hooks.__exit__(None, None, None)
            self._saved_tensor_hooks = None
        self._recomputations.clear()

    def _norm_forward(self, norm: nn.Module, x: Tensor) -> Tensor:
        return self._run(partial(type(norm).forward, norm), [x], norm.parameters())

    def _register(self, output: Tensor, again: Callable[[], Tensor]) -> None:
        """`again` computes `output`, which a kernel made, from what the kernel saved."""
        if self._saved_tensor_hooks is not None:
            self._recomputations[output.untyped_storage()] = (_KernelOutput(again), output._version)

    def _mlp_forward(self, mlp: Any, x: Tensor) -> Tensor:
        if self._mlp:
            trained = (p for name in ("gate_proj", "up_proj") for p in getattr(mlp, name).parameters())
            product = self._run(lambda x: mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), [x], trained)
        else:
            product = self._run(lambda gate, up: mlp.act_fn(gate) * up, [mlp.gate_proj(x), mlp.up_proj(x)])
        output: Tensor = mlp.down_proj(product)
        return output

    def _run(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Iterator[nn.Parameter] = iter(())
    ) -> Tensor:
        """`function(*inputs)`, whose output is recomputed in the backward pass and not saved."""
        if self._saved_tensor_hooks is None:
            return function(*inputs)
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        recomputation = _Recomputation(function, inputs, self._pack, draws=self._draws)
        output: Tensor = _RecomputedFunction.apply(recomputation, function, len(inputs), *inputs, *trainable)
        self._recomputations[output.untyped_storage()] = (recomputation, output._version)
        return output

    def _pack(self, tensor: Tensor) -> Any:
        recomputation, version = self._recomputations.get(tensor.untyped_storage(), (None, 0))
        if recomputation is None or tensor._version != version:
            return tensor
        return recomputation, tensor.size(), tensor.stride(), tensor.storage_offset()


class _KernelOutput:
    """How to compute again what a kernel wrote, without a graph: its backward needs none."""

    def __init__(self, again: Callable[[], Tensor]) -> None:
        self._again = again

    def compute(self) -> tuple[Tensor, list[Tensor]]:
        return self._again(), []


class _Recomputation:
    """How to compute a tensor again: a function of saved inputs and, inside it, of parameters that may train."""

    def __init__(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], pack: Callable[[Tensor], Any], *, draws: bool
    ) -> None:
        """`pack`: how an input is held, which may be a recomputation itself; `draws`: random numbers."""
        self._function = function
        self._inputs = [(pack(x.detach()), x.requires_grad, x._version) for x in inputs]
        self._device = inputs[0].device
        self._rng_state = _rng_state(self._device) if draws else None
        device = self._device.type
        self._autocast: dict[str, Any] = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        self._result: tuple[Tensor, list[Tensor]] | None = None

    def compute(self) -> tuple[Tensor, list[Tensor]]:
        """The tensor with its autograd graph, and the leaves that stand for the inputs; computed at the first call."""
        if self._result is None:
            if not self._inputs:
                raise RuntimeError(
                    "a layer at recompute='selective' allows one backward pass: retain_graph needs recompute='none'"
                )
            if any(isinstance(x, Tensor) and x._version != version for x, _, version in self._inputs):
                raise RuntimeError("the input of a norm or an activation was modified in place; use recompute='none'")
            leaves = [_unpack(x).detach().requires_grad_(needs_gradient) for x, needs_gradient, _ in self._inputs]
            with torch.enable_grad(), torch.autocast(**self._autocast), _rng_restored(self._device, self._rng_state):
                self._result = self._function(*leaves), leaves
        return self._result

    def release(self) -> None:
        """Frees inputs and result: the autograd graph that holds this object may live as long as the loss."""
        self._result, self._inputs = None, []


class _RecomputedFunction(torch.autograd.Function):
    """The function of a `_Recomputation`, which saves only what that saves. Trainable parameters follow the inputs."""

    @staticmethod
    def forward(
        ctx: Any, recomputation: _Recomputation, function: Callable[..., Tensor], inputs: int, *tensors: Tensor
    ) -> Tensor:
        ctx.recomputation, ctx.parameters = recomputation, tensors[inputs:]
        return function(*tensors[:inputs])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        output, leaves = ctx.recomputation.compute()
        tensors = (*leaves, *ctx.parameters)
        needing_gradient = [tensor for tensor in tensors if tensor.requires_grad]
        results = iter(torch.autograd.grad(output, needing_gradient, gradients))
        ctx.recomputation.release()
        return None, None, None, *(next(results) if tensor.requires_grad else None for tensor in tensors)


def _rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _rng_restored(device: torch.device, state: Tensor | None) -> Iterator[None]:
    """With the random number generator in `state`, if there is one, and back where it was afterwards."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recomputation, size, stride, offset = packed
    output: Tensor = recomputation.compute()[0]
    return output.detach().as_strided(size, stride, offset)


def _is_gated_mlp(module: Any) -> bool:
    """Whether the module's forward is down(act(gate(x)) * up(x)) and no more: tried on numbers in place of layers."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
        return False
    numbers = SimpleNamespace(
        gate_proj=lambda x: x + 1, up_proj=lambda x: 3 * x, act_fn=lambda x: x**2, down_proj=lambda x: x - 5
    )
    try:
        return bool(type(module).forward(numbers, 2) == (2 + 1) ** 2 * (3 * 2) - 5)
    except (AttributeError, TypeError):  # it has other parts, or takes other arguments
        return False


def _casts_without_effect(module: Any) -> bool:
    """Whether this is a PEFT layer whose cast of its input to fp32 is undone by autocast, with nothing in between."""
    dropouts = getattr(module, "lora_dropout", None)
    return (
        bool(getattr(module, "cast_input_dtype_enabled", False))
        and dropouts is not None
        and all(isinstance(dropout, nn.Identity) for dropout in dropouts.values())
    )
