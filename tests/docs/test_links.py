"""What the pages point to exists: links, paths, commands with their options, settings."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.docs.pages import all_pages, code_spans, commands, name_of
from tests.paths import ROOT

PAGES = [name_of(path) for path in all_pages()]
PRESENT = [page for page in PAGES if page != "CHANGELOG.md"]  # which names what is no longer there
Run = Callable[..., tuple[int, str, str]]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"(?:src|kernels|tests|docs|scripts|benchmarks|examples)/[\w./*-]*")
# The top of a path that a page may leave out, as in "`ops/lora.py`".
_TOPS = ("", "src/fastprice", "kernels/fastprice_kernels", "docs")
_SHORT_PATH = re.compile(r"[a-z_]+/[\w/]+\.(?:py|md|json)")
MADE = {"cmp/compare.json"}  # by a command of the page


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    broken = []
    for target in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def exists(path: str, tops: tuple[str, ...]) -> bool:
    return any(next((ROOT / top).glob(path.rstrip("/")), None) is not None for top in tops)


@pytest.mark.parametrize("page", PRESENT)
def test_paths_in_backticks_exist(page: str) -> None:
    missing = []
    for span in code_spans(page):
        for word in span.split():
            word = word.strip("'\"(),;:").partition("::")[0]
            tops = ("",) if _PATH.fullmatch(word) else _TOPS if _SHORT_PATH.fullmatch(word) else None
            if tops is not None and word not in MADE and not exists(word, tops):
                missing.append(word)
    assert not missing


def test_pages_that_python_files_point_to_exist() -> None:
    missing = []
    for folder in ("src", "kernels", "tests", "scripts", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for page in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text(encoding="utf-8")):
                if not (ROOT / page).is_file():
                    missing.append(f"{name_of(path)}: {page}")
    assert not missing


def test_the_page_on_data_flow_names_files_that_are_there() -> None:
    rows = re.findall(
        r"^\| `(\w+)/` \| .* \| `(\w+\.py)` \|$", (ROOT / "docs/explanation/data-flow.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 10
    assert not [row for row in rows if not (ROOT / "src/fastprice" / row[0] / row[1]).is_file()]


def options_of(words: list[str]) -> tuple[set[str], str]:
    """(The options of the command that `fastprice WORDS` names, its name); KeyError for one that there is not."""
    from typer.main import get_command

    from fastprice.cli import app

    command: Any = get_command(app)
    known = {"--help", "-h", "--debug", "--version"}
    path = []
    for word in words:
        if word.startswith("-") or not hasattr(command, "commands"):
            break
        if word not in command.commands and path:
            break
        command = command.commands[word]
        path.append(word)
    for parameter in command.params:
        known.update(parameter.opts, parameter.secondary_opts)
    return known, " ".join(path)


@pytest.mark.parametrize("page", PRESENT)
def test_commands_and_options_exist(page: str, fastprice: Run) -> None:
    unknown = []
    for program, *words in commands(page):
        if program != "fastprice" or not words or words[0] in ("COMMAND", "[OPTIONS]"):
            continue
        try:
            known, command = options_of(words)
            if command == "bench":  # whose options are declared where typer may be missing
                kind = [word for word in words[1:2] if not word.startswith("-")]
                known |= set(re.findall(r"--[\w-]+", fastprice("bench", *kind, "--help")[1]))
        except KeyError as missing:
            unknown.append(f"fastprice {missing}")
            continue
        options = [word.partition("=")[0] for word in words if word.startswith("-") and word != "-"]
        unknown += [f"fastprice {command} {option}" for option in options if option not in known]
    assert not unknown


@pytest.mark.parametrize("page", PAGES)
def test_settings_given_by_key_exist(page: str) -> None:
    from fastprice.config import list_settings

    known = {setting.key for setting in list_settings()}
    unknown = []
    for span in code_spans(page):
        for values in re.findall(r"--set((?: +[\w.]+=\S+)+)", span):
            unknown += [pair.partition("=")[0] for pair in values.split() if pair.partition("=")[0] not in known]
    assert not [key for key in unknown if key != "KEY"]
