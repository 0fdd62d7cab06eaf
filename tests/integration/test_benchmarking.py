"""The benchmarks' workers on a CPU, in this process: the code that a GPU runs, on a model of two small layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastprice.benchmarking.kernel_comparison import Comparison, KernelCase, run_comparison
from fastprice.benchmarking.offloaded_training import offload_cap, train_offloaded
from fastprice.benchmarking.prediction import PREDICTION_WAYS
from fastprice.benchmarking.random_models import model_config, random_nf4_model, save_model, seed_adapters
from fastprice.benchmarking.reporting.page import write_report
from fastprice.benchmarking.reporting.results import find_results, load_result
from fastprice.benchmarking.reporting.summaries import agreement, summarize_steps
from fastprice.benchmarking.reporting.tables import markdown, paste_line
from fastprice.benchmarking.suite import run_suite
from fastprice.benchmarking.suite_plan import SuitePlan
from fastprice.benchmarking.worker_process import ROW_MARK, main
from fastprice.models.peft_engine import settle_four_bit

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU; on a GPU: make gpu"),
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
        return [json.loads(line.removeprefix(ROW_MARK)) for line in lines if line.startswith(ROW_MARK)]

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
        assert len(row["step_samples"]) == 2
        first, *_, last = row["trajectory"]
        assert first == pytest.approx(row["check_loss"], rel=1e-5)
        assert last < first
        # The same updates on the same texts, whoever trains: the loss follows one trajectory.
        assert row["trajectory"] == pytest.approx(rows["trl-packed"]["trajectory"], rel=2e-3)
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
    attention = {peer: row["settings"]["attention"] for peer, row in rows.items()}
    assert attention == {"trl-packed": "sdpa", "trl-padded": "sdpa", "peft-off": "texts", "peft": "texts"}
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


def test_a_wrong_function_gets_no_time_and_no_ratio() -> None:
    right, wrong = torch.ones(8), torch.full((8,), 1.1)

    def comparison(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, Any]:
        functions = {"fastprice": lambda: ours, "peer": lambda: theirs, "broken": lambda: 1 / 0}
        made = Comparison(functions, lambda: right, 1e-3, 1.0, 1.0)  # type: ignore[arg-type]
        return run_comparison(KernelCase("x", "y", tuple(functions), lambda: made), "cpu", LIMITS, 0.01)

    red = comparison(wrong, right)
    assert red["status"] == "wrong"
    assert not {"seconds", "ratios", "share_of_limit"} & set(red)
    green = comparison(right, wrong)
    assert green["ratios"] == {}
    assert "wrong: error 1.00e-01" in green["absent"]["peer"]
    assert "ZeroDivisionError" in green["absent"]["broken"]
    assert comparison(torch.full((8,), torch.nan), right)["status"] == "wrong"


def test_prediction_is_compared_with_generate(folder: str, work: Work) -> None:
    (row,) = work({"kind": "predict", "folder": folder, "items": 4, "batch": 2, "seconds": 0.1})
    assert row["status"] == "ok", row.get("reason")
    assert row["error"] < 1e-3
    assert row["scorer"] == "MergedScorer"
    assert set(row["items_per_second"]) == set(PREDICTION_WAYS)
    assert row["ratios"]["generate + regex"]["count"] >= 3


def test_the_memory_estimate_stands_beside_what_was_measured(work: Work) -> None:
    measured = {"model": "llama-3.2-1b", "tokens": 4096, "texts": 29, "rank": 16, "labeled": 0.023, "recompute": None}
    sizes = {"peak_reserved": 5 * 2**30, "peak_allocated": 4 * 2**30}
    unmeasured = {"peak_reserved": None, "peak_allocated": None}
    rows = work(
        {
            "kind": "estimate",
            "steps": [
                {**measured, **sizes, "peer": "trl-packed"},
                {**measured, **sizes, "peer": "unsloth-tuned"},
                {**measured, **unmeasured, "peer": "peft"},
                {**measured, **unmeasured, "peer": "peft", "recompute": "4 full, 12 none"},
            ],
        }
    )
    assert [row["peer"] for row in rows] == ["trl-packed", "peft", "peft"]
    assert rows[2]["estimated_reserved"] > rows[1]["estimated_reserved"], "layers that recompute nothing hold more"
    assert rows[0]["error"] == rows[0]["estimated_reserved"] / (5 * 2**30) - 1
    assert "error" not in rows[1]
    assert 2**30 < rows[1]["estimated_reserved"] < 20 * 2**30


def test_training_through_the_estimator_is_measured(folder: str) -> None:
    row = train_offloaded(folder, cap_bytes=0, tokens=600, steps=2, max_tokens=200)
    assert row["steps"] == 2
    assert row["tokens_per_second"]["p50"] > 0
    assert row["offloaded_layers"] == 0


def test_offloaded_training_is_measured_beside_training_on_the_device(tmp_path: Path) -> None:
    folder = str(save_model(random_nf4_model(model_config("nano"), "cpu", torch.float32), tmp_path / "model"))
    cap = offload_cap("nano", tokens=512, rank=16, kernels=False)
    capped = train_offloaded(folder, cap_bytes=cap, tokens=512, steps=2, max_tokens=200)
    assert 1 <= capped["offloaded_layers"] <= capped["layers"] == 6
    assert capped["transfers"] == "SimulatedTransfers"
    assert capped["micro_batch"] * capped["gradient_accumulation"] == 512
    case = {"kind": "offload", "model": "nano"}
    rows = [{"stage": "offload", "status": "ok", "case": case, **capped, "cap_bytes": size} for size in (0, cap)]
    about = {"kind": "cpu", "device": "c", "time": "", "commit": ""}
    text = markdown({"environment": about, "limits": {}, "rows": rows})
    assert f"| nano, 512 tokens, simulated device | {capped['offloaded_layers']} of 6 |" in text
    assert "| 100% | - |" in text


def test_an_impossible_case_is_one_row(work: Work) -> None:
    (row,) = work({**step("no-such-peer", "nowhere")})
    assert row["status"] == "failed"
    assert row["reason"].startswith("ConfigError: peer: 'no-such-peer' is not one of")


def test_a_run_leaves_a_whole_result_that_says_cpu(tmp_path: Path) -> None:
    path = run_suite(tmp_path, minutes=3.0, plan=SuitePlan.for_cpu(), stages=("memory",), quiet=True)
    result = load_result(path)
    assert path.name.startswith("cpu-")
    assert result["environment"]["kind"] == "cpu"
    assert result["limits"]["copy_bytes_per_second"] > 0
    assert [row["status"] for row in result["rows"] if row["stage"] == "memory"] == ["skipped"]
    assert "CPU, no GPU figure" in paste_line(result)
    text, page = write_report(tmp_path)
    assert "no GPU figure" in text
    assert page == tmp_path / "report.html"
    assert page.is_file()


# As sitecustomize.py it serves the front end and its workers.
HIDING = """
import importlib.machinery

hidden = {"typer", "rich", "polars", "lightgbm", "bm25s", "datasketch", "pint"}
find = importlib.machinery.PathFinder.find_spec.__func__


def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else find(cls, name, path, target)


importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""


@pytest.fixture
def bare(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python with these arguments where only what training needs is installed."""
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)

    return run


def test_the_front_end_runs_where_only_what_training_needs_is_installed(bare: Any, tmp_path: Path) -> None:
    assert "No module named 'typer'" in bare("-c", "import typer").stderr
    done = bare("-m", "fastprice.benchmarking", "--cpu", "--stages", "memory", "--minutes", "2")
    assert done.returncode == 0, done.stderr
    (path,) = find_results(tmp_path / "benchmarks" / "results")
    assert load_result(path)["limits"]["matmul_flops"] > 0
    assert done.stdout.endswith(f"results: {path.relative_to(tmp_path)}\n")
    wrong = bare("-m", "fastprice.benchmarking", "--stages", "memery")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: stage: 'memery' is not one of headline")
    assert wrong.stderr.count("\n") == 1


def test_offloaded_training_is_measured_where_only_what_training_needs_is_installed(bare: Any, tmp_path: Path) -> None:
    folder = str(save_model(random_nf4_model(model_config("nano"), "cpu", torch.float32), tmp_path / "model"))
    cap = offload_cap("nano", tokens=512, rank=16, kernels=False)
    case = {"kind": "offload", "model": "nano", "folder": folder, "tokens": 512, "rank": 16, "cap_bytes": cap}
    done = bare("-m", "fastprice.benchmarking.worker_process", json.dumps(case))
    line = next(line for line in done.stdout.splitlines() if line.startswith(ROW_MARK))
    row = json.loads(line.removeprefix(ROW_MARK))
    assert row["status"] == "ok", row
    assert row["offloaded_layers"] >= 1
