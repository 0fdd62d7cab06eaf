"""The reference pages have everything that there is."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.paths import DOCS

import fastprice
import fastprice_kernels

REWRITE = "python -m typer fastprice.cli utils docs --name fastprice --output docs/reference/cli.md"


def test_the_page_of_the_command_line_is_up_to_date(tmp_path: Path) -> None:
    arguments = [*REWRITE.split()[1:-1], str(tmp_path / "cli.md")]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "cli.md").read_text(encoding="utf-8")
    assert (DOCS / "reference" / "cli.md").read_text(encoding="utf-8") == written, f"run: {REWRITE}"


def documented(page: str) -> list[Any]:
    """The objects that a page names for mkdocstrings."""
    found = []
    for path in re.findall(r"^::: (\S+)$", (DOCS / "reference" / page).read_text(encoding="utf-8"), re.MULTILINE):
        module, _, name = path.rpartition(".")
        found.append(import_module(path) if path == "fastprice.errors" else getattr(import_module(module), name))
    return found


def test_every_public_name_is_on_the_page_of_the_package() -> None:
    page = documented("python.md")
    errors = import_module("fastprice.errors")
    assert errors in page  # and so every exception of it
    names = [name for name in fastprice.__all__ if name != "__version__" and not hasattr(errors, name)]
    missing = [name for name in names if not any(getattr(fastprice, name) is each for each in page)]
    assert not missing
    assert len(page) == len(names) + 1, "the page has names that are not public"


def test_every_public_name_of_the_kernels_is_on_their_page() -> None:
    page = documented("kernels.md")
    missing = [name for name in fastprice_kernels.__all__ if getattr(fastprice_kernels, name) not in page]
    assert not missing
