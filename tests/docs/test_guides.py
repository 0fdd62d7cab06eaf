"""What the tutorial and the guides show is what runs: their blocks of Python in order, page by page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.docs.pages import all_pages, name_of, python_blocks
from tests.paths import ROOT
from tests.product_files import write_products


def _adapted_model() -> dict[str, Any]:
    from tests.kernels.adapted_models import make

    return {"model": make()}


# Pages whose blocks run here, with the names that they take as given.
RUN: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/tutorial.md": dict,
    "docs/reference/kernels.md": _adapted_model,
    "kernels/README.md": _adapted_model,
    **{name_of(path): dict for path in sorted((ROOT / "docs" / "how-to").glob("*.md"))},
}
# Pages with blocks that do not run here, and where what they show does.
ELSEWHERE = {
    "README.md": "tests/docs/test_readme.py",
    "docs/prompting.md": "tests/prompting/test_guide.py",
    "docs/fit.md": "tests/offload/test_planned_loading.py",  # the page needs the weights of a 70B
}


def test_every_page_with_python_is_run_somewhere() -> None:
    pages = {name_of(path) for path in all_pages() if python_blocks(name_of(path))}
    assert pages == set(RUN) | set(ELSEWHERE)
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(RUN))
def test_the_blocks_of_a_page_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_products(seed=8, count=160)
    names = RUN[page]()
    for block in python_blocks(page):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", sorted(ELSEWHERE))
def test_blocks_that_run_elsewhere_are_python(page: str) -> None:
    for block in python_blocks(page):
        compile(block, page, "exec")
