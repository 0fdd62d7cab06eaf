"""The time of a training step by arithmetic, for us, a tuned Unsloth and packed TRL, to be judged later by measurement.

A step is 4,096 tokens in one pack or in smaller ones that add up to it, and each peer gets the fastest setting that
fits the card. Frozen products are operations; everything else that a layer launches is bytes, as counted by `fastprice
bench traffic` (traffic.py); what is recomputed runs its forward pass again. `ASSUMPTIONS` has every number that was
assumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastprice.benchmarking.traffic import LABELED, RANK, TOKENS, LayerTraffic, read_traffic
from fastprice.benchmarking.traffic_counter import KINDS
from fastprice.benchmarking.unsloth_traffic import ASSUMPTIONS as UNSLOTH_ASSUMPTIONS
from fastprice.memory.byte_sizes import GIB
from fastprice.memory.estimate import estimate_memory
from fastprice.memory.planner import HEADROOM, MIN_TOKENS, find_plan
from fastprice.memory.recompute_levels import format_recompute_levels
from fastprice.memory.roofline import NF4_BYTES, Gpu, find_gpu
from fastprice.models.shapes import ModelShape, read_shape

__all__ = ["MODELS", "PEERS", "StepTime", "step_time", "step_time_page"]

MODELS = ("Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B", "Qwen2.5-32B")
CARDS = ("RTX 4090", "RTX 3090", "H200")
PEERS = {"fastprice": "fastprice", "unsloth": "Unsloth tuned", "peft": "TRL packed"}
SOURCES = {
    "RTX 4090": "NVIDIA, Ada GPU architecture whitepaper: 165.2 TFLOP/s with fp32 sums, 1,008 GB/s",
    "RTX 3090": "NVIDIA, Ampere GA102 whitepaper: 71 TFLOP/s with fp32 sums, 936 GB/s",
    "H200": "measured in this project: a copy and a large bf16 product",
}

PRODUCT_SHARE = 0.9  # of a card's operations that large products reach
COPY_SHARE = 0.9  # of a data sheet's bandwidth that a copy reaches
ATTENTION_SHARE = 0.1  # of a card's operations that attention reaches on texts of 180 tokens
LAUNCH_SECONDS = 8e-6  # of the host, for an operator
TEXT_TOKENS = 180
OPTIMIZER_BYTES = 28  # AdamW in fp32: gradient, weight and two states read, weight and states written
NORM_KINDS = ("eager norm", "fused norm")

ASSUMPTIONS = (
    f"A step is {TOKENS:,} tokens in texts of {TEXT_TOKENS}, of which {LABELED} have a loss; QLoRA, rank {RANK} on all "
    "linear layers, NF4 with double quantization.",
    f"Frozen products reach {PRODUCT_SHARE:.0%} of the card's operations. Everything else is bytes at the card's "
    f"bandwidth: what was measured, or {COPY_SHARE:.0%} of a data sheet. Nothing overlaps, nothing stays in a "
    "cache.",
    f"Attention is the longer of its bytes and its operations at {ATTENTION_SHARE:.0%} of the card's, for all three: a "
    "kernel for texts of a pack, none with a mask over the whole pack.",
    f"The host launches an operator in {LAUNCH_SECONDS * 1e6:.0f} us, for all three; a step takes the longer of host "
    "and device. CUDA graphs, which only fastprice has, are left out.",
    "fastprice: the plan of `fastprice plan` for the card, with kernels and layer offload. Of the last layer's o_proj "
    "and MLP the operations count at labeled positions alone; loss as counted.",
    "Unsloth: no layer recomputed where that fits, else every layer; its step as `fastprice bench traffic` has it. It "
    "needs the memory of ours at the same recompute level. Its loss computes logits for all tokens: each written, "
    "read, overwritten by its gradient and read, and the output layer read twice.",
    "TRL: no layer recomputed where that fits, else every layer; the launches of stock PEFT as counted. Its loss "
    "computes logits for labeled tokens, forward twice, and reads the output layer three times.",
    "Recomputed layers run their forward pass again, at recompute level `selective` their norms, at `mlp` gate and up "
    "too. Copies to and from the host overlap with the rest, and a step takes no less than they do. `dense` layers, "
    "whose frozen weights stay dequantized, dequantize nothing.",
    f"AdamW moves {OPTIMIZER_BYTES} bytes for each adapter weight and step. Embedding and last norm are left out.",
)


@dataclass(frozen=True)
class StepTime:
    """The seconds of a step of `TOKENS` tokens.

    tokens    of one micro-batch           recompute   levels of all layers, in words
    host      seconds of launching         parts       what the device's seconds go into
    """

    tokens: int
    recompute: str
    parts: Mapping[str, float]
    host: float
    transfer: float

    @property
    def seconds(self) -> float:
        return max(sum(self.parts.values()), self.host, self.transfer)


@dataclass(frozen=True)
class _Setting:
    """A way to run a step: tokens of a micro-batch, the level of every layer, layers whose weights are on the host, and
    layers whose weights stay dequantized."""

    tokens: int
    levels: tuple[str, ...]
    offloaded_layers: int = 0
    dense_layers: int = 0


def step_time(model: str, peer: str, gpu: Gpu, traffic: LayerTraffic) -> StepTime | None:
    """The time of the peer's fastest setting that fits the card; None where none fits.

    traffic: a layer of that model as that peer runs it.
    """
    shape = read_shape(model)
    times = [_time(shape, peer, gpu, traffic, setting) for setting in _settings(model, shape, peer, gpu)]
    return min(times, key=lambda time: time.seconds, default=None)


def _settings(model: str, shape: ModelShape, peer: str, gpu: Gpu) -> Iterator[_Setting]:
    if peer == "fastprice":
        plan = find_plan(model, gpu.memory, engine="fastprice", tokens=TOKENS, rank=RANK, gpu=gpu.name,
                         layer_offload=True)  # fmt: skip
        if plan is not None:
            yield _Setting(plan.tokens, plan.levels, plan.offloaded_layers, plan.dense_layers)
        return
    recomputed = "offload" if peer == "unsloth" else "full"
    tokens = TOKENS
    while tokens >= MIN_TOKENS:
        for level in ("none", recomputed):
            estimate = estimate_memory(
                model, tokens=tokens, sequences=max(1, tokens // TEXT_TOKENS), rank=RANK, recompute=level,
                loss_head="completion", labeled=1.0 if peer == "unsloth" else LABELED / TOKENS,
                engine="fastprice" if peer == "unsloth" else "peft",
            )  # fmt: skip
            if estimate.peak_bytes <= gpu.memory * (1 - HEADROOM):
                yield _Setting(tokens, (level,) * shape.layers)
        tokens //= 2


def _time(shape: ModelShape, peer: str, gpu: Gpu, traffic: LayerTraffic, setting: _Setting) -> StepTime:
    tokens, levels, layers = setting.tokens, setting.levels, shape.layers
    flops, bandwidth = PRODUCT_SHARE * gpu.flops, (1 if gpu.measured else COPY_SHARE) * gpu.bandwidth
    recomputed, of_mlp = levels.count("full") + levels.count("offload"), levels.count("mlp")
    weights = shape.layer_linear_weights
    gate_up = sum(linear.weights for linear in shape.linears[4:6])
    skipped = 0.0
    if peer == "fastprice":  # the last layer, forward and backward; its recomputation skips them too
        after_attention = weights - sum(linear.weights for linear in shape.linears[:3])
        skipped = (1 - LABELED / TOKENS) * after_attention * (3 if levels[-1] in ("full", "offload") else 2)
    products = 2 * tokens * ((2 * layers + recomputed) * weights + of_mlp * gate_up - skipped) / flops

    def moved(kind: str, scale: float = 1.0) -> float:
        forward, backward = (traffic.kinds[phase].get(kind, (0, 0.0))[1] for phase in ("forward", "backward"))
        again: float = recomputed
        if kind in NORM_KINDS:
            again += levels.count("selective") + of_mlp
        elif kind == "LoRA product":
            again += of_mlp * gate_up / weights
        elif kind == "dequantization":
            scale *= 1 - setting.dense_layers / layers
        return scale * tokens * ((layers + again) * forward + layers * backward) / bandwidth

    attention_operations = 2 * TEXT_TOKENS * shape.query_width * (layers + recomputed + 2.5 * layers)
    attention = max(moved("attention"), tokens * attention_operations / (ATTENTION_SHARE * gpu.flops))
    # Weights are dequantized, and adapters cast, once a micro-batch, whatever its tokens: counted with TOKENS.
    per_batch = TOKENS / tokens
    rest = sum(moved(kind) for kind in KINDS if kind not in ("frozen product", "attention", "dequantization", "cast"))
    parts = {
        "products": products,
        "dequantization": moved("dequantization", per_batch),
        "attention": attention,
        "LoRA products": moved("LoRA product"),
        "norms, RoPE, eager": rest - moved("LoRA product") - moved("activation") + moved("cast", per_batch),
        "activation": moved("activation"),
        "loss": _loss_seconds(shape, peer, traffic, tokens, flops, bandwidth),
    }
    micro_batches = TOKENS / tokens
    parts = {name: micro_batches * seconds for name, seconds in parts.items()}
    parts["optimizer"] = OPTIMIZER_BYTES * layers * shape.adapter_weights(RANK) / bandwidth
    forward, backward = (traffic.sum(phases=[phase])[0] for phase in ("forward", "backward"))
    host = micro_batches * LAUNCH_SECONDS * ((layers + recomputed) * forward + layers * backward)
    copies = 2 * setting.offloaded_layers * weights * NF4_BYTES + 2 * levels.count("offload") * tokens * shape.width
    words = format_recompute_levels(levels) + (f", {setting.dense_layers} dense" if setting.dense_layers else "")
    return StepTime(tokens, words, parts, host, micro_batches * copies / gpu.pcie)


def _loss_seconds(
    shape: ModelShape, peer: str, traffic: LayerTraffic, tokens: int, flops: float, bandwidth: float
) -> float:
    """Logits, loss and their gradients of one micro-batch."""
    head, labeled = shape.lm_head_weights, tokens * LABELED / TOKENS
    if peer == "fastprice":
        assert traffic.rest is not None
        return 4 * labeled * head / flops + tokens * traffic.rest["loss"][1] / bandwidth
    if peer == "unsloth":
        return 4 * tokens * head / flops + (4 * 2 * tokens * shape.vocabulary + 2 * 2 * head) / bandwidth
    return 6 * labeled * head / flops + 3 * 2 * head / bandwidth


def step_time_page(figures: Path) -> str:
    """docs/explanation/step-time.md, from the file that `fastprice bench traffic` writes."""
    libraries, rows = read_traffic(figures)
    by_name = {(row.model, row.peer): row for row in rows}
    lines = [
        "# How long a step should take",
        "",
        "Made by `fastprice bench traffic --page docs/explanation/step-time.md`; not written by hand.",
        "",
        f"**Nothing here was measured**, except where the table of cards says so: a step of {TOKENS:,} tokens by",
        "arithmetic, from the launches and bytes of the real layer code, the operations of its products and the limits",
        f"of a card. Measurements will judge it. Counted with {libraries}.",
        "",
        "| model | card | " + " | ".join(f"{name}, ms" for name in PEERS.values()) + " | Unsloth / ours | TRL / ours |",
        "|---|---|" + "---|" * (len(PEERS) + 2),
    ]
    detailed: Sequence[str] = []
    for model in MODELS:
        for card in CARDS:
            gpu = find_gpu(card)
            times = {peer: step_time(model, peer, gpu, by_name[model, peer]) for peer in PEERS}
            ours = times["fastprice"]
            ratios = [
                "-" if ours is None or other is None else f"{other.seconds / ours.seconds:.2f}"
                for other in (times["unsloth"], times["peft"])
            ]
            cells = [_cell(time) for time in times.values()]
            lines.append(f"| {model} | {card} | {' | '.join([*cells, *ratios])} |")
            if card == "H200" and model == "Llama-3.1-8B":
                detailed = _parts_table(times)
    lines += [
        "",
        "Under each time: tokens of a micro-batch, recompute levels, and *host* where launching takes longer.",
        "",
    ]
    lines += ["## Where the time goes", "", "Llama-3.1-8B on an H200, ms:", "", *detailed, ""]
    lines += [
        "## Cards",
        "",
        "| card | memory, GiB | TB/s | TFLOP/s, bf16 | host to device, GB/s | source |",
        "|---|---|---|---|---|---|",
    ]
    for card in CARDS:
        gpu = find_gpu(card)
        lines.append(
            f"| {card} | {gpu.memory / GIB:.0f} | {gpu.bandwidth / 1e12:.3g} | {gpu.flops / 1e12:.0f} | "
            f"{gpu.pcie / 1e9:.0f} (assumed) | {SOURCES[card]} |"
        )
    lines += ["", "## Assumptions", "", *(f"- {each}" for each in ASSUMPTIONS), ""]
    lines += ["What Unsloth's fused form moves, by arithmetic:", "", *(f"- {each}" for each in UNSLOTH_ASSUMPTIONS), ""]
    return "\n".join(lines)


def _cell(time: StepTime | None) -> str:
    if time is None:
        return "does not fit"
    bound = ", host" if time.host >= time.seconds else ", copies" if time.transfer >= time.seconds else ""
    return f"**{1000 * time.seconds:,.0f}**<br>{time.tokens:,}, {time.recompute}{bound}"


def _parts_table(times: Mapping[str, StepTime | None]) -> Sequence[str]:
    known = {peer: time for peer, time in times.items() if time is not None}
    names: Iterable[str] = dict.fromkeys(name for time in known.values() for name in time.parts)
    lines = ["| | " + " | ".join(PEERS[peer] for peer in known) + " |", "|---|" + "---|" * len(known)]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(f"{1000 * time.parts[name]:.1f}" for time in known.values()) + " |")
    lines.append("| launching (host) | " + " | ".join(f"{1000 * time.host:.1f}" for time in known.values()) + " |")
    return lines
