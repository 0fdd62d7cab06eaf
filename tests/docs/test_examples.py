"""Every example runs as it stands: the scripts as processes of their own, the notebook in a kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tests.paths import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "first_estimator.ipynb"
# What each prints when it went through.
SAYS = {
    "kernels_with_peft.py": "the model is the stock one again",
    "memory_plan.py": "Llama-3.1-8B (8.03 B) in 24 GiB",
    "offload_large_base.py": "equal, bit for bit",
    "own_csv.py": "saved, loaded, and the same estimates",
    "scikit_learn.py": "TF-IDF + ridge",
}
PYTHONPATH = os.pathsep.join([str(ROOT / "src"), str(ROOT / "kernels")])


def test_every_example_is_run_and_listed() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == set(SAYS)
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"[{name}]({name})" in listed for name in (*scripts, *(path.name for path in EXAMPLES.glob("*.ipynb"))))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SAYS))
def test_the_script_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert SAYS[name] in done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves files behind"


def test_a_memory_plan_is_plotted(tmp_path: Path) -> None:
    plot = tmp_path / "memory.svg"
    arguments = [str(EXAMPLES / "memory_plan.py"), "--base", "Qwen3-0.6B", "--gpu", "8GiB", "--plot", str(plot)]
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": PYTHONPATH}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "<svg" in plot.read_text(encoding="utf-8")


def test_the_notebook_is_stored_without_outputs_and_installs_in_one_tagged_cell() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    installing = [cell for cell in code if "install" in cell.metadata.get("tags", [])]
    assert installing == [cell for cell in code if "pip" in cell.source]
    assert len(installing) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the packages under nbclient
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "my-estimator" / "fastprice.json").is_file()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "80 % interval" in printed
    assert "Scores(mae=" in printed
