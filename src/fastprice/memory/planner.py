"""`make_plan`: how to fine-tune a model within a GPU's memory, the fastest way that fits by arithmetic.

For every micro-batch size (the one asked for, its half, ...; accumulation makes up for it) the planner chooses what a
layer keeps (levels.py), cheap recomputation first: it costs a few per cent of a step and frees a quarter to a half of
what is kept; then as few layers as must be keep their input alone, which costs each its forward pass again; where even
the inputs are too many, as few of them as must be wait on the host. Where that does not fit either and streaming is
allowed, it brings as many layers' frozen weights from the host as must be. Of all that fit it takes the one with the
most tokens a second by the limits of limits.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprice.errors import ConfigError
from fastprice.memory.estimate import GIB, MemoryEstimate, estimate_memory
from fastprice.memory.recompute_levels import write_levels
from fastprice.memory.roofline import GPUS, Gpu, Step, known_gpu, step_seconds
from fastprice.models.shapes import ModelShape, read_shape, shipped_names

__all__ = [
    "GPU_SIZES",
    "Need",
    "Plan",
    "choose_levels",
    "find_plan",
    "make_plan",
    "next_larger",
    "parse_bytes",
    "plan_table",
    "table",
]

GPU_SIZES = tuple(size * GIB for size in (8, 12, 16, 24, 32, 40, 48, 80))
LEAST_TOKENS = 512  # smaller micro-batches spend their time on launches and dequantization
LEAST_PACK = 72  # the smallest pack that RunConfig takes
HEADROOM = 0.03  # assumed: share of a card's memory that driver, display and rounding keep from us
LABELED = 4 / 180  # price texts: about 4 tokens of the price in 180

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?:([kmgt]?)(b)|([kmgt]?)|([kmgt])ib?)\s*", re.IGNORECASE)


def parse_bytes(size: str | int) -> int:
    """Bytes of "24GiB", "24 GB", "24g" or a plain number; g alone is GiB, as GPUs are sold. ConfigError for others."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise ConfigError(f"memory: {size!r} is not a size; write it like 24GiB, 24GB or 24g")
    number, decimal, is_decimal, bare, binary = match.groups()
    power = _POWERS[(decimal or bare or binary or "").lower()]
    found = int(float(number) * (1000 if is_decimal else 1024) ** power)
    if found < 1:
        raise ConfigError(f"memory: {size!r} is no memory at all; write a size like 24GiB")
    return found


@dataclass(frozen=True)
class Plan:
    """A way to train `base` in `gpu_bytes` of memory.

    tokens        tokens of a micro-batch; `accumulation` micro-batches make the optimizer step that was asked for
    levels        what each layer keeps, the first one first: "all", "costly", "input" or "host" (levels.py)
    streamed      layers whose frozen weights come from the host; `resident` = the others
    tokens_per_second, limit   of this plan, and of the same model with memory to spare, both at the arithmetic limits
                  of `speed_of`: what a real run cannot exceed, not what it will reach
    """

    base: str
    parameters: int
    gpu_bytes: int
    speed_of: str
    method: str
    engine: str
    rank: int
    loss_head: str
    tokens: int
    accumulation: int
    levels: tuple[str, ...]
    streamed: int
    estimate: MemoryEstimate
    tokens_per_second: float
    limit: float

    @property
    def layers(self) -> int:
        return len(self.levels)

    @property
    def recomputed(self) -> int:
        """Layers whose whole forward pass is done again in the backward pass."""
        return self.levels.count("input") + self.levels.count("host")

    @property
    def resident(self) -> int:
        return self.layers - self.streamed

    def yaml(self) -> str:
        """The settings of `fastprice train` that this plan fixes; `data` and `out` are the user's to add."""
        import yaml

        kernels = {"fastprice": "on", "peft": "off", "unsloth": "auto"}[self.engine]
        # Streaming comes with a limit, by which a run plans what its layers keep too; Unsloth recomputes by itself.
        fitting = {"max_memory": _gib(self.gpu_bytes)} if self.streamed else {"recompute": write_levels(self.levels)}
        settings = {
            "model": {
                "base": self.base,
                "method": self.method,
                "engine": "unsloth" if self.engine == "unsloth" else "peft",
                "kernels": kernels,
                "rank": self.rank,
                **({} if self.engine == "unsloth" else fitting),
            },
            "train": {"pack_tokens": self.tokens, "gradient_accumulation": self.accumulation},
        }
        return str(yaml.safe_dump(settings, sort_keys=False))

    def summary(self) -> str:
        """The plan as a few lines for people."""
        share = self.tokens_per_second / self.limit
        keep = f"{self.layers} layers keep: {write_levels(self.levels)}"
        stream = f", {self.streamed} of {self.layers} layers streamed from the host" if self.streamed else ""
        return "\n".join(
            [
                f"{self.base} ({self.parameters / 1e9:.2f} B) in {_gib(self.gpu_bytes)}: {self.method}, rank "
                f"{self.rank}, engine {self.engine}",
                f"micro-batch of {self.tokens:,} tokens x {self.accumulation}, {keep}{stream}, loss over "
                + ("labeled tokens" if self.loss_head == "completion" else "all tokens"),
                f"expected peak {_gib(self.estimate.peak_bytes)} (at the {self.estimate.moment})"
                + (f", and {_gib(self.estimate.host_bytes)} on the host" if self.estimate.host_bytes else ""),
                f"at most {self.tokens_per_second:,.0f} tokens/s on an {self.speed_of} by arithmetic, "
                f"{100 * share:.0f} % of the {self.limit:,.0f} that memory to spare would allow",
            ]
        )


def make_plan(base: Any, gpu_bytes: str | int, **options: Any) -> Plan:
    """The fastest plan that fits; options as in `find_plan`. ConfigError when nothing fits, with what is needed."""
    plan = find_plan(base, gpu_bytes, **options)
    if plan is not None:
        return plan
    shape, budget = read_shape(base), parse_bytes(gpu_bytes)
    least = min(candidate.estimate.peak_bytes for candidate in _candidates(base, shape, budget, _options(options)))
    near = [name for name in _by_size() if read_shape(name).parameters < shape.parameters]
    fitting = next((name for name in reversed(near) if find_plan(name, budget, **options)), None)
    advice = f"; {fitting} fits" if fitting else ""
    raise ConfigError(
        f"{shape.name} does not fit in {_gib(budget)}: the smallest plan needs {_gib(round(least / (1 - HEADROOM)))}"
        + advice
    )


def find_plan(base: Any, gpu_bytes: str | int, **options: Any) -> Plan | None:
    """The fastest plan that fits in `gpu_bytes`, or None.

    method      "qlora", "lora", "full", or "auto": qlora or lora, whichever is faster     (default "qlora")
    tokens      tokens of a micro-batch to aim at (4096); rank (16); engine ("peft"); optimizer ("adamw_torch")
    loss_head   "completion" or "full"; labeled: share of tokens with a label (4 / 180); text: mean tokens (180)
    streaming   whether frozen layers may come from the host (False)
    least       tokens below which no micro-batch is made smaller (512)
    gpu         name of the card whose limits give the speed (the first known one with that memory)
    """
    budget, settings = parse_bytes(gpu_bytes), _options(options)
    shape = read_shape(base)
    fitting = [plan for plan in _candidates(base, shape, budget, settings) if _fits(plan.estimate, budget)]
    return max(fitting, key=lambda plan: (plan.tokens_per_second, plan.tokens), default=None)


@dataclass(frozen=True)
class _Options:
    method: str = "qlora"
    tokens: int = 4096
    rank: int = 16
    engine: str = "peft"
    optimizer: str = "adamw_torch"
    loss_head: str = "completion"
    labeled: float = LABELED
    text: int = 180
    streaming: bool = False
    least: int = LEAST_TOKENS
    gpu: str | None = None


def _options(options: dict[str, Any]) -> _Options:
    found = _Options(**options)
    for name, value in (("tokens", found.tokens), ("text", found.text)):
        if not isinstance(value, int) or isinstance(value, bool) or value < LEAST_PACK:
            raise ConfigError(f"{name}: {value!r} is not a whole number of at least {LEAST_PACK}")
    return found


def _candidates(base: Any, shape: ModelShape, budget: int, options: _Options) -> Iterator[Plan]:
    """For each method and micro-batch size, the plan with the least recomputation and streaming that fits; else the one
    that needs the least memory."""
    gpu = known_gpu(options.gpu) if options.gpu else _gpu_of(budget)
    methods = ("qlora", "lora") if options.method == "auto" else (options.method,)
    for method in methods:
        tokens = options.tokens
        while True:
            yield _least(base, shape, budget, options, gpu, method, tokens)
            if tokens // 2 < options.least:
                break
            tokens //= 2


def _least(base: Any, shape: ModelShape, budget: int, options: _Options, gpu: Gpu, method: str, tokens: int) -> Plan:
    def estimate(levels: Sequence[str], streamed: int) -> MemoryEstimate:
        return estimate_memory(
            shape, method=method, rank=options.rank, tokens=tokens, sequences=max(1, tokens // options.text),
            optimizer=options.optimizer, recompute="all" if options.engine == "unsloth" else levels,
            loss_head=options.loss_head, labeled=options.labeled, engine=options.engine, streaming=streamed,
        )  # fmt: skip

    def fits(levels: Sequence[str], streamed: int = 0) -> bool:
        return _fits(estimate(levels, streamed), budget)

    # Unsloth recomputes every layer, from its input on the host, whatever fits.
    hosted = ("host",) * shape.layers
    levels, streamed = hosted if options.engine == "unsloth" else choose_levels(shape.layers, fits), 0
    if levels is None or not fits(levels):
        levels = hosted
        if options.streaming and method == "qlora" and options.engine != "unsloth":
            found = _first(range(1, shape.layers + 1), lambda count: fits(hosted, count))
            streamed = shape.layers if found is None else found
            if found is not None:
                levels = choose_levels(shape.layers, lambda levels: fits(levels, streamed)) or hosted
    labeled = 1.0 if options.loss_head == "full" else options.labeled
    counts = Counter(levels)
    step = Step(tokens, counts["input"] + counts["host"], labeled, method, options.rank, options.text, streamed,
                counts["costly"], counts["host"], options.engine != "peft")  # fmt: skip
    spare = Step(options.tokens, 0, options.labeled, method, options.rank, options.text)
    return Plan(
        base=str(base) if isinstance(base, str | Path) else shape.name,
        parameters=shape.parameters,
        gpu_bytes=budget,
        speed_of=gpu.name,
        method=method,
        engine=options.engine,
        rank=options.rank,
        loss_head=options.loss_head,
        tokens=tokens,
        accumulation=max(1, round(options.tokens / tokens)),
        levels=levels,
        streamed=streamed,
        estimate=estimate(levels, streamed),
        tokens_per_second=tokens / step_seconds(shape, step, gpu),
        limit=options.tokens / step_seconds(shape, spare, gpu),
    )


def choose_levels(layers: int, fits: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...] | None:
    """The levels that cost the least time of those that fit; None when none do.

    As few layers on the host as must be, then as few that keep their input alone, then as few at "costly": the first
    ones, whose turn in the backward pass comes when the others have let go of theirs.
    """

    def arranged(hosted: int, again: int, cheap: int) -> tuple[str, ...]:
        counts = zip(("host", "input", "costly", "all"), (0, hosted, again, cheap), (hosted, again, cheap, layers),
                     strict=True)  # fmt: skip
        return tuple(level for level, start, end in counts for _ in range(start, end))

    hosted = _first(range(layers + 1), lambda count: fits(arranged(count, layers, layers)))
    if hosted is None:
        return None
    again = _first(range(hosted, layers), lambda count: fits(arranged(hosted, count, layers)))
    again = layers if again is None else again
    cheap = _first(range(again, layers), lambda count: fits(arranged(hosted, again, count)))
    return arranged(hosted, again, layers if cheap is None else cheap)


def _first(counts: range, fits: Callable[[int], bool]) -> int | None:
    """The smallest of `counts` that fits, given that what fits with a count fits with a larger one; None if none."""
    low, high = counts.start, counts.stop
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return low if low < counts.stop else None


def _fits(estimate: MemoryEstimate, budget: int) -> bool:
    return estimate.peak_bytes <= budget * (1 - HEADROOM)


def _gpu_of(budget: int) -> Gpu:
    """The card whose limits stand for a memory size: an RTX 4090 up to 24 GiB, then the next larger known card."""
    ladder = [known_gpu(name) for name in ("RTX 4090", "RTX 5090", "A100-40GB", "L40S", "H100", "H200")]
    assert all(gpu in GPUS for gpu in ladder)
    return next((gpu for gpu in ladder if gpu.memory >= budget), ladder[-1])


@dataclass(frozen=True)
class Need:
    """What a model needs at least (bytes of GPU memory), and whether a plan fits in the memory that was asked about."""

    base: str
    parameters: int
    least_bytes: int
    plan: Plan | None


def next_larger(base: Any, gpu_bytes: str | int, **options: Any) -> Need | None:
    """What the next larger shipped model needs at least; None when `base` is as large as the largest."""
    shape, budget = read_shape(base), parse_bytes(gpu_bytes)
    larger = next((name for name in _by_size() if read_shape(name).parameters > 1.05 * shape.parameters), None)
    if larger is None:
        return None
    candidates = list(_candidates(larger, read_shape(larger), 1, _options(options)))
    least = min(candidate.estimate.peak_bytes for candidate in candidates)
    return Need(
        larger, read_shape(larger).parameters, round(least / (1 - HEADROOM)), find_plan(larger, budget, **options)
    )


def plan_table(
    sizes: Sequence[str | int] = GPU_SIZES, models: Iterable[str] | None = None, **options: Any
) -> list[tuple[str, list[Plan | None]]]:
    """For each model (the shipped ones, smallest first) its plan, or None, in each GPU size."""
    names = _by_size() if models is None else list(models)
    return [(name, [find_plan(name, size, **options) for size in sizes]) for name in names]


def table(rows: Sequence[tuple[str, Sequence[Plan | None]]], sizes: Sequence[str | int] = GPU_SIZES) -> str:
    """`plan_table` in Markdown: tokens of the micro-batch, and layers at "costly" (c), recomputed (r), of
    which from the host (h), or streamed (s)."""

    def cell(plan: Plan | None) -> str:
        if plan is None:
            return "-"
        counts = Counter(plan.levels)
        marks = {"c": counts["costly"], "r": plan.recomputed, "h": counts["host"], "s": plan.streamed}
        return " ".join([str(plan.tokens), *(f"{mark}{count}/{plan.layers}" for mark, count in marks.items() if count)])

    heads = ["model", *(_gib(parse_bytes(size)) for size in sizes)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join([name, *map(cell, plans)]) + " |" for name, plans in rows]
    return "\n".join(lines)


def _by_size() -> list[str]:
    return sorted(shipped_names(), key=lambda name: read_shape(name).parameters)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB".replace(".0 ", " ")
