"""Everything that the README shows is run: its Python as it stands, its commands on small data.

The README's commands run in order, in one folder, with three changes that make each take seconds: a hub id of a base
to train is a tiny model on the disk, the file of PC parts is a small one of the same form, and options of `FEWER` are
appended. A command that is not `fastprice` is in `ELSEWHERE` with the place where CI runs it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.docs.pages import commands, python_blocks
from tests.paths import ROOT
from tests.product_files import write_products

Run = Callable[..., tuple[int, str, str]]

HUB_IDS = ("unsloth/Llama-3.2-3B", "Qwen/Qwen2.5-0.5B")
PC_PARTS = "pc_parts_2025-07-23.jsonl.gz"
FEWER = {
    "train": "--base BASE --epochs 0.3 --max-tokens 64 --pack-tokens 512 --evaluations 1 --validation-items 8",
    "compare": "--items 3 --calibrate 0 --strategies zero-shot few-shot:2",
}
# What each command leaves, or prints; those of one name in the order of the README.
RESULTS = {
    "doctor": ["torch"],
    "inspect": ["Price is $"],
    "train": ["runs/first/report.html", "runs/llama/report.html", "runs/qwen/report.html", "runs/pc_parts/report.html"],
    "predict": ["prices.csv", "Used road bike"],
    "explain": ["why.png"],
    "evaluate": ["MAE"],
    "plan": ["Llama-3.2-3B (3.21 B) in 24 GiB", "| Llama-3.1-70B |"],
    "compare": ["zero-shot"],
}
# Commands that do not run here: the file that has CI run them (or the same), and its words for it.
ELSEWHERE = {
    "git clone REPOSITORY fastprice": (".github/workflows/ci.yml", "actions/checkout"),
    "pip install torch": ("Makefile", "install --quiet --constraint $< torch"),
    "pip install .": ("Makefile", "--editable $(if $(GPU),'.[gpu]',.)"),
    "pip install ./kernels": ("tests/kernels/test_standalone.py", 'run(*pip, "install"'),
    "make demo": ("tests/integration/test_train.py", 'fastprice("demo"'),
    "make test": (".ci/run", "make test"),
    "make docs": (".ci/run", "make docs"),
    "make gpu": ("tests/integration/test_benchmarking.py", "fastprice.benchmarking"),  # its CPU side
    "pytest benchmarks -k packed_against_padded": (".ci/run", "pytest -q benchmarks"),
    "pytest benchmarks -k training_run": (".ci/run", "pytest -q benchmarks"),
    "pytest benchmarks -k completion_loss": (".ci/run", "pytest -q benchmarks"),
    "python -m fastprice_kernels.codegen --check": (".ci/run", "fastprice bench static --check"),  # the same and more
}


def test_the_python_blocks_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_products(seed=21)
    names: dict[str, object] = {}
    for block in python_blocks("README.md"):
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "my-estimator" / "fastprice.json").is_file()
    assert {"estimator", "dequantize_nf4", "install", "uninstall"} <= set(names)


def test_every_other_command_is_run_by_ci() -> None:
    shown = {" ".join(words) for words in commands("README.md") if words[0] != "fastprice" and len(words) > 1}
    shown -= {"cd fastprice"}
    assert shown == set(ELSEWHERE)
    for command, (file, words) in ELSEWHERE.items():
        assert words in (ROOT / file).read_text(encoding="utf-8"), f"{command} is no longer run by {file}"


@pytest.mark.slow
def test_every_fastprice_command_runs_on_small_data(
    fastprice: Run, tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write_files()
    # A word alone, such as `fastprice compare`, is a name; with options it is a command.
    shown = [words[1:] for words in commands("README.md") if words[0] == "fastprice"]
    shown = [words for words in shown if len(words) > 1 or words == ["doctor"]]
    done: dict[str, int] = {}
    for words in shown:
        name = words[0]
        # Planning needs the shape of a model and no weights, so it runs with the README's own base.
        base = {} if name == "plan" else dict.fromkeys(HUB_IDS, tiny_base)
        arguments = [base.get(word, word) for word in words] + FEWER.get(name, "").split()
        status, printed, error = fastprice(*[tiny_base if word == "BASE" else word for word in arguments])
        assert status == 0 or name == "doctor", f"fastprice {' '.join(words)}\n{printed}\n{error}"
        done[name] = done.get(name, 0) + 1
        assert done[name] <= len(RESULTS.get(name, [])), f"fastprice {' '.join(words)}: give it a line in RESULTS"
        result = RESULTS[name][done[name] - 1]
        assert (tmp_path / result).is_file() or result in printed, f"fastprice {' '.join(words)}\n{printed}"
    assert done == {name: len(results) for name, results in RESULTS.items()}


def _write_files() -> None:
    """products.csv, new.csv, other.csv, and a file like that of the PC parts: one product a line, any attributes."""
    write_products(seed=22)
    Path("products.csv").rename("kept.csv")
    for name in ("new.csv", "other.csv"):
        write_products(seed=23, count=12)
        Path("products.csv").rename(name)
    Path("kept.csv").rename("products.csv")
    from fastprice.data.synthetic import make_synthetic_items

    with gzip.open(PC_PARTS, "wt", encoding="utf-8") as file:
        for item in make_synthetic_items(120, seed=24):
            row = {"name": item.text.splitlines()[0], "price": item.price, "category": item.group, "cores": 8}
            file.write(json.dumps(row) + "\n")
