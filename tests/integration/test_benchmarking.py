"""The benchmarks' own workers on a CPU, in this process: the code that a GPU runs, on a model of two small layers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastprice.benchmarking.analysis import agreement, summarize_steps
from fastprice.benchmarking.comparison import Comparison, run_comparison
from fastprice.benchmarking.models import model_config, random_nf4_model, save_model, seed_adapters
from fastprice.benchmarking.suite import Plan, run_suite
from fastprice.benchmarking.worker import MARK, main
from fastprice.models.peft_engine import settle_four_bit

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs the CPU's side; on a GPU: python -m benchmarks.gpu"),
    # A pre-quantized folder is loaded with the settings that a 16-bit one needs.
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
    # TRL on a CPU, in its own trainer and in pin_memory of torch's loader.
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LIMITS = {"copy_bytes_per_second": 1e9, "matmul_flops": 1e10}
Work = Callable[[dict[str, Any]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = random_nf4_model(model_config("nano", layers=2), "cpu", torch.float32)
    return str(save_model(model, tmp_path_factory.mktemp("bench") / "model"))


@pytest.fixture
def work(capsys: pytest.CaptureFixture[str]) -> Work:
    def run(case: dict[str, Any]) -> list[dict[str, Any]]:
        assert main([json.dumps(case)]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]

    return run


def step(peer: str, folder: str) -> dict[str, Any]:
    return {
        "kind": "step", "peer": peer, "model": "nano", "folder": folder,
        "tokens": 600, "batch": 2, "rank": 4, "steps": 2, "seconds": 1.0,
    }  # fmt: skip


def test_a_saved_model_is_loaded_bit_for_bit(folder: str) -> None:
    from transformers import AutoModelForCausalLM

    made = random_nf4_model(model_config("nano", layers=2), "cpu", torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settle_four_bit(loaded, torch.float32)
    ids = torch.randint(16, 2048, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth, logits = made(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert torch.equal(truth, logits)
    assert 0.05 < float(truth.std()) < 5, "activations keep their size"
    assert loaded.is_loaded_in_4bit


def test_peers_agree_and_are_counted_alike(folder: str, work: Work) -> None:
    rows = {peer: work(step(peer, folder))[-1] for peer in ("trl-packed", "trl-padded", "peft-off", "peft")}
    for peer, row in rows.items():
        assert row["status"] == "ok", f"{peer}: {row.get('reason')}"
        assert row["adapters"] == 2 * 7 * 2
        assert row["steps"] == 2
        assert set(row["phase_seconds"]) == {"forward", "backward", "between"}
        phases = sum(phase["p50"] for phase in row["phase_seconds"].values())
        assert phases == pytest.approx(row["step_seconds"]["p50"], rel=0.2)
        assert row["load_seconds"] > 0
    for peer in ("trl-padded", "peft-off", "peft"):
        check = agreement(rows[peer], rows["trl-packed"])
        assert check["ok"], f"{peer}: {check}"
        assert check["gradient_norm_error"] < 5e-3
    # A pack holds up to 600 real tokens in three to five texts, a padded batch two texts of about 140 each.
    assert 400 < rows["peft-off"]["tokens_per_step"] <= 600
    assert 120 <= rows["trl-padded"]["tokens_per_step"] <= 512
    assert rows["trl-padded"]["settings"]["per_device_train_batch_size"] == "2"
    assert rows["trl-packed"]["settings"]["packing"] == "True"
    assert "lora" in rows["peft"]["settings"]["installed"]
    assert "installed" not in rows["peft-off"]["settings"]
    whole = [{"stage": "steps", "case": step(peer, folder), **row} for peer, row in rows.items()]
    entries = {entry["peer"]: entry for entry in summarize_steps(whole, {})}
    assert entries["trl-packed"]["ratio"]["of"] == "peft"


def test_a_wrong_gradient_is_seen(folder: str, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    right = work(step("peft-off", folder))[-1]
    original = torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x, inplace=False: 1.2 * original(x))
    wrong = work(step("peft-off", folder))[-1]
    assert wrong["status"] == "ok"
    assert not agreement(wrong, right)["ok"]


def test_unsloth_without_a_gpu_is_a_row_that_says_why(folder: str, work: Work) -> None:
    (row,) = work(step("unsloth-kernels", folder))
    assert row["status"] == "failed"
    assert "CUDA" in row["reason"]
    assert row["oom"] is False


def test_adapters_are_the_same_whatever_wraps_the_model() -> None:
    from peft import get_peft_model

    from fastprice.models.adapters import lora_config

    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = random_nf4_model(model_config("nano", layers=1), "cpu", torch.float32)
        wrapped = get_peft_model(model, lora_config(rank=4, alpha=8, dropout=0.0))
        seed_adapters(wrapped)
        made.append([parameter for name, parameter in wrapped.named_parameters() if "lora_" in name])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    assert all(float(parameter.detach().abs().sum()) > 0 for parameter in made[0])


def test_every_kernel_is_compared_with_its_peers(work: Work) -> None:
    families = ["dequantize", "lora_linear", "lora_mlp", "loss_head", "small_matmul"]
    case = {"kind": "kernels", "families": families, "model": "nano", "tokens": 24, "seconds": 0.02, "limits": LIMITS}
    rows = work({**case, "unsloth": False})
    assert {row["family"] for row in rows} == set(families)
    for row in rows:
        assert row["status"] == "ok", f"{row['family']} {row['name']}: {row.get('reason')}"
        assert row["ratios"], f"{row['family']} {row['name']} has no peer: {row['absent']}"
        assert row["floor_seconds"] > 0
    assert all(row["errors"]["fastprice"] == 0 for row in rows if row["family"] == "dequantize")


def test_who_is_wrong_gets_no_time_and_no_ratio() -> None:
    right, wrong = torch.ones(8), torch.full((8,), 1.1)

    def comparison(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, Any]:
        functions = {"fastprice": lambda: ours, "peer": lambda: theirs, "dead": lambda: 1 / 0}
        made = Comparison("x", "y", functions, lambda: right, 1e-3, 1.0, 1.0)  # type: ignore[arg-type]
        return run_comparison(made, "cpu", LIMITS, 0.01)

    red = comparison(wrong, right)
    assert red["status"] == "wrong"
    assert not {"seconds", "ratios", "share_of_limit"} & set(red)
    green = comparison(right, wrong)
    assert green["ratios"] == {}
    assert "wrong: error 1.00e-01" in green["absent"]["peer"]
    assert "ZeroDivisionError" in green["absent"]["dead"]
    assert comparison(torch.full((8,), torch.nan), right)["status"] == "wrong"


def test_prediction_is_compared_with_generate(folder: str, work: Work) -> None:
    (row,) = work({"kind": "predict", "folder": folder, "items": 4, "batch": 2, "seconds": 0.1})
    assert row["status"] == "ok", row.get("reason")
    assert row["error"] < 1e-3
    assert row["scorer"] == "MergedScorer"
    assert set(row["items_per_second"]) == {"fastprice", "generate + regex", "generate + regex, sorted"}
    assert row["ratios"]["generate + regex"]["count"] >= 3


def test_the_memory_estimate_stands_beside_what_was_measured(work: Work) -> None:
    measured = {"model": "llama-3.2-1b", "tokens": 4096, "texts": 29, "rank": 16, "labeled": 0.023, "keep": None}
    sizes = {"peak_reserved": 5 * 2**30, "peak_allocated": 4 * 2**30}
    rows = work(
        {
            "kind": "estimate",
            "steps": [
                {**measured, **sizes, "peer": "trl-packed"},
                {**measured, **sizes, "peer": "unsloth-tuned"},
                {**measured, "peer": "peft", "peak_reserved": None, "peak_allocated": None},
                {**measured, "peer": "peft", "keep": "4 full, 12 none", "peak_reserved": None, "peak_allocated": None},
            ],
        }
    )
    assert [row["peer"] for row in rows] == ["trl-packed", "peft", "peft"]
    assert rows[2]["estimated_reserved"] > rows[1]["estimated_reserved"], "what the layers kept counts"
    assert rows[0]["error"] == rows[0]["estimated_reserved"] / (5 * 2**30) - 1
    assert "error" not in rows[1]
    assert 2**30 < rows[1]["estimated_reserved"] < 20 * 2**30


def test_training_through_the_estimator_is_measured(folder: str) -> None:
    from fastprice.benchmarking.memory import streamed

    row = streamed(folder, cap_bytes=0, tokens=600, steps=2, max_tokens=200)
    assert row["steps"] == 2
    assert row["mean_tokens_per_second"] > 0
    assert row["streamed_layers"] == 0


def test_streaming_is_measured_beside_resident_training(tmp_path: Path) -> None:
    from fastprice.benchmarking.memory import streamed, streaming_cap
    from fastprice.benchmarking.report import markdown

    folder = str(save_model(random_nf4_model(model_config("nano"), "cpu", torch.float32), tmp_path / "model"))
    cap = streaming_cap("nano", tokens=512, rank=16, kernels=False)
    capped = streamed(folder, cap_bytes=cap, tokens=512, steps=2, max_tokens=200)
    assert 1 <= capped["streamed_layers"] <= capped["layers"] == 6
    assert capped["boundary"] == "SimulatedTransfers"
    assert capped["micro_batch"] * capped["accumulation"] == 512
    case = {"kind": "stream", "model": "nano"}
    rows = [{"stage": "stream", "status": "ok", "case": case, **capped, "cap_bytes": size} for size in (0, cap)]
    about = {"kind": "cpu", "device": "c", "time": "", "commit": ""}
    told = markdown({"environment": about, "limits": {}, "rows": rows})
    assert f"| nano, 512 tokens, pretend device | {capped['streamed_layers']} of 6 |" in told
    assert "| 100% | - |" in told


def test_a_case_that_cannot_be_is_one_row(work: Work) -> None:
    (row,) = work({**step("no-such-peer", "nowhere")})
    assert row["status"] == "failed"
    assert row["reason"].startswith("OSError") or "no-such-peer" in row["reason"]


def test_a_run_leaves_a_whole_result_that_says_cpu(tmp_path: Path) -> None:
    from fastprice.benchmarking import write_report
    from fastprice.benchmarking.report import load_result, paste_line

    path = run_suite(tmp_path, minutes=3.0, plan=Plan.for_cpu(), stages=("tests", "memory"), quiet=True)
    result = load_result(path)
    assert path.name.startswith("cpu-")
    assert result["environment"]["kind"] == "cpu"
    assert result["limits"]["copy_bytes_per_second"] > 0
    assert [row["status"] for row in result["rows"] if row["stage"] in ("tests", "memory")] == ["skipped", "skipped"]
    assert "CPU, no GPU figure" in paste_line(result)
    assert "no GPU figure" in write_report(tmp_path)
    assert (tmp_path / "report.html").is_file()


BARE = """
import importlib.machinery, json, sys

blocked = {"typer", "rich", "pydantic", "polars", "lightgbm", "bm25s"}
find = importlib.machinery.PathFinder.find_spec.__func__


def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in blocked else find(cls, name, path, target)


importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
sys.path[:0] = json.loads(sys.argv[2])
from fastprice.benchmarking.worker import main

raise SystemExit(main([sys.argv[1]]))
"""


def test_streaming_is_measured_where_only_the_listed_packages_are(tmp_path: Path) -> None:
    from fastprice.benchmarking.memory import streaming_cap

    folder = str(save_model(random_nf4_model(model_config("nano"), "cpu", torch.float32), tmp_path / "model"))
    cap = streaming_cap("nano", tokens=512, rank=16, kernels=False)
    case = {"kind": "stream", "model": "nano", "folder": folder, "tokens": 512, "rank": 16, "cap_bytes": cap}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BARE, json.dumps(case), json.dumps(sys.path)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith(MARK))
    row = json.loads(line.removeprefix(MARK))
    assert row["status"] == "ok", row
    assert row["streamed_layers"] >= 1
