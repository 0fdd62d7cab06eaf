"""The kernels as their own distribution, in an environment that holds torch, triton and what these two require."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from tests.paths import ROOT

PROGRAM = """
import importlib.util
from types import SimpleNamespace

absent = ["fastprice", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "numpy"]
assert not [name for name in absent if importlib.util.find_spec(name)], "this environment is not empty"

import torch
import fastprice_kernels as kernels

assert all(hasattr(kernels, name) for name in kernels.__all__)

code = torch.linspace(-1, 1, 16)
absmax = torch.tensor([2.0, 3.0])
plain = dict(absmax=absmax, code=code, state2=None, offset=None)
state = SimpleNamespace(quant_type="nf4", blocksize=64, dtype=torch.float32, shape=(4, 32), **plain)
packed = torch.arange(64, dtype=torch.uint8)
w = kernels.dequantize_nf4(packed, state)
q = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
assert torch.equal(w, (code[q] * absmax.repeat_interleave(64)).view(4, 32))

x = torch.randn(3, 32, requires_grad=True)
a, b = torch.randn(2, 32, requires_grad=True), torch.randn(4, 2, requires_grad=True)
y = kernels.lora_linear(x, packed, a, b, 0.5, quant_state=state)
torch.testing.assert_close(y, x @ w.T + 0.5 * x @ a.T @ b.T)
loss = kernels.completion_cross_entropy(y[None], torch.randn(7, 4), torch.tensor([[-100, 5, 6]]))
loss.backward()
assert all(part.grad.abs().sum() > 0 for part in (x, a, b))

assert kernels.install(torch.nn.Sequential(torch.nn.Linear(2, 2))).replaced == {}
print("standalone:", kernels.__file__)
"""


def project(folder: Path) -> dict[str, Any]:
    with (folder / "pyproject.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)["project"]
    return table


def required_by(*names: str) -> dict[str, Distribution]:
    """The installed distributions `names` and all that they require, without extras."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = distribution(name)
            wanted = map(Requirement, found[name].requires or ())
            waiting += [w.name for w in wanted if w.marker is None or w.marker.evaluate({"extra": ""})]
    return found


def link_into(site: Path, package: Distribution) -> None:
    """Links the top-level files and folders of an installed distribution, its metadata with them."""
    for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(package.locate_file(top))


def build_wheel(source: Path, folder: Path) -> Path:
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_kernels_install_and_run_alone(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = tmp_path / "env" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    for package in required_by("torch", "triton").values():
        link_into(site, package)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    wheel = build_wheel(ROOT / "kernels", tmp_path)
    assert wheel.name.startswith("fastprice_kernels-")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--python", python]
    run(*pip, "install", "--no-index", "--no-deps", wheel)
    run(*pip, "check")
    assert f"standalone: {site}" in run(python, "-W", "ignore", "-c", PROGRAM)


def test_the_distribution_fastprice_contains_the_kernels(tmp_path: Path) -> None:
    names = zipfile.ZipFile(build_wheel(ROOT, tmp_path)).namelist()
    ours = {path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels").rglob("*.py")}
    assert ours <= set(names)
    assert {"fastprice/__init__.py", "fastprice_kernels/py.typed"} <= set(names)


def test_requirements_of_the_two_distributions_agree() -> None:
    """Those of the kernels are among those of fastprice, so that either distribution can replace the other."""
    alone, whole = project(ROOT / "kernels"), project(ROOT)
    assert {Requirement(line).name for line in alone["dependencies"]} == {"torch", "triton"}
    assert set(alone["dependencies"]) <= set(whole["dependencies"])
    for key in ("version", "license", "requires-python"):
        assert alone[key] == whole[key]
