"""Files and folders that appear whole or not at all: crashes, full disks, kills, permissions, missing folders."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastprice.common import files
from fastprice.common.files import atomic_file, atomic_folder, move_into_place, write_text_atomically


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_below(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "new.txt").write_text("new")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_text_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("first, and longer", "é\n"):
        write_text_atomically(path, text)
        assert path.read_bytes() == text.encode()
    assert names(tmp_path) == ["a.txt"]


def test_an_exception_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def stop() -> None:
        with atomic_file(path) as half:
            half.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_until_the_end_readers_see_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path) as half:
        half.write_text("new")
        assert path.read_text() == "old"
        assert half.parent == path.parent
    assert path.read_text() == "new"


def test_a_process_killed_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    program = (
        "import os, signal, sys; from fastprice.common.files import atomic_file\n"
        "with atomic_file(sys.argv[1]) as half: half.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text_atomically(path, "new")
    assert path.read_text() == "new"


def test_a_failed_flush_leaves_the_old_file_or_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    path, folder = tmp_path / "a.txt", tmp_path / "folder"
    path.write_text("old")
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text_atomically(path, "new")
    with pytest.raises(OSError, match="No space left"), atomic_folder(folder) as whole:
        write_below(whole)
    assert path.read_text() == "old"
    assert names(folder) == ["old.txt"]
    assert names(tmp_path) == ["a.txt", "folder"]


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_file(path) as one, atomic_file(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_permissions_are_as_the_umask_says(
    tmp_path: Path, umask: Callable[[int], int], mask: int, file_mode: int, folder_mode: int
) -> None:
    umask(mask)
    write_text_atomically(tmp_path / "a.txt", "a")
    with atomic_folder(tmp_path / "folder") as whole:
        (whole / "b.txt").write_text("b")
    assert mode(tmp_path / "a.txt") == mode(tmp_path / "folder" / "b.txt") == file_mode
    assert mode(tmp_path / "folder") == folder_mode


def test_a_missing_folder_is_named_before_anything_is_written(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with (
        pytest.raises(FileNotFoundError, match=f"the folder {missing} does not exist: '{missing / 'a.txt'}'"),
        atomic_file(missing / "a.txt"),
    ):
        pytest.fail("the block ran")
    assert names(tmp_path) == []


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a.txt"):
        pass
    assert names(tmp_path) == []


def test_a_whole_file_is_moved_into_place(tmp_path: Path) -> None:
    half, path = tmp_path / "half", tmp_path / "a.txt"
    half.write_text("new")
    path.write_text("old")
    move_into_place(half, path)
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


# ---- Folders -------------------------------------------------------------------------------------------------------


def test_a_folder_appears_whole_with_those_above_it(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "folder"
    with atomic_folder(folder) as whole:
        (whole / "a.txt").write_text("a")
        assert not folder.exists()
    assert names(folder) == ["a.txt"]
    assert names(folder.parent) == ["folder"]


def test_a_folder_replaces_the_older_one(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "folder") as whole:
            (whole / f"{text}.txt").write_text(text)
    assert names(tmp_path / "folder") == ["two.txt"]
    assert names(tmp_path) == ["folder"]


def test_an_exception_in_the_middle_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old.txt").write_text("old")

    def stop() -> None:
        with atomic_folder(folder) as whole:
            (whole / "new.txt").write_text("new")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stop()
    assert names(folder) == ["old.txt"]
    assert names(tmp_path) == ["folder"]


def test_when_the_new_folder_cannot_be_moved_the_old_one_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    rename = Path.rename

    def busy(self: Path, target: Path) -> Path:
        if self.name == "whole":
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OSError, match="busy"), atomic_folder(folder) as whole:
        (whole / "new.txt").write_text("new")
    assert names(folder) == ["old.txt"]
    assert names(tmp_path) == ["folder"]
