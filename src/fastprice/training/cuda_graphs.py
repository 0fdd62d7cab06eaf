"""A training micro-step, forward and backward of one pack, captured once as a CUDA graph and replayed.

A model of up to 2B parameters is launch-bound: a step of thousands of small kernels takes as long as the host needs to
launch them, and a graph launches them all at once. It repeats the same kernels on the same addresses, so every pack has
one static shape (`fastprice.prompts.packing.StaticShape`), inputs are copied into static buffers, gradients accumulate
in static buffers, and nothing may read a value on the host. The optimizer stays outside. `unsupported_reason` lists
what cannot be captured.

A wrong replay would train silently on nonsense, so it is compared with the eager step before it is trusted: on another
pack than the recorded one, with weights perturbed by noise (which shows a stale copy of a weight), and twice in a row
(which shows a gradient that is overwritten instead of accumulated). If loss and gradients differ by more than the
dtype's tolerance, or the step cannot be captured, one warning says so and training goes on eagerly.

It costs padding, 1 to 2 % of the positions of packs of 1,024 to 4,096 tokens; the activations of a step stay reserved
as long as the graph lives, so an evaluation that runs out of memory beside it ends it (`GraphedStep.stop`); the check
holds three more copies of the trainable weights, once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastprice.models.attention_backends import varlen_works

__all__ = [
    "AUTO_MICRO_BATCHES",
    "AUTO_PARAMETERS",
    "TOLERANCES",
    "Capture",
    "CudaCapture",
    "GraphedStep",
    "parameter_count",
    "unsupported_reason",
]

# Most parameters that cuda_graphs="auto" captures: larger models are bound by arithmetic, not by launches.
AUTO_PARAMETERS = 2.5e9
# Fewest micro-batches of a training that it captures: recording and check take as long as about eight eager ones.
AUTO_MICRO_BATCHES = 64
# Largest difference of replay and eager step, relative to the gradient's norm: the same kernels on the same numbers,
# but atomic additions of attention and indexing in another order.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
_WARMUP = 3  # runs before the capture, as PyTorch requires: lazy initialization and autotuning must be over
_NOISE = 0.1  # relative to a weight's root mean square, or to 1 / sqrt(fan-in) for weights that are still zero

Step = Callable[[dict[str, Any]], Tensor]


class Capture(Protocol):
    """Records work on tensors once and repeats it on the same tensors."""

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """Records `work`, which may run several times, and returns the tensor that each replay writes its result to.

        Raises RuntimeError if it cannot be recorded.
        """

    def replay(self) -> None:
        """Repeats what was recorded."""


class CudaCapture:
    """`Capture` by `torch.cuda.CUDAGraph`, on the current device."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                work()
        torch.cuda.current_stream().wait_stream(side)
        # Autocast may hold older 16-bit copies of weights, which a replay would never refresh.
        torch.clear_autocast_cache()
        # "thread_local": the data loader's thread pins memory meanwhile, which "global" forbids.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        self._graph.replay()


class GraphedStep:
    """Called like the eager `step`; replays a capture of it once that has passed its check.

    step        takes a batch, accumulates the gradients of `parameters`, returns the detached loss; it must read
    nothing
                but the batch and tensors whose addresses stay
    parameters  the trainable ones, by name
    tolerance   largest relative difference of loss and gradients (`TOLERANCES`)
    capture     makes the `Capture`

    The first call runs eagerly and records, the second checks, later ones replay. Tensors of a batch must keep their
    shapes and dtypes and everything else its value, or ValueError is raised. `state` is "new", "recorded", "trusted" or
    "eager", and `failure` says why in the last case.
    """

    def __init__(
        self,
        step: Step,
        parameters: Mapping[str, nn.Parameter],
        *,
        tolerance: float,
        capture: Callable[[], Capture] = CudaCapture,
    ) -> None:
        self._step = step
        self._parameters = dict(parameters)
        self._tolerance = tolerance
        self._make_capture = capture
        self._recorded: tuple[Capture, Tensor] | None = None  # and the loss that its replays write
        self._static: dict[str, Any] = {}
        self._names: list[str] = []  # of the parameters that get a gradient
        self._buffers: list[Tensor] = []  # for their gradients
        self.state = "new"
        self.failure: str | None = None

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of one micro-step, a 0-dim tensor; gradients are added to the parameters' `grad`."""
        if self.state == "eager":
            return self._step(dict(batch))
        if self.state == "new":
            loss = self._step(dict(batch))
            self._try(self._record, batch)
            return loss
        self._fill(batch)
        self._attach()
        if self.state == "recorded":
            saved = [buffer.clone() for buffer in self._buffers]
            self._try(self._check, batch)
            torch._foreach_copy_(self._buffers, saved)
            return self._step(dict(batch))
        return self._replay()

    def _try(self, attempt: Callable[[Mapping[str, Any]], str | None], batch: Mapping[str, Any]) -> None:
        """Falls back to the eager step, with one warning, if `attempt` returns a failure or raises."""
        try:
            self.failure = attempt(batch)
        except RuntimeError as error:  # out of memory too: the eager step needs less
            self.failure = f"the step cannot be captured ({str(error).strip().splitlines()[0]})"
        if self.failure is not None:
            self.stop(self.failure)

    def stop(self, reason: str) -> None:
        """Frees the recording and computes eagerly from now on, with one warning that says why."""
        self.failure = reason
        self.state, self._recorded, self._static = "eager", None, {}
        warnings.warn(f"CUDA graphs stay off: {reason}", stacklevel=3)

    def _record(self, batch: Mapping[str, Any]) -> None:
        self._names = [name for name, parameter in self._parameters.items() if parameter.grad is not None]
        trained = self._trained()
        added = [parameter.grad for parameter in trained]
        self._buffers = [torch.zeros_like(gradient) for gradient in added if gradient is not None]
        self._static = {name: each.clone() if isinstance(each, Tensor) else each for name, each in batch.items()}
        try:
            for parameter, buffer in zip(trained, self._buffers, strict=True):
                parameter.grad = buffer
            capture = self._make_capture()
            self._recorded = capture, capture.record(lambda: self._step(dict(self._static)))
            self.state = "recorded"
        finally:  # undoes what the recording did to gradients
            for parameter, gradient in zip(trained, added, strict=True):
                parameter.grad = gradient

    def _check(self, batch: Mapping[str, Any]) -> str | None:
        """Compares two replays in a row with the eager step, on perturbed weights. Gradients are undefined then."""
        trained = self._trained()
        weights = [parameter.detach().clone() for parameter in trained]
        try:
            _perturb(trained)
            torch._foreach_zero_(self._buffers)
            self._replay()
            replayed_loss = self._replay()
            replayed = [buffer / 2 for buffer in self._buffers]
            torch._foreach_zero_(self._buffers)
            loss = self._step(dict(batch))
        finally:
            with torch.no_grad():
                torch._foreach_copy_(trained, weights)
        failure = self._disagreement(loss, replayed_loss, replayed)
        if failure is None:
            self.state = "trusted"
        return failure

    def _disagreement(self, loss: Tensor, replayed_loss: Tensor, replayed: Sequence[Tensor]) -> str | None:
        """How the replay differs from the eager step, whose gradients are in the buffers; None within the tolerance."""
        message = "a replayed step computes another {} than the eager one ({})"
        if not abs(float(loss) - float(replayed_loss)) <= self._tolerance * max(abs(float(loss)), 1.0):
            return message.format("loss", f"{float(replayed_loss):.6g} for {float(loss):.6g}")
        sizes = torch.stack(torch._foreach_norm(self._buffers)).double()
        apart = torch.stack(torch._foreach_norm(torch._foreach_sub(list(replayed), self._buffers))).double()
        # A gradient that is tiny beside the others consists of rounding errors.
        share = apart / sizes.clamp(min=1e-3 * float(sizes.norm()) + 1e-30)
        worst = int(share.nan_to_num(torch.inf).argmax())
        if not float(share[worst]) <= self._tolerance:
            return message.format("gradient", f"{100 * float(share[worst]):.3g} % apart in {self._names[worst]}")
        return None

    def _replay(self) -> Tensor:
        assert self._recorded is not None
        capture, loss = self._recorded
        capture.replay()
        return loss.clone()

    def _fill(self, batch: Mapping[str, Any]) -> None:
        if batch.keys() != self._static.keys():
            raise ValueError(f"the batch has {sorted(batch)}, the recorded one {sorted(self._static)}")
        for name, held in self._static.items():
            given = batch[name]
            if not isinstance(held, Tensor):
                same = given == held
            else:
                same = isinstance(given, Tensor) and (given.shape, given.dtype) == (held.shape, held.dtype)
            if not same:
                raise ValueError(f"{name} is {_describe(given)}, the recorded step takes {_describe(held)}")
            if isinstance(held, Tensor):
                held.copy_(given, non_blocking=True)

    def _attach(self) -> None:
        """Makes the buffers the parameters' gradients, with the values of those, or zeros."""
        fresh = []
        for parameter, buffer in zip(self._trained(), self._buffers, strict=True):
            if parameter.grad is None:
                fresh.append(buffer)
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if fresh:
            torch._foreach_zero_(fresh)

    def _trained(self) -> list[Tensor]:
        return [self._parameters[name] for name in self._names]


def _describe(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)


@torch.no_grad()
def _perturb(parameters: Sequence[Tensor]) -> None:
    """Adds noise to weights, so that a stale copy of them gives other results."""
    for seed, parameter in enumerate(parameters):
        generator = torch.Generator(parameter.device).manual_seed(seed)
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        size = parameter.float().square().mean().sqrt()
        fan_in = parameter.shape[-1] if parameter.ndim else 1
        parameter.add_((noise * torch.where(size > 0, size, fan_in**-0.5) * _NOISE).to(parameter.dtype))


def parameter_count(model: nn.Module) -> int:
    """The number of weights of `model`; a byte of a 4-bit weight holds two."""
    return sum(each.numel() * (2 if each.dtype == torch.uint8 else 1) for each in model.parameters())


def unsupported_reason(model: Any, *, kernels: bool, dtype: torch.dtype, processes: int) -> str | None:
    """Why the training steps of `model` cannot be captured, as far as is known beforehand; None if they may be.

    kernels: whether fastprice_kernels will be under the model; dtype: of its products; processes: that train.
    """
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not kernels:
        return "kernels are off, and the stock loss reads its labels on the host"
    if processes > 1:
        return f"{processes} processes train together"
    if dtype == torch.float16:
        return "fp16 scales its loss by decisions on the host; a card with bf16 is needed"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return "dropout draws other masks in each run, so replay and eager step cannot be compared"
    config = model.config
    if getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_logit_softcapping", None):
        return "attention with dropout or soft-capped scores has no kernel here that takes cu_seqlens on the device"
    if any(layer._forward_pre_hooks for layer in getattr(model.get_decoder(), "layers", [])):
        return "hooks on the decoder's layers decide on the host, as those of offloaded layers do"
    if not varlen_works("cuda", dtype):
        return f"PyTorch's varlen_attn does not run on this card in {dtype}"
    return None
