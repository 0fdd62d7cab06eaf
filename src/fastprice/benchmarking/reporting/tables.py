"""Results as text: Markdown tables, the table at the end of a run, the line to paste, a line for a row.

Every number comes from a result file. A result measured on a CPU says so in its title, and limits by arithmetic have a
table of their own: no figure can look as if a GPU had been measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from fastprice.benchmarking.reporting.results import Result
from fastprice.benchmarking.reporting.summaries import ok_rows, summarize_kernels, summarize_steps
from fastprice.benchmarking.reporting.training_tables import phase_table, run_table, step_table
from fastprice.benchmarking.workload import GIB, NF4_BYTES, linear_weights, shape_of, step_flops

__all__ = ["comparison_table", "limits_table", "markdown", "paste_line", "row_line", "short_table", "title"]


def title(result: Result) -> str:
    """The device, date and commit of a result; says CPU for a CPU."""
    about = result["environment"]
    where = about["device"] if about["kind"] == "gpu" else f"{about['device']}: the code exercised, no GPU figure"
    return f"{where} ({about['time'][:10]}, commit {about['commit']})"


def short_table(result: Result) -> str:
    """The result as a few lines of text for the end of a run, with what failed and what `fastprice doctor` warns of."""
    failed = [row for row in result["rows"] if row.get("status") in ("failed", "wrong")]
    parts = [title(result), _limits_line(result), *_blocks(result)]
    parts += [f"{row['stage']}: {row['status']}: {row.get('reason', '')}" for row in failed]
    parts += [f"warning: {each}" for each in result["environment"].get("warnings", ())]
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


def row_line(row: Mapping[str, Any]) -> str:
    """One row as a line of text, for the screen while the suite runs."""
    kind, status = row["case"].get("kind", ""), row.get("status", "ok")
    what = " ".join(str(row["case"][name]) for name in ("peer", "model", "tokens") if name in row["case"])
    if status != "ok":
        where = " ".join(str(row[name]) for name in ("family", "name") if name in row)
        return f"{where or what or kind}: {status}: {row.get('reason', '')}"
    if kind == "kernels":
        ratios = ", ".join(f"{name} {ratio['p50']:.2f}x" for name, ratio in row["ratios"].items())
        noisy = f" (noisy: {', '.join(row['noisy'])})" if row["noisy"] else ""
        return f"{row['family']} {row['name']}: {row['share_of_limit']['fastprice']:.0%} of the limit; {ratios}{noisy}"
    if kind == "step":
        memory = row["peak_reserved"]
        reserved = f", {memory / GIB:.2f} GiB reserved" if memory else ""
        return f"{what}: {row['tokens_per_second']['p50']:,.0f} tokens/s, {row['steps']} steps{reserved}"
    if kind == "run":
        rate = f"{row['items_per_second']:,.1f} items/s"
        return f"{what}: {rate}, {row['steps']} steps, loss {row['loss_before']:.3f} to {row['loss_after']:.3f}"
    if kind == "load":
        return (
            f"{row['case']['model']} {row['way']}: {row['load_seconds']:.2f} s, host {row['host_peak'] / GIB:.2f} GiB"
        )
    if kind == "bandwidth":
        return f"dequantize {row['shape']}: {row['share_of_copy']:.0%} of the copy rate ({row['timed_by']})"
    if kind == "predict":
        rates = ", ".join(f"{name} {each['p50']:,.0f} items/s" for name, each in row["items_per_second"].items())
        return f"{what}: {rates}"
    if kind == "offload":
        offloaded = f"{row['offloaded_layers']} layers offloaded" if row["cap_bytes"] else "all layers on the device"
        return f"{what}: {row['tokens_per_second']['p50']:,.0f} tokens/s, {offloaded}"
    if kind == "tests":
        return ", ".join(f"{count} {outcome}" for outcome, count in row["counts"].items())
    if kind == "estimate":
        error = f", off by {row['error']:+.1%}" if "error" in row else ", nothing measured to compare with"
        return f"{row['model']} {row['peer']}: {row['estimated_reserved'] / GIB:.2f} GiB estimated{error}"
    if "limits" in row:
        copy, product = row["limits"]["copy_bytes_per_second"] / 1e9, row["limits"]["matmul_flops"] / 1e12
        return f"copy {copy:,.0f} GB/s, matmul {product:,.2f} TFLOP/s"
    if "environment" in row:
        return f"{row['environment']['device']}, commit {row['environment']['commit']}"
    return what or kind


def limits_table(models: Sequence[str], tokens: int = 4096) -> str:
    """Arithmetic, not measurement: FLOP a token and the tokens/s that two cards could reach at most.

    The cards' figures: H200 4.3 TB/s copy and 790 TFLOP/s bf16 as measured on one, RTX 4090 1.0 TB/s and 165 TFLOP/s
    from its data sheet. Weights are dequantized once forward and once backward.
    """
    lines = [
        "| model | GFLOP a token | ceiling H200, tok/s | ceiling RTX 4090, tok/s |",
        "|---|---|---|---|",
    ]
    for model in models:
        shape = shape_of(model)
        texts = tokens // 140
        flops = step_flops(shape, [140] * texts, 3 * texts, 16)
        moved = 2 * linear_weights(shape) * (NF4_BYTES + 2)
        times = [flops / rate + moved / bandwidth for rate, bandwidth in ((790e12, 4.3e12), (165e12, 1.0e12))]
        ceilings = [140 * texts / seconds for seconds in times]
        each = flops / (140 * texts) / 1e9
        lines.append(f"| {model} | {each:.2f} | {ceilings[0]:,.0f} | {ceilings[1]:,.0f} |")
    return "\n".join(lines)


def comparison_table(entries: Iterable[Mapping[str, Any]]) -> str:
    """The entries of `results.compare` as a Markdown table."""
    lines = ["| what | speed after / before | noise | verdict |", "|---|---|---|---|"]
    for entry in entries:
        lines.append(f"| {entry['what']} | {entry['change']:.3f} | ±{entry['noise']:.1%} | {entry['verdict']} |")
    return "\n".join(lines)


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
        step_table(result),
        phase_table(result),
        run_table(rows),
        _kernel_table(rows),
        _bandwidth_table(rows),
        _load_table(rows),
        _memory_table(rows),
        _predict_table(rows),
        _offload_table(rows),
        _fit_table(rows),
    ]


def _kernel_table(rows: Iterable[Mapping[str, Any]]) -> str:
    summary = summarize_kernels(rows)
    if not summary:
        return ""
    lines = [
        "| kernel | against | cases | fastprice is (geometric mean) | smallest | share of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for entry in summary:
        share = entry["share_of_limit"]
        lines.append(
            f"| {entry['family']} | {entry['peer']} | {entry['cases']} | {entry['mean']:.2f}x as fast | "
            f"{entry['smallest']:.2f}x | {'-' if share is None else f'{share:.0%}'} |"
        )
    return "\n".join(lines)


def _bandwidth_table(rows: Iterable[Mapping[str, Any]]) -> str:
    found = ok_rows(rows, "bandwidth")
    if not found:
        return ""
    lines = ["| dequantization | microseconds | timed by | of the copy rate | 85 % |", "|---|---|---|---|---|"]
    for row in found:
        verdict = {None: "too short to say", True: "reached", False: "missed"}[row["passes"]]
        took = f"{1e6 * row['seconds']:.1f} | {row['timed_by']}"
        lines.append(f"| {row['shape']} | {took} | {row['share_of_copy']:.0%} | {verdict} |")
    return "\n".join(lines)


def _load_table(rows: Iterable[Mapping[str, Any]]) -> str:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in ok_rows(rows, "load"):
        found.setdefault((row["case"]["model"], row["way"]), []).append(row)
    lines = ["| loading | way | first, s | later (median), s | host peak |", "|---|---|---|---|---|"]
    for (model, way), rounds in found.items():
        later = f"{median(row['load_seconds'] for row in rounds[1:]):.2f}" if rounds[1:] else "-"
        peak = max(row["host_peak"] for row in rounds) / GIB
        lines.append(f"| {model} | {way} | {rounds[0]['load_seconds']:.2f} | {later} | {peak:.2f} GiB |")
    return "\n".join(lines) if found else ""


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
            speed = f"{ratio['p50']:.2f}x as fast" if ratio else "-"
            lines.append(f"| {row['case']['model']}, batch {row['batch']} | {name} | {rate['p50']:,.1f} | {speed} |")
    return "\n".join(lines)


def _offload_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Training with offloaded layers beside training with all on the device, which a CPU simulates."""
    found = ok_rows(rows, "offload")
    resident = {row["case"]["model"]: row["tokens_per_second"]["p50"] for row in found if not row["cap_bytes"]}
    lines = [
        "| offload | layers on the host | tokens/s | of all on the device | peak reserved |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        model, rate = row["case"]["model"], row["tokens_per_second"]["p50"]
        share = f"{rate / resident[model]:.0%}" if row["cap_bytes"] and model in resident else "-"
        layers = f"{row['offloaded_layers']} of {row['layers']}" if row["cap_bytes"] else "none"
        name = f"{model}, {row['micro_batch']:,} tokens" + (", simulated device" if not row["peak_reserved"] else "")
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
