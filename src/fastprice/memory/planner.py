"""`plan_memory`: how to fine-tune a model within a GPU's memory, the fastest way that fits by arithmetic.

For every micro-batch size (the requested one, its half, ...; gradient accumulation makes up for it) the planner chooses
recompute levels (recompute_levels.py): selective recomputation first, which costs a few per cent of a step and frees a
quarter to a half of what is saved; then gate and up, and the whole of as few layers as possible, at the cost of their
forward pass; and where even the inputs are too many, offloading of as few inputs as possible. If that does not fit and
layer offload is allowed, it offloads the frozen weights of as few layers as possible. Of all plans that fit it takes
the one with the most tokens a second by the limits of roofline.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprice.errors import ConfigError
from fastprice.memory.byte_sizes import GIB, format_gib, parse_bytes
from fastprice.memory.estimate import MemoryEstimate, estimate_memory
from fastprice.memory.recompute_levels import RECOMPUTE_LEVELS, format_recompute_levels
from fastprice.memory.roofline import Gpu, TrainingStep, find_gpu, step_seconds
from fastprice.models.shapes import ModelShape, read_shape, shipped_names

__all__ = [
    "GPU_SIZES",
    "LargerModel",
    "MemoryPlan",
    "PlanOptions",
    "choose_recompute_levels",
    "find_plan",
    "format_plan_table",
    "next_larger_model",
    "plan_memory",
    "plan_table",
]

GPU_SIZES = tuple(size * GIB for size in (8, 12, 16, 24, 32, 40, 48, 80))
MIN_TOKENS = 512  # smaller micro-batches spend their time on launches and dequantization
MIN_PACK_TOKENS = 72  # the smallest pack that RunConfig takes
HEADROOM = 0.03  # assumed: share of a card's memory that driver, display and rounding take
LABELED = 4 / 180  # price texts: about 4 tokens of the price in 180


@dataclass(frozen=True)
class MemoryPlan:
    """A way to train `base` in `gpu_bytes` of memory.

    Attributes:
        tokens: of a micro-batch; `gradient_accumulation` micro-batches make the requested optimizer step.
        levels: the recompute level of each layer, first one first.
        offloaded_layers: layers whose frozen weights are on the host; `resident_layers` are the others.
        dense_layers: layers whose frozen weights stay dequantized, where nothing is recomputed and memory is left.
        tokens_per_second: what this plan cannot exceed on the GPU named `gpu`: its arithmetic limit, no prediction.
        best_tokens_per_second: the same limit for the same model with memory to spare.
    """

    base: str
    parameters: int
    gpu_bytes: int
    gpu: str
    method: str
    engine: str
    rank: int
    loss_head: str
    tokens: int
    gradient_accumulation: int
    levels: tuple[str, ...]
    offloaded_layers: int
    dense_layers: int
    estimate: MemoryEstimate
    tokens_per_second: float
    best_tokens_per_second: float

    @property
    def layers(self) -> int:
        return len(self.levels)

    @property
    def recomputed_layers(self) -> int:
        """Layers whose whole forward pass runs again in the backward pass."""
        return self.levels.count("full") + self.levels.count("offload")

    @property
    def resident_layers(self) -> int:
        return self.layers - self.offloaded_layers

    def yaml(self) -> str:
        """The settings of `fastprice train` that this plan fixes; `data` and `out` are left to the user."""
        import yaml

        kernels = {"fastprice": "on", "peft": "off", "unsloth": "auto"}[self.engine]
        # With offloaded layers a run plans its recompute levels from the limit too.
        fitting = (
            {"max_memory": format_gib(self.gpu_bytes)}
            if self.offloaded_layers
            else {"recompute": format_recompute_levels(self.levels)}
        )
        settings = {
            "model": {
                "base": self.base,
                "method": self.method,
                "engine": "unsloth" if self.engine == "unsloth" else "peft",
                "kernels": kernels,
                "rank": self.rank,
                **fitting,
            },
            "train": {"pack_tokens": self.tokens, "gradient_accumulation": self.gradient_accumulation},
        }
        return str(yaml.safe_dump(settings, sort_keys=False))

    def summary(self) -> str:
        """The plan as a few lines of text."""
        share = self.tokens_per_second / self.best_tokens_per_second
        loss = "labeled tokens" if self.loss_head == "completion" else "all tokens"
        offload = f", weights of {self.offloaded_layers} of {self.layers} layers offloaded to the host"
        host = f", and {format_gib(self.estimate.host_bytes)} on the host" if self.estimate.host_bytes else ""
        return "\n".join(
            [
                f"{self.base} ({self.parameters / 1e9:.2f} B) in {format_gib(self.gpu_bytes)}: {self.method}, rank "
                f"{self.rank}, engine {self.engine}",
                f"micro-batch of {self.tokens:,} tokens x {self.gradient_accumulation}, loss over {loss}",
                f"recompute of {self.layers} layers: {format_recompute_levels(self.levels)}"
                + (offload if self.offloaded_layers else "")
                + (f", weights of {self.dense_layers} kept dequantized" if self.dense_layers else ""),
                f"expected peak {format_gib(self.estimate.peak_bytes)} (at the {self.estimate.moment})" + host,
                f"at most {self.tokens_per_second:,.0f} tokens/s on an {self.gpu} by arithmetic, {100 * share:.0f} % "
                f"of the {self.best_tokens_per_second:,.0f} that memory to spare would allow",
            ]
        )


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is made for.

    method          "qlora", "lora", "full", or "auto": qlora or lora, whichever is faster
    tokens          tokens of a micro-batch to aim at
    rank            of the adapters
    engine          "peft", "fastprice" (PEFT with fastprice's kernels) or "unsloth" (Unsloth with them)
    loss_head       "completion": logits for labeled positions; "full": for all
    labeled         share of tokens with a label
    text_tokens     mean tokens of a text
    layer_offload   whether frozen weights may be offloaded to the host
    min_tokens      no micro-batch is made smaller than this
    gpu             card whose limits give the speed; None: the first known one with that much memory
    """

    method: str = "qlora"
    tokens: int = 4096
    rank: int = 16
    engine: str = "peft"
    optimizer: str = "adamw_torch"
    loss_head: str = "completion"
    labeled: float = LABELED
    text_tokens: int = 180
    layer_offload: bool = False
    min_tokens: int = MIN_TOKENS
    gpu: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("text_tokens", self.text_tokens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < MIN_PACK_TOKENS:
                raise ConfigError(f"{name}: {value!r} is not a whole number of at least {MIN_PACK_TOKENS}")


def plan_memory(base: Any, gpu_bytes: str | int, **options: Any) -> MemoryPlan:
    """The fastest plan that fits, as `find_plan`; raises ConfigError if none does, with the memory that is needed."""
    plan = find_plan(base, gpu_bytes, **options)
    if plan is not None:
        return plan
    shape, budget = read_shape(base), parse_bytes(gpu_bytes)
    smaller = [name for name in _names_by_size() if read_shape(name).parameters < shape.parameters]
    fitting = next((name for name in reversed(smaller) if find_plan(name, budget, **options)), None)
    needed = _least_bytes(base, PlanOptions(**options), budget)
    raise ConfigError(
        f"{shape.name} does not fit in {format_gib(budget)}: the smallest plan needs {format_gib(needed)}"
        + (f"; {fitting} fits" if fitting else "")
    )


def find_plan(base: Any, gpu_bytes: str | int, **options: Any) -> MemoryPlan | None:
    """The fastest plan to train `base` that fits in `gpu_bytes` ("24GiB" or bytes), or None.

    base      folder, hub id, shipped name, or transformers configuration
    options   the fields of `PlanOptions`

    Raises ConfigError for impossible settings, BaseModelError for a base that cannot be read.
    """
    budget = parse_bytes(gpu_bytes)
    settings = PlanOptions(**options)
    plans = [plan for plan in _candidates(base, budget, settings) if _fits(plan.estimate, budget)]
    best = max(plans, key=lambda plan: (plan.tokens_per_second, plan.tokens), default=None)
    if best is None or not _may_be_dense(settings, best.method):
        return best
    # Only then dense weights: a smaller micro-batch would leave more room for them, but loses more than they gain.
    return _plan_micro_batch(best.base, read_shape(base), budget, settings, best.method, best.tokens, dense=True)


@dataclass(frozen=True)
class LargerModel:
    """A model and the least GPU memory (bytes) that it needs; `plan` if it fits in the given memory, else None."""

    base: str
    parameters: int
    least_bytes: int
    plan: MemoryPlan | None


def next_larger_model(base: Any, gpu_bytes: str | int, **options: Any) -> LargerModel | None:
    """The next larger shipped model, by options as in `find_plan`; None if `base` is as large as the largest."""
    parameters = read_shape(base).parameters
    larger = next((name for name in _names_by_size() if read_shape(name).parameters > 1.05 * parameters), None)
    if larger is None:
        return None
    least_bytes = _least_bytes(larger, PlanOptions(**options), 1)
    return LargerModel(larger, read_shape(larger).parameters, least_bytes, find_plan(larger, gpu_bytes, **options))


def plan_table(
    sizes: Sequence[str | int] = GPU_SIZES, models: Iterable[str] | None = None, **options: Any
) -> list[tuple[str, list[MemoryPlan | None]]]:
    """For each model (the shipped ones, smallest first) its plan, or None, in each GPU size; options as in
    `find_plan`."""
    names = _names_by_size() if models is None else list(models)
    return [(name, [find_plan(name, size, **options) for size in sizes]) for name in names]


def format_plan_table(
    rows: Sequence[tuple[str, Sequence[MemoryPlan | None]]], sizes: Sequence[str | int] = GPU_SIZES
) -> str:
    """`plan_table` in Markdown: tokens of the micro-batch, and how many layers are at recompute level "selective" (s)
    and "mlp" (m), recomputed in full (f), of these with their input offloaded (i), have their weights offloaded (w)
    or dequantized (d)."""

    def cell(plan: MemoryPlan | None) -> str:
        if plan is None:
            return "-"
        counts = {
            "s": plan.levels.count("selective"),
            "m": plan.levels.count("mlp"),
            "f": plan.recomputed_layers,
            "i": plan.levels.count("offload"),
            "w": plan.offloaded_layers,
            "d": plan.dense_layers,
        }
        marks = (f"{mark}{count}/{plan.layers}" for mark, count in counts.items() if count)
        return " ".join([str(plan.tokens), *marks])

    header = ["model", *(format_gib(parse_bytes(size)) for size in sizes)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join([name, *map(cell, plans)]) + " |" for name, plans in rows]
    return "\n".join(lines)


def choose_recompute_levels(layers: int, fits: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...] | None:
    """The levels that cost the least time of those that fit; None if none do.

    As few layers at "offload" as possible, then as few at "full", at "mlp", at "selective": the first layers, whose
    backward pass comes when the others have released their activations.
    """
    heavy_first = RECOMPUTE_LEVELS[:0:-1]

    def arranged(ends: Sequence[int]) -> tuple[str, ...]:
        """Levels whose runs end at these layers."""
        levels: list[str] = []
        for level, end in zip((*heavy_first, RECOMPUTE_LEVELS[0]), (*ends, layers), strict=True):
            levels += [level] * (end - len(levels))
        return tuple(levels)

    ends = [layers] * len(heavy_first)
    for i in range(len(heavy_first)):

        def fits_up_to(count: int, i: int = i) -> bool:
            return fits(arranged([*ends[:i], count, *ends[i + 1 :]]))

        end = _smallest(range(ends[i - 1] if i else 0, layers + 1), fits_up_to)
        if end is None:  # not even the heaviest level for every layer fits
            return None
        ends[i] = end
    return arranged(ends)


def _candidates(base: Any, budget: int, options: PlanOptions) -> Iterator[MemoryPlan]:
    """For each method and micro-batch size, the plan with the least recomputation and offload that fits; if none fits,
    the one that needs the least memory."""
    shape = read_shape(base)
    name = str(base) if isinstance(base, str | Path) else shape.name
    for method in ("qlora", "lora") if options.method == "auto" else (options.method,):
        tokens = options.tokens
        while True:
            yield _plan_micro_batch(name, shape, budget, options, method, tokens)
            if tokens // 2 < options.min_tokens:
                break
            tokens //= 2


def _plan_micro_batch(
    name: str, shape: ModelShape, budget: int, options: PlanOptions, method: str, tokens: int,
    *, dense: bool = False,
) -> MemoryPlan:  # fmt: skip
    unsloth = options.engine == "unsloth"  # its layers on fastprice's kernels, which save no more than PEFT's there

    def estimate(levels: Sequence[str], offloaded_layers: int, dense_layers: int = 0) -> MemoryEstimate:
        return estimate_memory(
            shape, method=method, rank=options.rank, tokens=tokens, sequences=max(1, tokens // options.text_tokens),
            optimizer=options.optimizer, recompute=levels, loss_head=options.loss_head, labeled=options.labeled,
            engine="fastprice" if unsloth else options.engine, offloaded_layers=offloaded_layers,
            dense_layers=dense_layers,
        )  # fmt: skip

    def fits(levels: Sequence[str], offloaded_layers: int = 0) -> bool:
        return _fits(estimate(levels, offloaded_layers), budget)

    all_offloaded, offloaded_layers = ("offload",) * shape.layers, 0
    levels = choose_recompute_levels(shape.layers, fits)
    if levels is None or not fits(levels):
        levels = all_offloaded
        if options.layer_offload and method == "qlora" and not unsloth:
            count = _smallest(range(1, shape.layers + 1), lambda count: fits(all_offloaded, count))
            offloaded_layers = shape.layers if count is None else count
            if count is not None:
                chosen = choose_recompute_levels(shape.layers, lambda levels: fits(levels, offloaded_layers))
                levels = chosen or all_offloaded
    dense_layers = 0
    if dense and set(levels) == {"none"} and not offloaded_layers:
        spilled = _smallest(range(shape.layers + 1), lambda count: not _fits(estimate(levels, 0, count), budget))
        dense_layers = shape.layers if spilled is None else max(0, spilled - 1)
    counts = Counter(levels)
    step = TrainingStep(
        tokens=tokens,
        recomputed_layers=counts["full"] + counts["offload"],
        labeled=1.0 if options.loss_head == "full" else options.labeled,
        method=method,
        rank=options.rank,
        text_tokens=options.text_tokens,
        offloaded_layers=offloaded_layers,
        selective_layers=counts["selective"],
        mlp_layers=counts["mlp"],
        dense_layers=dense_layers,
        offloaded_inputs=counts["offload"],
        fused=options.engine != "peft",
    )
    unconstrained = TrainingStep(
        options.tokens, 0, options.labeled, method, options.rank, options.text_tokens,
        dense_layers=shape.layers if _may_be_dense(options, method) else 0,
    )  # fmt: skip
    gpu = find_gpu(options.gpu) if options.gpu else _gpu_with(budget)
    return MemoryPlan(
        base=name,
        parameters=shape.parameters,
        gpu_bytes=budget,
        gpu=gpu.name,
        method=method,
        engine=options.engine,
        rank=options.rank,
        loss_head=options.loss_head,
        tokens=tokens,
        gradient_accumulation=max(1, round(options.tokens / tokens)),
        levels=levels,
        offloaded_layers=offloaded_layers,
        dense_layers=dense_layers,
        estimate=estimate(levels, offloaded_layers, dense_layers),
        tokens_per_second=tokens / step_seconds(shape, step, gpu),
        best_tokens_per_second=options.tokens / step_seconds(shape, unconstrained, gpu),
    )


def _smallest(counts: range, fits: Callable[[int], bool]) -> int | None:
    """The smallest of `counts` that fits, given that all larger ones then fit too; None if none does."""
    low, high = counts.start, counts.stop
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return low if low < counts.stop else None


def _may_be_dense(options: PlanOptions, method: str) -> bool:
    return options.engine == "fastprice" and method == "qlora"


def _fits(estimate: MemoryEstimate, budget: int) -> bool:
    return estimate.peak_bytes <= budget * (1 - HEADROOM)


def _least_bytes(base: Any, options: PlanOptions, budget: int) -> int:
    """GPU memory of the plan that needs the least, among those made for a budget in which nothing fits."""
    least = min(plan.estimate.peak_bytes for plan in _candidates(base, budget, options))
    return round(least / (1 - HEADROOM))


def _gpu_with(memory: int) -> Gpu:
    """The card whose limits stand for a memory size: an RTX 4090 up to 24 GiB, then the next larger known card."""
    cards = [find_gpu(name) for name in ("RTX 4090", "RTX 5090", "A100-40GB", "L40S", "H100", "H200")]
    return next((gpu for gpu in cards if gpu.memory >= memory), cards[-1])


def _names_by_size() -> list[str]:
    return sorted(shipped_names(), key=lambda name: read_shape(name).parameters)
