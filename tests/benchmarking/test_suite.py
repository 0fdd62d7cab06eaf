"""The order of the stages, what a failing peer costs, and the search for the largest that fits, with fake workers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprice.benchmarking import suite
from fastprice.benchmarking.process_runner import ProcessRunner
from fastprice.benchmarking.suite import largest_multiple, run_suite
from fastprice.benchmarking.suite_plan import SuitePlan
from fastprice.benchmarking.workload import GIB
from fastprice.errors import ConfigError

Answer = Callable[[Mapping[str, Any]], dict[str, Any]]


class FakeRunner(ProcessRunner):
    """A runner whose workers answer at once."""

    answer: Answer

    def measure(self, stage: str, case: Mapping[str, Any], *, timeout: float) -> list[dict[str, Any]]:
        if case["kind"] == "environment":
            about = {"kind": "gpu", "device": "Card", "time": "2026-11-21T00:00:00", "commit": "abc"}
            return [
                self.add(stage, case, {"status": "ok", "environment": about, "warnings": []}),
                self.add(
                    stage, case, {"status": "ok", "limits": {"copy_bytes_per_second": 1e12, "matmul_flops": 1e14}}
                ),
            ]
        return [self.add(stage, case, self.answer(case))]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    def go(answer: Answer, stages: tuple[str, ...], **plan: Any) -> list[dict[str, Any]]:
        monkeypatch.setattr(FakeRunner, "answer", staticmethod(answer), raising=False)
        monkeypatch.setattr(suite, "ProcessRunner", FakeRunner)
        made = SuitePlan(**{"models": ("llama-3.2-1b", "llama-3.1-8b"), "peers": ("peft", "unsloth"), **plan})
        path = run_suite(tmp_path, minutes=5.0, plan=made, stages=stages, quiet=True)
        return list(json.loads(path.read_text())["rows"])

    return go


def step(case: Mapping[str, Any]) -> dict[str, Any]:
    if case["kind"] != "step":
        return {"status": "ok"}
    return {
        "status": "ok", "peer": case["peer"], "tokens_per_step": 4000, "texts_per_step": 30.0,
        "labeled_share": 0.02, "recompute": None, "peak_reserved": GIB,
        "peak_allocated": GIB,
    }  # fmt: skip


def test_peers_take_turns_round_after_round(run: Callable[..., Any]) -> None:
    rows = [row["case"] for row in run(step, ("steps",)) if row["case"]["kind"] == "step"]
    turns = [(case["model"], case["peer"]) for case in rows]
    one_round = [(model, peer) for model in ("llama-3.2-1b", "llama-3.1-8b") for peer in ("peft", "unsloth")]
    assert turns == one_round * 2
    assert len({case["folder"] for case in rows if case["model"] == "llama-3.2-1b"}) == 1


def test_the_headline_comes_first_and_is_measured_once(run: Callable[..., Any]) -> None:
    peers = ("peft", "unsloth", "trl-packed")
    models = ("llama-3.1-8b", "llama-3.2-1b")
    rows = run(step, ("headline", "kernels", "steps"), peers=peers, models=models)
    stages = [row["stage"] for row in rows if row["stage"] not in ("machine", "folder")]
    assert stages[:4] == ["headline"] * 4
    assert stages[4] == "kernels"
    first = [(row["case"]["model"], row["case"]["peer"]) for row in rows if row["stage"] == "headline"]
    assert first == [("llama-3.1-8b", "peft"), ("llama-3.1-8b", "trl-packed")] * 2
    later = [(row["case"]["model"], row["case"]["peer"]) for row in rows if row["stage"] == "steps"]
    assert later == [("llama-3.1-8b", "unsloth"), *(("llama-3.2-1b", peer) for peer in peers)] * 2


def test_a_peer_that_this_machine_lacks_is_skipped_without_a_process(run: Callable[..., Any]) -> None:
    rows = run(step, ("steps",), peers=("peft", "unsloth-tuned"), gpu=False)
    skipped = [row for row in rows if row["status"] == "skipped"]
    assert [row["case"]["peer"] for row in skipped] == ["unsloth-tuned"] * 2
    assert {row["reason"] for row in skipped} == {"Unsloth trains on CUDA devices alone"}
    assert all("folder" not in row["case"] for row in skipped)


def test_whole_runs_take_turns_and_name_who_cannot(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[Any] = []

    def take_turns(self: Any, stage: str, cases: Any, rounds: int, *, timeout: float) -> list[dict[str, Any]]:
        turns.extend((stage, rounds, case["peer"], case["tokens"]) for case in cases)
        return []

    monkeypatch.setattr(FakeRunner, "measure_in_turns", take_turns)
    plan = {"peers": ("peft", "trl-packed", "unsloth-tuned", "trl-padded"), "gpu": False, "run_tokens": 512}
    rows = run(step, ("runs",), **plan)
    assert turns == [("runs", 2, peer, 512) for peer in ("peft", "trl-packed", "trl-padded")]
    assert [row["case"]["peer"] for row in rows if row["stage"] == "runs"] == ["unsloth-tuned"]


def test_variants_come_when_all_rounds_of_the_first_are_done(run: Callable[..., Any]) -> None:
    plan = {"models": ("llama-3.2-1b",), "peers": ("peft",), "variants": [(2048, 16), (4096, 32)]}
    rows = [row["case"] for row in run(step, ("steps",), **plan) if row["case"]["kind"] == "step"]
    works = [(case["tokens"], case["rank"]) for case in rows]
    assert works == [(4096, 16)] * 2 + [(2048, 16)] * 2 + [(4096, 32)] * 2


def test_a_peer_that_fails_is_not_tried_again_and_stops_no_other(run: Callable[..., Any]) -> None:
    def answer(case: Mapping[str, Any]) -> dict[str, Any]:
        failing = case.get("peer") == "unsloth" and case.get("model") == "llama-3.2-1b"
        return {"status": "failed", "reason": "x"} if failing else step(case)

    cases = [row["case"] for row in run(answer, ("steps",)) if row["case"]["kind"] == "step"]
    tried = [(case["model"], case["peer"]) for case in cases]
    assert tried.count(("llama-3.2-1b", "unsloth")) == 1
    assert tried.count(("llama-3.1-8b", "unsloth")) == 2


def test_a_model_that_cannot_be_made_is_skipped_once(run: Callable[..., Any]) -> None:
    def answer(case: Mapping[str, Any]) -> dict[str, Any]:
        if case["kind"] == "folder" and case["model"] == "llama-3.2-1b":
            return {"status": "failed", "reason": "disk full"}
        return step(case)

    rows = run(answer, ("steps", "predict"))
    folders = [row["case"]["model"] for row in rows if row["case"]["kind"] == "folder"]
    assert folders.count("llama-3.2-1b") == 1
    assert {row["case"]["model"] for row in rows if row["case"]["kind"] == "step"} == {"llama-3.1-8b"}


def test_the_estimate_is_given_what_the_steps_measured(run: Callable[..., Any]) -> None:
    rows = run(step, ("steps", "memory"))
    given = next(row["case"]["steps"] for row in rows if row["case"]["kind"] == "estimate")
    assert {(each["model"], each["peer"]) for each in given} == {
        (model, peer) for model in ("llama-3.2-1b", "llama-3.1-8b") for peer in ("peft", "unsloth")
    }
    assert given[0]["texts"] == pytest.approx(30.0)
    assert given[0]["peak_reserved"] == GIB


def test_the_largest_batch_and_model_are_searched_under_each_cap(run: Callable[..., Any]) -> None:
    def answer(case: Mapping[str, Any]) -> dict[str, Any]:
        if case["kind"] == "step":
            weights = {"qwen2.5-0.5b": 1, "llama-3.2-1b": 2, "llama-3.2-3b": 4}.get(case["model"], 100)
            if weights * GIB + case["tokens"] * 400_000 > case["cap_bytes"]:
                return {"status": "failed", "reason": "OutOfMemoryError", "oom": True}
        return step(case)

    rows = run(answer, ("fit",), memory_caps=(8,))
    found = [row for row in rows if row["case"]["kind"] == "fit"]
    assert {row["largest_tokens"] for row in found if "largest_tokens" in row} == {15 * 1024}  # 6 GiB / 400 kB
    assert [row["largest_model"] for row in found if "largest_model" in row] == ["llama-3.2-3b"]


def test_unknown_stages_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'kernels'"):
        run_suite(tmp_path, minutes=1, plan=SuitePlan.for_cpu(), stages=["kernel"])


@given(st.integers(1, 100), st.integers(0, 30_000), st.integers(1, 300))
def test_the_largest_multiple_that_fits_is_found(unit: int, limit: int, steps: int) -> None:
    attempts = []

    def fits(size: int) -> bool:
        attempts.append(size)
        return size <= limit

    most = unit * steps
    assert largest_multiple(fits, unit, most) == min(limit, most) // unit * unit
    assert len(attempts) <= 2 * math.log2(steps) + 2


def test_runs_of_pytest_come_before_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: FakeRunner, stage: str, command: list[str], *, timeout: float) -> tuple[int, str]:
        assert timeout == 50.0, "together a third of the time"
        return 0, f"{command[3]}::test_x PASSED"

    monkeypatch.setattr(FakeRunner, "answer", staticmethod(step), raising=False)
    monkeypatch.setattr(FakeRunner, "call", call)
    monkeypatch.setattr(suite, "ProcessRunner", FakeRunner)
    plan = SuitePlan(models=("llama-3.2-1b",), peers=("peft",))
    tests = [["tests/gpu", "-q"], ["tests/kernels"]]
    path = run_suite(tmp_path, minutes=5.0, plan=plan, stages=("steps",), tests=tests, quiet=True)
    rows = [row for row in json.loads(path.read_text())["rows"] if row["stage"] != "machine"]
    assert [row["case"]["arguments"] for row in rows[:2]] == tests
    assert rows[0]["counts"] == {"passed": 1}
    assert rows[2]["stage"] == "folder"
