from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import fastprice
from fastprice.benchmarking.environment import environment


def _commit(root: Path) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=root, check=True)
    head = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=root, check=True, capture_output=True)
    return head.stdout.decode().strip()


def test_the_commit_is_that_of_the_checkout_and_says_when_sources_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "src" / "fastprice"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "README.md").write_text("")
    head = _commit(tmp_path)
    monkeypatch.setattr(fastprice, "__file__", str(package / "__init__.py"))
    assert environment()["commit"] == head
    (tmp_path / "README.md").write_text("other")
    assert environment()["commit"] == head
    (package / "__init__.py").write_text("other = 1")
    assert environment()["commit"] == f"{head}+changes"
    assert environment("abc")["commit"] == "abc"


def test_a_package_installed_inside_another_checkout_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / ".venv" / "lib" / "fastprice"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / ".gitignore").write_text(".venv/\n")
    _commit(tmp_path)
    monkeypatch.setattr(fastprice, "__file__", str(package / "__init__.py"))
    assert environment()["commit"] == "unknown"
