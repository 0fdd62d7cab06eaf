"""The Markdown pages of the repository: their blocks of Python, their shell commands, what they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.paths import ROOT

PROGRAMS = ("fastprice", "make", "pip", "git", "pytest", "python")
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_HIDDEN = {".venv", "node_modules", "site", "mutants"}


def all_pages() -> list[Path]:
    """Every Markdown file of the checkout that is not in an ignored folder."""
    return sorted(
        path
        for path in ROOT.rglob("*.md")
        if not any(part in _HIDDEN or part.startswith(".") for part in path.relative_to(ROOT).parts)
    )


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_blocks(page: str) -> list[str]:
    """The blocks of Python of the page, a path from the root, in their order."""
    return [body for language, body in _FENCE.findall(_text(page)) if language == "python"]


def code_spans(page: str) -> list[str]:
    """What stands between backticks in running text, and the lines of blocks without a language."""
    text = _text(page)
    lines = [line for language, body in _FENCE.findall(text) if not language for line in _joined(body)]
    return lines + _SPAN.findall(_FENCE.sub("", text))


def commands(page: str) -> list[list[str]]:
    """The shell commands of the page as words: lines of blocks and spans in backticks that begin with a program.

    Comments and variables such as OMP_NUM_THREADS=1 before the program are left out; a && b are two commands.
    """
    return [words for span in code_spans(page) for words in _commands_in(span)]


def _commands_in(line: str) -> Iterator[list[str]]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe: prose, not a command
        return
    command: list[str] = []
    for word in [*words, "&&"]:
        if word == "&&":
            if command and command[0] in PROGRAMS:
                yield command
            command = []
        elif command or not re.fullmatch(r"[A-Z_]+=\S*", word):
            command.append(word)


def _joined(body: str) -> list[str]:
    return re.sub(r"\\\n\s*", "", body).splitlines()


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")
