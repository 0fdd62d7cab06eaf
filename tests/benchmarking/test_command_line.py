"""The front end: which plan its options make, and that it says where it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.benchmarking.result_rows import result, step_row

from fastprice.benchmarking import command_line, environment, main, suite
from fastprice.benchmarking.suite_plan import SuitePlan
from fastprice.benchmarking.workload import GIB
from fastprice.errors import ConfigError

Made = dict[str, Any]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Made]:
    """Runs the front end on a suite that measures nothing; gives the arguments that the suite got."""
    import json

    def run(*arguments: str, gpu: bool = True) -> Made:
        got: Made = {}

        def run_suite(out: Path, **options: Any) -> Path:
            got.update(options, out=out)
            path = tmp_path / "result.json"
            path.write_text(json.dumps(result(step_row("peft", 20.0), step_row("trl-packed", 10.0))))
            return path

        monkeypatch.setattr(suite, "run_suite", run_suite)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(environment, "gpu_memory_bytes", lambda: 24 * GIB)
        assert main([*arguments, "--out", str(tmp_path)]) == 0
        return got

    return run


def test_a_gpu_gets_the_whole_suite_in_nine_minutes(made: Callable[..., Made]) -> None:
    got = made()
    assert got["minutes"] == 9.0
    assert got["stages"] is None
    plan: SuitePlan = got["plan"]
    assert (plan.models, plan.tokens, plan.rank) == (("llama-3.1-8b", "llama-3.2-1b"), 4096, 16)
    assert plan.variants == ((2048, 16), (8192, 16), (4096, 32))
    assert plan.gpu


def test_options_change_the_plan(made: Callable[..., Made]) -> None:
    got = made(
        *("--models", "qwen2.5-7b", "--tokens", "2048,1024", "--rank", "8,64", "--peers", "peft,unsloth"),
        *("--batch", "2", "--rounds", "3", "--minutes", "4.5", "--stages", "steps,memory", "--commit", "abc"),
    )
    plan: SuitePlan = got["plan"]
    assert (plan.models, plan.peers) == (["qwen2.5-7b"], ["peft", "unsloth"])
    assert (plan.tokens, plan.rank, plan.batch, plan.rounds) == (2048, 8, 2, 3)
    assert plan.variants == [(1024, 8), (2048, 64)]
    assert (got["minutes"], got["stages"], got["commit"]) == (4.5, ["steps", "memory"], "abc")


def test_runs_of_pytest_are_split_as_a_shell_would(made: Callable[..., Made]) -> None:
    got = made("--tests", "tests/gpu -m 'not slow'", "--tests", "tests/kernels")
    assert got["tests"] == [["tests/gpu", "-m", "not slow"], ["tests/kernels"]]


def test_quick_takes_two_stages_and_ends_with_the_line_to_paste(
    made: Callable[..., Made], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    got = made("--quick", gpu=False)
    assert got["stages"] == ("headline", "kernels")
    assert got["minutes"] == 2.8
    assert got["plan"].models == ("nano",)
    assert not got["plan"].gpu
    line, where = capsys.readouterr().out.strip().splitlines()
    assert line.startswith("fastprice bench | Some GPU | llama-3.2-1b peft 20 tok/s | 2.00x trl-packed")
    assert where == f"results: {tmp_path / 'result.json'}"


def test_a_run_ends_with_the_table_and_the_path(
    made: Callable[..., Made], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made()
    out = capsys.readouterr().out
    assert "| llama-3.2-1b, 4096, 16 | trl-packed | sdpa | 10 " in out
    assert out.endswith(f"results: {tmp_path / 'result.json'}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "llama-3.2-1b,llama-3.1-8"], "did you mean 'llama-3.1-8b'"),
        (["--peers", "peff"], "did you mean 'peft'"),
        (["--tokens", "many"], "not a list of whole numbers"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        main([*arguments, "--out", str(tmp_path)])


def test_every_unknown_name_of_a_plan_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model: 'x' .*; peer: 'y' .*; kernel family: 'z' "):
        SuitePlan(models=("x",), peers=("y",), kernel_families=("z",))


def test_fastprice_bench_hands_its_arguments_on(
    fastprice: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = fastprice("bench", "--help")
    assert status == 0
    assert all(name in out for name in ("usage: fastprice bench", *suite.STAGES, "trl-packed", "--tests", "static"))
    status, _, error = fastprice("bench", "--rounds", "x")
    assert status == 2
    assert error.startswith("error: fastprice bench: argument --rounds: invalid int value: 'x'")
    monkeypatch.setattr(command_line, "_run", lambda options: 3)
    assert fastprice("bench", "--quick")[0] == 3
