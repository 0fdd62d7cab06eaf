"""Tables of training: steps of all peers and their phases, whole runs; each peer with its attention backend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastprice.benchmarking.reporting.results import Result
from fastprice.benchmarking.reporting.summaries import PHASES, summarize_runs, summarize_steps
from fastprice.benchmarking.workload import GIB

__all__ = ["phase_table", "run_table", "step_table"]


def step_table(result: Result) -> str:
    entries = summarize_steps(result["rows"], result["limits"])
    if not entries:
        return ""
    gpu = result["environment"]["kind"] == "gpu"
    lines = [
        "| model, tokens, rank | peer | attention | tokens/s | items/s | peak reserved | FLOP utilization | "
        "losses of equal updates, off by | fastprice is |",
        "|---|---|---|---|---|---|---|---|---|",
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
        off = "-" if entry["trajectory_error"] is None else f"{entry['trajectory_error']:.1e}"
        who = f"{entry['model']}, {entry['tokens']}, {entry['rank']} | {entry['peer']} | {_attention(entry)}"
        lines.append(f"| {who} | {rate} | {entry['items_per_second']:,.1f} | {memory} | {used} | {off} | {ratio} |")
    return "\n".join(lines) + _attention_note(entries)


def phase_table(result: Result) -> str:
    """The phases of a step as shares of its time, and what loading the model took."""
    entries = summarize_steps(result["rows"], result["limits"])
    if not entries:
        return ""
    lines = [
        "| model, tokens, rank | peer | forward | backward | optimizer, data | loading | host peak after |",
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


def run_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Whole training runs, the slowest first; empty where there was none."""
    entries = summarize_runs(rows)
    if not entries:
        return ""
    lines = [
        "| whole run: model, texts | peer | attention | steps | items/s | tokens/s | peak reserved | "
        "unseen loss before, after | fastprice is |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        memory = f"{entry['peak_reserved'] / GIB:.2f} GiB" if entry["peak_reserved"] else "-"
        ratio = f"{entry['ratio']:.2f}x as fast" if entry["ratio"] else "-" if entry["ok"] else "loss off"
        lines.append(
            f"| {entry['model']}, {entry['items']:,} | {entry['peer']} | {_attention(entry)} | {entry['steps']} | "
            f"{entry['items_per_second']:,.1f} | {entry['tokens_per_second']:,.0f} | {memory} | "
            f"{entry['loss_before']:.3f}, {entry['loss_after']:.3f} | {ratio} |"
        )
    return "\n".join(lines) + _attention_note(entries)


def _attention(entry: Mapping[str, Any]) -> str:
    return f"{entry['attention']}{'' if entry['best_attention'] else ' *'}"


def _attention_note(entries: Sequence[Mapping[str, Any]]) -> str:
    """What the star beside a backend means, where there is one."""
    if all(entry["best_attention"] for entry in entries):
        return ""
    return (
        "\n\n* This peer has a faster attention that this machine lacks (flash-attn, or PyTorch 2.12 for Unsloth): its "
        "ratio flatters fastprice."
    )
