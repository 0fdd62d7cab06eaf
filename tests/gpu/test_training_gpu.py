"""Training and prediction as a user runs them, on each engine and with each option that CUDA alone has.

Each in a process of its own, since Unsloth patches what it finds; minutes in all: `pytest tests/gpu -m slow`. Never run
yet where this was written: there was no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

needs_unsloth = pytest.mark.skipif(find_spec("unsloth") is None, reason="unsloth is not installed")
PROGRAM = """
import json, sys
from fastprice import PriceEstimator
from fastprice.data.synthetic import make_synthetic_items

options = json.loads(sys.argv[1])
estimator = PriceEstimator("nano", epochs=2.0, max_tokens=96, pack_tokens=1024, evaluations=2, **options)
estimator.fit(make_synthetic_items(400, seed=1), make_synthetic_items(60, seed=2))
texts = [item.text for item in make_synthetic_items(20, seed=3)]
bounds = estimator.predict_interval(texts, 0.8) if estimator.gives_distributions_ else []
print("FOUND " + json.dumps({
    "losses": [event.loss for event in estimator.training_.events if event.loss is not None],
    "prices": estimator.predict(texts).tolist(),
    "bounds": [list(each) for each in bounds],
    "distributions": estimator.gives_distributions_,
    "recompute": estimator.training_.recompute,
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@cache
def trained(folder: Path, options: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "UNSLOTH_COMPILE_LOCATION": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, options],
        capture_output=True, text=True, env=environment, cwd=folder, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"engine": "peft", "kernels": "off"},
        {"engine": "peft", "kernels": "on"},
        {"engine": "peft", "kernels": "on", "cuda_graphs": "on"},
        {"engine": "peft", "kernels": "on", "recompute": "2 offload, 2 selective"},
        {"engine": "peft", "kernels": "on", "output": "head"},
        *(
            pytest.param(options, marks=needs_unsloth)
            for options in (
                {"engine": "unsloth"},
                {"engine": "unsloth", "kernels": "off"},
                {"engine": "unsloth", "cuda_graphs": "on"},
                {"engine": "unsloth", "recompute": "full"},
                {"engine": "unsloth", "recompute": "offload"},
            )
        ),
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_it_learns_and_prices_what_it_has_not_seen(folder: Path, options: dict[str, Any]) -> None:
    found = trained(folder, json.dumps(options))
    losses = found["losses"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(0 < price < 1000 for price in found["prices"])
    assert found["distributions"]
    assert all(0 < low <= high for low, high in found["bounds"])


@needs_unsloth
@pytest.mark.parametrize("level", ["full", "offload"])
def test_levels_on_unsloths_layers_change_the_losses_by_no_more_than_rounding(folder: Path, level: str) -> None:
    """Its norms write over gradients, which no CPU runs; and levels survive its trainer and the evaluations."""
    stock, recomputed = (
        trained(folder, json.dumps({"engine": "unsloth", "recompute": name})) for name in ("none", level)
    )
    assert (stock["recompute"], recomputed["recompute"]) == ("none", level)
    assert recomputed["losses"] == pytest.approx(stock["losses"], rel=2e-2)


def test_kernels_change_the_losses_by_no_more_than_rounding(folder: Path) -> None:
    both = (json.dumps({"engine": "peft", "kernels": kernels}) for kernels in ("off", "on"))
    stock, ours = (trained(folder, options)["losses"] for options in both)
    assert ours == pytest.approx(stock, rel=5e-2)
