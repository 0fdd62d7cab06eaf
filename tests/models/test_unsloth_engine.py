"""Every Unsloth name that fastprice calls is there with the parameters it passes.

Unsloth loads no model without a GPU, but it can be imported, in a process of its own since it patches what it finds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = """
import inspect, json
from fastprice.models.unsloth_engine import REQUIRED, UnslothEngine
from unsloth import FastLanguageModel
import unsloth.utils.packing as packing
print("found:" + json.dumps({
    "signatures": {name: list(inspect.signature(getattr(FastLanguageModel, name)).parameters) for name in REQUIRED},
    "required": REQUIRED,
    "lengths key": UnslothEngine().collator().lengths_key in inspect.getsource(packing.get_packed_info_from_kwargs),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("unsloth") is None, reason="unsloth is not installed")
def test_unsloth_has_every_name_and_parameter_that_the_engine_uses(tmp_path: Path) -> None:
    environment = {**os.environ, "UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found:"))[6:])
    for name, parameters in found["required"].items():
        missing = set(parameters) - set(found["signatures"][name])
        assert not missing, f"{name} has no {missing}"
    assert found["lengths key"]


def test_the_gpu_extra_asks_for_this_years_unsloth() -> None:
    (floor,) = [line for line in requires("fastprice") or [] if line.startswith("unsloth>")]
    assert re.search(r"unsloth>=2026\.10", floor)
