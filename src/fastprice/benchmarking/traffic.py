"""Launches and bytes of a decoder layer in training: ours, stock PEFT, and Unsloth's fused form by arithmetic.

`fastprice bench traffic` counts the operators of the real code (`traffic_counter.py`, `dry_run.py`) with three
layers and with two: the difference is one inner layer, forward and backward, exactly. Two layers less two inner ones
are the rest of the step: embedding, last norm, loss, and what the last layer saves. It writes the figures to a file
that is committed; with `--check` it fails where one rose, or where a layer of ours is above a bar.

*Eager* is every launch that is no matrix product, attention, dequantization, gated activation, fused norm or fused
RoPE: norms and RoPE in PyTorch, residual additions, casts, copies, and autograd's sums of gradients. The bars are
strict: they count the fused norm and RoPE launches too. kB are 1,000 bytes, for a token and a layer.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastprice.benchmarking.traffic_counter import EAGER_KINDS, KINDS, Launch
from fastprice.benchmarking.unsloth_traffic import unsloth_layer_traffic
from fastprice.errors import DataError
from fastprice.models.shapes import read_shape, settings_of

__all__ = [
    "BAR_KB",
    "BAR_OPERATIONS",
    "LayerTraffic",
    "above_bars",
    "check_traffic",
    "count_layer",
    "read_traffic",
    "regressions",
    "traffic_table",
    "update_traffic",
    "where_table",
]

TOKENS, RANK = 4096, 16
LABELED = round(TOKENS * 4 / 180)  # price texts: about 4 tokens of the price in 180
BAR_KB, BAR_OPERATIONS = 250.0, 60
BAR_MODEL = "Llama-3.1-8B"  # the bar in kB is for its widths
BARRED = ("Llama-3.1-8B", "Llama-3.2-1B")
STRICT_KINDS = (*EAGER_KINDS, "fused norm", "fused RoPE")
PHASES = ("forward", "backward")

# google/gemma-2b, whose shape is not shipped.
_GEMMA_2B = {
    "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
# Those that the bars and the table of step times are for, then one of each other family of `fastprice.models.families`.
MODELS: dict[str, tuple[str, ...]] = {
    "Llama-3.1-8B": ("fastprice", "peft", "unsloth"),
    "Llama-3.2-1B": ("fastprice", "peft", "unsloth"),
    "Llama-3.2-3B": ("fastprice", "peft", "unsloth"),
    "Qwen2.5-32B": ("fastprice", "peft", "unsloth"),
    "Mistral-7B-v0.3": ("fastprice", "unsloth"),
    "Qwen2.5-0.5B": ("fastprice", "unsloth"),
    "Qwen3-0.6B": ("fastprice", "unsloth"),
    "gemma-2b": ("fastprice", "unsloth"),
    "gemma-2-2b": ("fastprice", "unsloth"),
}
_TOLERANCE = 1e-3  # figures are exact; this is for rounding in the file


@dataclass(frozen=True)
class LayerTraffic:
    """One inner layer of `model` as `peer` trains it.

    kinds    phase -> kind -> (launches, bytes for each token)
    rest     kind -> (launches, bytes for each token) of the step less that of its layers, all taken for inner ones:
             what the last layer saves makes some negative; None where it is not known
    """

    model: str
    peer: str
    kinds: Mapping[str, Mapping[str, tuple[int, float]]]
    rest: Mapping[str, tuple[int, float]] | None = None

    def sum(self, kinds: Iterable[str] = KINDS, phases: Iterable[str] = PHASES) -> tuple[int, float]:
        """(launches, kB for each token) of these kinds in these phases."""
        found = [self.kinds[phase][kind] for phase in phases for kind in kinds if kind in self.kinds[phase]]
        return sum(launches for launches, _ in found), sum(size for _, size in found) / 1000


_Place = tuple[str, str, str, str]  # phase, kind, operator, where


def settings_for(model: str) -> dict[str, Any]:
    """The configuration of a model of `MODELS`, or of any whose shape is shipped."""
    return dict(_GEMMA_2B) if model == "gemma-2b" else settings_of(model)


def count_layer(model: str, peer: str) -> tuple[LayerTraffic, dict[_Place, tuple[int, float]]]:
    """The traffic of one inner layer, and the same by place: (launches, bytes for each token).

    peer: "fastprice" (kernels installed with loss head and last layer) or "peft" (stock PEFT and bitsandbytes, adapters
    in fp32 under bf16 autocast, as TRL trains), which are counted, or "unsloth", by arithmetic, which has no places.
    """
    if peer == "unsloth":
        shape = read_shape(settings_for(model))
        return LayerTraffic(model, peer, unsloth_layer_traffic(shape, tokens=TOKENS, rank=RANK)), {}
    from fastprice.benchmarking.dry_run import count_training_step

    two, three = (
        count_training_step(
            settings_for(model) | {"num_hidden_layers": layers},
            tokens=TOKENS, labeled=LABELED, rank=RANK, kernels=peer == "fastprice",
        )
        for layers in (2, 3)
    )  # fmt: skip
    places = _difference(_by_place(three), _by_place(two))
    kinds = {phase: _by_kind(places, phase) for phase in PHASES}
    whole, layer = _by_kind(_by_place(two)), _by_kind(places)
    rest = {}
    for kind in dict.fromkeys((*whole, *layer)):
        (launches, size), (inner, inner_size) = whole.get(kind, (0, 0.0)), layer.get(kind, (0, 0.0))
        rest[kind] = (launches - 2 * inner, size - 2 * inner_size)
    return LayerTraffic(model, peer, kinds, rest if peer == "fastprice" else None), places


def _by_kind(places: Mapping[_Place, tuple[int, float]], phase: str | None = None) -> dict[str, tuple[int, float]]:
    kinds: dict[str, tuple[int, float]] = {}
    for (in_phase, kind, *_), (launches, size) in places.items():
        if phase in (None, in_phase):
            before = kinds.get(kind, (0, 0.0))
            kinds[kind] = (before[0] + launches, before[1] + size)
    return kinds


def _by_place(launches: Sequence[Launch]) -> dict[_Place, tuple[int, float]]:
    counts: Counter[_Place] = Counter()
    sizes: defaultdict[_Place, float] = defaultdict(float)
    for each in launches:
        place = (each.phase, each.kind, each.operator, each.where)
        counts[place] += 1
        sizes[place] += each.bytes / TOKENS
    return {place: (counts[place], sizes[place]) for place in counts}


def _difference(
    more: Mapping[_Place, tuple[int, float]], less: Mapping[_Place, tuple[int, float]]
) -> dict[_Place, tuple[int, float]]:
    found = {}
    for place in dict.fromkeys((*more, *less)):
        (a, b), (c, d) = more.get(place, (0, 0.0)), less.get(place, (0, 0.0))
        if a != c or b != d:
            found[place] = (a - c, b - d)
    return found


def update_traffic(path: Path) -> int:
    """Counts all models and writes the figures to `path`; prints them and what is above a bar. Exit status 0."""
    rows = _count_all()
    _write(path, rows)
    print(traffic_table(rows))
    for line in above_bars(rows):
        print(f"above a bar: {line}")
    print(f"written: {path}")
    return 0


def check_traffic(path: Path) -> int:
    """Counts all models; the exit status, 1 where a figure of ours is above that in `path`, or above a bar.

    Raises DataError where `path` holds no traffic figures.
    """
    libraries, before = read_traffic(path)
    rows = _count_all()
    worse = [f"worse: {line}" for line in regressions(before, rows)]
    if worse and libraries != _libraries():
        worse.append(f"{path} was made with {libraries}, this is {_libraries()}")
    if worse:
        worse.append(f"if this is intended: fastprice bench traffic {path}, and commit the file")
    worse += [f"above a bar: {line}" for line in above_bars(rows)]
    for line in worse:
        print(line, file=sys.stderr)
    return 1 if worse else 0


def regressions(before: Iterable[LayerTraffic], after: Iterable[LayerTraffic]) -> list[str]:
    """Where a layer of ours launches or moves more than before, forward or backward, a line each."""
    known = {row.model: row for row in before if row.peer == "fastprice"}
    found = []
    for row in after:
        if row.peer != "fastprice":
            continue
        old = known.get(row.model)
        if old is None:
            found.append(f"{row.model} has no figures yet")
            continue
        for phase in PHASES:
            for name, kinds in (("eager", EAGER_KINDS), ("eager, norms and RoPE", STRICT_KINDS), ("total", KINDS)):
                (was, was_kb), (now, now_kb) = old.sum(kinds, [phase]), row.sum(kinds, [phase])
                if now > was:
                    found.append(f"{row.model} {phase}, {name}: {was} launches before, {now} now")
                if now_kb > was_kb * (1 + _TOLERANCE):
                    found.append(f"{row.model} {phase}, {name}: {was_kb:,.1f} kB before, {now_kb:,.1f} now")
    return found


def above_bars(rows: Sequence[LayerTraffic]) -> list[str]:
    """The bars that a Llama layer of ours does not meet, a line each.

    At most `BAR_OPERATIONS` launches and, for `BAR_MODEL`, `BAR_KB` of eager, norm and RoPE launches together; and in
    total at most what Unsloth's form moves.
    """
    by_name = {(row.model, row.peer): row for row in rows}
    found = []
    for model in BARRED:
        ours, unsloth = by_name[model, "fastprice"], by_name[model, "unsloth"]
        launches, size = ours.sum(STRICT_KINDS)
        if launches > BAR_OPERATIONS:
            found.append(f"{model}: {launches} eager, norm and RoPE launches, at most {BAR_OPERATIONS}")
        if model == BAR_MODEL and size > BAR_KB:
            found.append(f"{model}: {size:,.1f} kB of eager, norm and RoPE launches, at most {BAR_KB:g}")
        if ours.sum()[1] > unsloth.sum()[1]:
            found.append(f"{model}: {ours.sum()[1]:,.1f} kB in total, Unsloth's form {unsloth.sum()[1]:,.1f}")
    return found


def traffic_table(rows: Sequence[LayerTraffic]) -> str:
    """Markdown: launches and kB of one layer by kind, forward and backward, and the sums that the bars are for."""
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        peers = [row for row in rows if row.model == model]
        lines += [
            f"### {model}",
            "",
            "| launches, kB | " + " | ".join(f"{row.peer}, forward | backward" for row in peers) + " |",
            "|---|" + "---|" * 2 * len(peers),
        ]
        sums = {
            "**eager**": EAGER_KINDS, "**eager, norms and RoPE**": STRICT_KINDS, "**total**": KINDS,
        }  # fmt: skip
        for name, kinds in ({kind: (kind,) for kind in KINDS} | sums).items():
            cells = [row.sum(kinds, [phase]) for row in peers for phase in PHASES]
            if any(launches for launches, _ in cells):
                lines.append(f"| {name} | " + " | ".join(f"{n}, {kb:,.1f}" for n, kb in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def where_table(model: str) -> str:
    """Every eager, norm and RoPE launch of a layer of ours, a line each: launches, kB for each token, phase, kind,
    operator and the line that issues it, the most bytes first."""
    traffic, places = count_layer(model, "fastprice")
    launches, size = traffic.sum(STRICT_KINDS)
    lines = [f"{model}: {launches} launches, {size:,.1f} kB a token and layer"]
    for (phase, kind, operator, where), (count, each) in sorted(places.items(), key=lambda item: -item[1][1]):
        if kind in STRICT_KINDS:
            lines.append(f"{count:3d} {each / 1000:8.2f} kB  {phase:8}  {kind:11}  {operator:24}  {where}")
    return "\n".join(lines)


def _count_all() -> list[LayerTraffic]:
    return [count_layer(model, peer)[0] for model, peers in MODELS.items() for peer in peers]


def _libraries() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))


def _write(path: Path, rows: Iterable[LayerTraffic]) -> None:
    lines = []
    for row in rows:
        kinds = {phase: _rounded(row.kinds[phase]) for phase in PHASES}
        rest = None if row.rest is None else _rounded(row.rest)
        lines.append(json.dumps({"model": row.model, "peer": row.peer, **kinds, "rest": rest}))
    head = json.dumps({"libraries": _libraries(), "tokens": TOKENS, "rank": RANK, "labeled": LABELED})
    path.write_text(head[:-1] + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n", "utf-8")


def _rounded(kinds: Mapping[str, tuple[int, float]]) -> dict[str, list[float]]:
    return {kind: [launches, round(size, 1)] for kind, (launches, size) in sorted(kinds.items())}


def read_traffic(path: Path) -> tuple[str, list[LayerTraffic]]:
    """(versions of the libraries, rows) of a file that `update_traffic` made; DataError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            LayerTraffic(
                row["model"],
                row["peer"],
                {phase: _pairs(row[phase]) for phase in PHASES},
                None if row["rest"] is None else _pairs(row["rest"]),
            )
            for row in content["rows"]
        ]
        return str(content["libraries"]), rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no traffic figures ({error}); make it with: fastprice bench traffic") from error


def _pairs(kinds: Mapping[str, Sequence[float]]) -> dict[str, tuple[int, float]]:
    return {kind: (int(launches), size) for kind, (launches, size) in kinds.items()}
