"""What the README shows is what runs."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from fastprice.catalogue import make_catalogue

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_of_python_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with open("products.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sku", "title", "description", "price"])
        for item in make_catalogue(120, seed=21):
            title, _, rest = item.text.partition("\n")
            writer.writerow([item.group, title, rest, item.price])
    names: dict[str, object] = {"texts": ["a lamp", "a bicycle"]}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "my-estimator" / "fastprice.json").is_file()
    assert len(names["guesses"]) > 0  # type: ignore[arg-type]


def test_every_command_in_the_readme_exists() -> None:
    from typer.main import get_command

    from fastprice.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    shown = set(re.findall(r"^fastprice (\w+) .*--", README, flags=re.MULTILINE))
    assert shown <= known
    assert {"train", "predict", "inspect", "evaluate", "plan"} <= shown
