"""The code and the command of docs/prompting.md run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.paths import DOCS
from tests.product_files import write_products

Run = Callable[..., tuple[int, str, str]]
GUIDE = (DOCS / "prompting.md").read_text(encoding="utf-8")


def test_the_guides_python_and_its_command_run(
    fastprice: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_products(seed=6)
    asking, reading = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    exec(compile(asking, "docs/prompting.md", "exec"), {})
    assert "examples shown" in capsys.readouterr().out
    command = re.findall(r"^fastprice (compare --data .*)$", GUIDE, flags=re.MULTILINE)[0].split()
    fewer = ("--strategies", "zero-shot", "tools", "--items", 3, "--calibrate", 0)
    status, _, said = fastprice(*command, *fewer, "--out", "cmp", "--plot", "cmp/compare.png")
    assert status == 0, said
    exec(compile(reading, "docs/prompting.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert any(line.startswith("tools False ") for line in lines)
    assert Path("cmp/compare.png").is_file()
