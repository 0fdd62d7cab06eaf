"""What the README shows is what runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.paths import ROOT
from tests.product_files import write_products

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_of_python_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_products(seed=21)
    names: dict[str, object] = {"texts": ["a lamp", "a bicycle"]}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "my-estimator" / "fastprice.json").is_file()
    assert len(names["texts"]) > 2, "the README estimates its test items"  # type: ignore[arg-type]


def test_every_command_in_the_readme_exists() -> None:
    from typer.main import get_command

    from fastprice.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    shown = set(re.findall(r"^fastprice (\w+) .*--", README, flags=re.MULTILINE))
    assert shown <= known
    assert {"train", "predict", "inspect", "evaluate", "plan"} <= shown
