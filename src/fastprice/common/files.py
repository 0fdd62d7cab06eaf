"""Files and folders that appear whole or not at all.

Each is written under a temporary name beside its place, flushed to the disk, and renamed. So a crash, a full disk or a
power cut leaves what was there before, or the new content, and a reader never sees half of it. A process that is killed
can leave its temporary file, `.NAME.*.tmp`, or folder, `.NAME-*`.

Temporary files are opened by name and not by `tempfile.mkstemp`, whose files only their owner may read: the new file
has the permissions that the umask gives.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory

__all__ = ["atomic_file", "atomic_folder", "move_into_place", "write_text_atomically"]


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8 to `path`, in the place of what was there. Raises as `atomic_file` does."""
    with atomic_file(path) as half:
        half.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path`; the file written to it takes the place of `path` when the block ends without an exception.

    Otherwise it is deleted. Raises FileNotFoundError, before the block, when the folder of `path` does not exist, and
    any other OSError of writing.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"the folder {path.parent} does not exist", str(path))
    half = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
    try:
        yield half
        move_into_place(half, path)
    finally:
        half.unlink(missing_ok=True)


def move_into_place(half: Path, path: Path) -> None:
    """Renames the whole file `half` to `path`, on the same file system, once its bytes are on the disk."""
    _flush(half)
    half.replace(path)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside `path` that takes its place, whatever was there, when the block ends without an exception.

    The folders above it are made. Replacing takes two renames: a process killed between them leaves the older folder in
    `.NAME-*/replaced`. Raises OSError when it cannot be written or renamed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        whole, replaced = Path(scratch, "whole"), Path(scratch, "replaced")
        whole.mkdir()
        yield whole
        for each in whole.rglob("*"):
            if each.is_file():
                _flush(each)
        if path.exists():
            path.rename(replaced)
        try:
            whole.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise


def _flush(path: Path) -> None:
    with path.open("rb") as written:
        os.fsync(written.fileno())
