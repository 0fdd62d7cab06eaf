"""Results as tables: for the README, for the end of a run, and one result against another.

Every number comes from a result file. A result taken on a CPU says so in its title, and arithmetic limits have a table
of their own: nothing here can make a figure look as if a GPU had been measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprice.benchmarking.analysis import PHASES, ok_rows, summarize_kernels, summarize_steps
from fastprice.errors import DataError

__all__ = ["compare", "find_results", "limits_table", "load_result", "markdown", "paste_line", "short_table", "title"]

GIB = 2**30
Result = Mapping[str, Any]
_NOISE_FLOOR = 0.03  # two runs of one commit on one machine differ by this much without a reason


def load_result(path: Path) -> dict[str, Any]:
    """A result file; DataError for anything else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        result["environment"]["kind"], result["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no benchmark result ({error}); make one with: fastprice bench") from error
    return dict(result)


def find_results(folder: Path) -> list[Path]:
    """The result files in `folder`, the oldest first; DataError where there is none."""
    found = sorted(folder.glob("*.json"), key=lambda path: load_result(path)["environment"]["time"])
    if not found:
        raise DataError(f"{folder} holds no benchmark results (*.json); make one with: fastprice bench --out {folder}")
    return found


def title(result: Result) -> str:
    """What was measured where; says CPU for a CPU."""
    about = result["environment"]
    where = about["device"] if about["kind"] == "gpu" else f"{about['device']}: the code exercised, no GPU figure"
    return f"{where} ({about['time'][:10]}, commit {about['commit']})"


def short_table(path: Path) -> str:
    """The result as a few lines of text for the end of a run."""
    result = load_result(path)
    failed = [row for row in result["rows"] if row.get("status") in ("failed", "wrong")]
    parts = [title(result), _limits_line(result), *_blocks(result)]
    parts += [f"{row['stage']}: {row['status']}: {row.get('reason', '')}" for row in failed]
    spoilers = result["environment"].get("spoilers") or []
    parts += [f"beware: {each}" for each in spoilers]
    return "\n".join(part for part in parts if part)


def markdown(result: Result) -> str:
    """The README's tables of one result, under its title."""
    blocks = [f"**{title(result)}**", _limits_line(result), *_blocks(result)]
    versions = result["environment"].get("versions", {})
    names = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "liger-kernel")
    blocks.append("Versions: " + ", ".join(f"{name} {versions[name]}" for name in names if name in versions) + ".")
    return "\n\n".join(block for block in blocks if block) + "\n"


def paste_line(result: Result) -> str:
    """One line for an issue or a chat: device, versions, the ratios to each peer."""
    about = result["environment"]
    steps = [entry for entry in summarize_steps(result["rows"], result["limits"]) if entry["ratio"]]
    best = [entry for entry in summarize_steps(result["rows"], result["limits"]) if entry["ok"]]
    top = max(best, key=lambda entry: entry["tokens_per_second"], default=None)
    parts = [f"fastprice bench | {about['device']}" + (" | CPU, no GPU figure" if about["kind"] != "gpu" else "")]
    if top:
        parts.append(f"{top['model']} {top['peer']} {top['tokens_per_second']:,.0f} tok/s")
    parts += [f"{entry['ratio']['mid']:.2f}x {entry['peer']}" for entry in steps]
    parts += [f"{each['family']} {each['mean']:.2f}x {each['peer']}" for each in summarize_kernels(result["rows"])]
    versions = about.get("versions", {})
    parts.append(" ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "unsloth") if name in versions))
    parts.append(str(about["commit"]))
    return " | ".join(parts)


def limits_table(models: Sequence[str], tokens: int = 4096) -> str:
    """Arithmetic, not measurement: FLOP a token and the tokens/s that two cards could reach at most.

    The cards' figures: H200 4.3 TB/s copy and 790 TFLOP/s bf16 as measured on one, RTX 4090 1.0 TB/s and 165 TFLOP/s
    from its data sheet. Weights are dequantized once forward and once backward.
    """
    from fastprice.benchmarking.cases import NF4_BYTES, shape_of, step_flops

    lines = [
        "| model | GFLOP a token | ceiling H200, tok/s | ceiling RTX 4090, tok/s |",
        "|---|---|---|---|",
    ]
    for model in models:
        shape = shape_of(model)
        texts = tokens // 140
        flops = step_flops(shape, [140] * texts, 3 * texts, 16)
        moved = 2 * shape.linear_weights * (NF4_BYTES + 2)
        times = [flops / rate + moved / bandwidth for rate, bandwidth in ((790e12, 4.3e12), (165e12, 1.0e12))]
        ceilings = [140 * texts / seconds for seconds in times]
        each = flops / (140 * texts) / 1e9
        lines.append(f"| {model} | {each:.2f} | {ceilings[0]:,.0f} | {ceilings[1]:,.0f} |")
    return "\n".join(lines)


def compare(before: Result, after: Result) -> list[dict[str, Any]]:
    """What changed from one result to another of the same device, with a verdict that respects noise.

    One entry for everything that both measured: `change` is the ratio of speeds (above 1: `after` is faster), `noise`
    the share by which it may differ without meaning, the verdict "faster", "slower" or "same". DataError for results of
    two devices: their times say nothing of each other.
    """
    devices = [result["environment"]["device"] for result in (before, after)]
    if devices[0] != devices[1]:
        raise DataError(f"these results are of two devices, {devices[0]} and {devices[1]}: compare results of one")
    entries = []
    old_speeds, new_speeds = _speeds(before), _speeds(after)
    for name, (speed, noise) in new_speeds.items():
        if name not in old_speeds:
            continue
        old_speed, old_noise = old_speeds[name]
        change, allowed = speed / old_speed, _NOISE_FLOOR + noise + old_noise
        verdict = "same" if 1 / (1 + allowed) <= change <= 1 + allowed else "faster" if change > 1 else "slower"
        entries.append({"what": name, "change": change, "noise": allowed, "verdict": verdict})
    return entries


def comparison_table(entries: Iterable[Mapping[str, Any]]) -> str:
    lines = ["| what | speed after / before | noise | verdict |", "|---|---|---|---|"]
    for entry in entries:
        lines.append(f"| {entry['what']} | {entry['change']:.3f} | ±{entry['noise']:.1%} | {entry['verdict']} |")
    return "\n".join(lines)


def _speeds(result: Result) -> dict[str, tuple[float, float]]:
    """Name of a measurement -> (speed, relative noise)."""
    speeds: dict[str, tuple[float, float]] = {}
    for entry in summarize_steps(result["rows"], result["limits"]):
        rates = entry["rates"]
        within = entry["step_seconds"]["noise"] / 2
        between = (rates[-1] - rates[0]) / entry["tokens_per_second"] if len(rates) > 1 else within
        cap = f", cap {entry['cap_bytes'] / GIB:.0f} GiB" if entry["cap_bytes"] else ""
        name = f"{entry['model']}, {entry['tokens']} tokens, rank {entry['rank']}, {entry['peer']}{cap}"
        speeds[name] = (entry["tokens_per_second"], between)
    for row in ok_rows(result["rows"], "kernels"):
        beside = " beside unsloth" if row["unsloth"] else ""
        took = row["seconds"]["fastprice"]
        speeds[f"{row['family']} {row['name']}{beside}"] = (1 / took["p50"], took["noise"] / 2)
    for row in ok_rows(result["rows"], "predict"):
        rate = row["items_per_second"]["fastprice"]
        speeds[f"prediction, {row['case']['model']}"] = (rate["p50"], rate["noise"] / 2)
    return speeds


def _limits_line(result: Result) -> str:
    limits = result["limits"]
    if not limits:
        return ""
    return (
        f"Limits measured in this run: copy {limits['copy_bytes_per_second'] / 1e9:,.0f} GB/s, "
        f"matrix product ({limits['matmul']}) {limits['matmul_flops'] / 1e12:,.2f} TFLOP/s."
    )


def _blocks(result: Result) -> list[str]:
    rows = result["rows"]
    return [
        _step_table(result),
        _phase_table(result),
        _kernel_table(rows),
        _memory_table(rows),
        _predict_table(rows),
        _stream_table(rows),
        _fit_table(rows),
    ]


def _step_table(result: Result) -> str:
    entries = summarize_steps(result["rows"], result["limits"])
    if not entries:
        return ""
    gpu = result["environment"]["kind"] == "gpu"
    lines = [
        "| model, tokens, rank | peer | tokens/s | items/s | peak reserved | FLOP utilization | fastprice is |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        memory = f"{entry['peak_reserved'] / GIB:.2f} GiB" if entry["peak_reserved"] else "-"
        used = f"{entry['flop_utilization']:.1%}" if gpu and entry["flop_utilization"] is not None else "-"
        if not entry["ok"]:
            ratio = "check failed" if entry["check"] else "nothing to check against"
        elif entry["ratio"]:
            spread = entry["ratio"]
            ratio = f"{spread['mid']:.2f}x as fast"
            if entry["rounds"] > 1:
                ratio += f" ({spread['low']:.2f}-{spread['high']:.2f})"
        else:
            ratio = "-"
        rate = f"{entry['tokens_per_second']:,.0f}" + (" (noisy)" if entry["noisy"] else "")
        lines.append(
            f"| {entry['model']}, {entry['tokens']}, {entry['rank']} | {entry['peer']} | {rate} | "
            f"{entry['items_per_second']:,.1f} | {memory} | {used} | {ratio} |"
        )
    return "\n".join(lines)


def _phase_table(result: Result) -> str:
    """Where a step's time goes, in shares of it, and how the model was loaded."""
    entries = summarize_steps(result["rows"], result["limits"])
    if not entries:
        return ""
    lines = [
        "| model, tokens, rank | peer | forward | backward | optimizer, data | loading | host peak after it |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        took = {name: each["p50"] for name, each in entry["phase_seconds"].items()}
        whole = sum(took.values())
        shares = [f"{took[name] / whole:.0%}" if took else "-" for name in PHASES]
        lines.append(
            f"| {entry['model']}, {entry['tokens']}, {entry['rank']} | {entry['peer']} | {' | '.join(shares)} | "
            f"{entry['load_seconds']:.1f} s | {entry['load_host_bytes'] / GIB:.2f} GiB |"
        )
    return "\n".join(lines)


def _kernel_table(rows: Iterable[Mapping[str, Any]]) -> str:
    summary = summarize_kernels(rows)
    if not summary:
        return ""
    lines = [
        "| kernel | against | cases | fastprice is (geometric mean) | smallest | share of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for entry in summary:
        lines.append(
            f"| {entry['family']} | {entry['peer']} | {entry['cases']} | {entry['mean']:.2f}x as fast | "
            f"{entry['smallest']:.2f}x | {entry['share_of_limit']:.0%} |"
        )
    return "\n".join(lines)


def _memory_table(rows: Iterable[Mapping[str, Any]]) -> str:
    measured = [row for row in ok_rows(rows, "estimate") if "error" in row]
    if not measured:
        return ""
    lines = ["| model | tokens | peer | estimated | measured (peak reserved) | error |", "|---|---|---|---|---|---|"]
    for row in measured:
        sizes = f"{row['estimated_reserved'] / GIB:.2f} GiB | {row['measured_reserved'] / GIB:.2f} GiB"
        lines.append(f"| {row['model']} | {row['tokens']:,} | {row['peer']} | {sizes} | {row['error']:+.1%} |")
    return "\n".join(lines)


def _predict_table(rows: Iterable[Mapping[str, Any]]) -> str:
    found = ok_rows(rows, "predict")
    if not found:
        return ""
    lines = ["| prediction | way | items/s | fastprice is |", "|---|---|---|---|"]
    for row in found:
        for name, rate in row["items_per_second"].items():
            ratio = row["ratios"].get(name)
            told = f"{ratio['p50']:.2f}x as fast" if ratio else "-"
            lines.append(f"| {row['case']['model']}, batch {row['batch']} | {name} | {rate['p50']:,.1f} | {told} |")
    return "\n".join(lines)


def _stream_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Streamed beside resident training of one model; on a CPU the device is the pretend one."""
    found = ok_rows(rows, "stream")
    resident = {row["case"]["model"]: row["mean_tokens_per_second"] for row in found if not row["cap_bytes"]}
    lines = ["| streaming | layers from the host | tokens/s | of resident | peak reserved |", "|---|---|---|---|---|"]
    for row in found:
        model, rate = row["case"]["model"], row["mean_tokens_per_second"]
        share = f"{rate / resident[model]:.0%}" if row["cap_bytes"] and model in resident else "-"
        layers = f"{row['streamed_layers']} of {row['layers']}" if row["cap_bytes"] else "none"
        name = f"{model}, {row['micro_batch']:,} tokens" + (", pretend device" if not row["peak_reserved"] else "")
        peak = f"{row['peak_reserved'] / GIB:.2f} GiB" if row["peak_reserved"] else "-"
        lines.append(f"| {name} | {layers} | {rate:,.0f} | {share} | {peak} |")
    return "\n".join(lines) if found else ""


def _fit_table(rows: Iterable[Mapping[str, Any]]) -> str:
    found = ok_rows(rows, "fit")
    if not found:
        return ""
    lines = ["| GPU size | peer | largest |", "|---|---|---|"]
    for row in found:
        model = f"{row['largest_model']}, 2,048 tokens" if "largest_model" in row else ""
        tokens = f"{row['largest_tokens']:,} tokens of {row['case']['model']}" if "largest_tokens" in row else ""
        lines.append(f"| {row['case']['cap_bytes'] / GIB:.0f} GiB | {row['case']['peer']} | {model or tokens} |")
    return "\n".join(lines)
