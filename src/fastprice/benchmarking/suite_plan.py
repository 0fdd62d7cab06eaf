"""What a run of the suite measures: models, sizes, peers, kernels, and how long each may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastprice.benchmarking.peers import PEERS
from fastprice.benchmarking.workload import GIB, KERNEL_FAMILIES, MODELS, linear_weights, shape_of
from fastprice.errors import ConfigError, nearest_name

__all__ = ["SuitePlan"]


@dataclass(frozen=True)
class SuitePlan:
    """What to measure; ConfigError that names every unknown model, peer and kernel family.

    models           names of `workload.MODELS`, the most important first: the headline is of the first
    tokens           of a pack
    batch            rows of a padded micro-batch
    rank             of the adapters
    variants         further pairs of (tokens, rank) to train with, when all rounds of the first are done
    steps            timed steps of a training run, which take at most `step_seconds`
    rounds           of all peers over all models
    run_model        of whole training runs: a name of `workload.MODELS`, or "shipped nano", whose weights are real
    run_items, run_tokens   texts of a whole run, tokens of its steps
    run_rounds       of whole runs over all peers
    run_seconds      that a whole run may take
    load_rounds      of loading a model
    kernel_seconds   of timing for one kernel case
    kernel_families  of `workload.KERNEL_FAMILIES`, the most important first
    memory_caps      GPU sizes to search the largest micro-batch and model for, in GiB
    peers            of `peers.PEERS`, the most important first
    gpu              whether there is a GPU
    time_factor      how much longer than on an otherwise idle GPU machine a worker may take
    """

    models: Sequence[str]
    tokens: int = 4096
    batch: int = 4
    rank: int = 16
    variants: Sequence[tuple[int, int]] = ()
    steps: int = 20
    step_seconds: float = 10.0
    rounds: int = 2
    run_model: str = "llama-3.2-1b"
    run_items: int = 2000
    run_tokens: int = 4096
    run_rounds: int = 2
    run_seconds: float = 90.0
    load_rounds: int = 3
    kernel_seconds: float = 0.5
    kernel_families: Sequence[str] = KERNEL_FAMILIES
    memory_caps: Sequence[int] = (8, 12, 16, 24, 48)
    peers: Sequence[str] = tuple(PEERS)
    gpu: bool = True
    time_factor: float = 1.0

    def __post_init__(self) -> None:
        unknown = [
            f"{kind}: {name!r} is not one of {', '.join(known)}{nearest_name(name, known)}"
            for kind, names, known in (
                ("model", self.models, MODELS),
                ("peer", self.peers, PEERS),
                ("kernel family", self.kernel_families, KERNEL_FAMILIES),
            )
            for name in names
            if name not in known
        ]
        if unknown:
            raise ConfigError("; ".join(unknown))

    @property
    def smallest(self) -> str:
        """The model with the fewest weights."""
        return min(self.models, key=lambda name: linear_weights(shape_of(name)))

    @property
    def largest(self) -> str:
        """The model with the most weights."""
        return max(self.models, key=lambda name: linear_weights(shape_of(name)))

    @classmethod
    def full(cls, memory_bytes: int) -> SuitePlan:
        """Everything on a card of `memory_bytes`: an 8B model first where its weights and a pack fit, and a 1B one."""
        models = ("llama-3.1-8b", "llama-3.2-1b") if memory_bytes >= 14 * GIB else ("llama-3.2-1b",)
        return cls(models=models, variants=((2048, 16), (8192, 16), (4096, 32)))

    @classmethod
    def quick(cls, memory_bytes: int) -> SuitePlan:
        """What three minutes allow on a card of `memory_bytes`: one model, three peers, a few kernel cases."""
        return cls(
            models=("llama-3.2-1b" if memory_bytes >= 6 * GIB else "qwen2.5-0.5b",),
            tokens=4096 if memory_bytes >= 12 * GIB else 2048,
            steps=12,
            step_seconds=6.0,
            kernel_seconds=0.2,
            kernel_families=("dequantize", "loss_head"),
            memory_caps=(),
            peers=("peft", "unsloth-tuned", "trl-packed"),
        )

    @classmethod
    def for_pytest_cpu(cls) -> SuitePlan:
        """As `for_cpu`, small enough for `pytest benchmarks` to end in three minutes on two slow cores."""
        return replace(cls.for_cpu(), step_seconds=2.0, run_items=40)

    @classmethod
    def for_cpu(cls) -> SuitePlan:
        """The same stages with a small model: the code is exercised, the figures are a CPU's."""
        return cls(
            models=("nano",),
            tokens=512,
            batch=2,
            steps=3,
            step_seconds=5.0,
            rounds=1,
            run_model="shipped nano",
            run_items=600,
            run_tokens=512,
            kernel_seconds=0.1,
            memory_caps=(),
            peers=(
                "peft",
                "unsloth-tuned",
                "trl-packed",
                "trl-packed-no-recompute",
                "peft-off",
                "trl-padded",
                "trl-padded-no-recompute",
            ),
            gpu=False,
            time_factor=5.0,
        )
