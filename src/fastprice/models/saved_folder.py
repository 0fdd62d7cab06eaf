"""A saved estimator: one folder with its settings, the adapter or the whole model, and a price head's weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastprice.common.files import atomic_folder
from fastprice.errors import BaseModelError, ConfigError

__all__ = ["ADAPTER", "FORMAT", "MANIFEST", "MODEL", "PRICE_HEAD", "read_manifest", "write_folder"]

FORMAT = 1
MANIFEST = "fastprice.json"
ADAPTER = "adapter"
PRICE_HEAD = "head.safetensors"
MODEL = "model"


def write_folder(folder: str | os.PathLike[str], manifest: dict[str, Any], write: Callable[[Path], object]) -> Path:
    """Writes `folder`: the manifest, and the files that `write` puts there. It appears complete or not at all.

    An older saved estimator in it is replaced; any other non-empty folder is refused with ConfigError.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file())):
        raise ConfigError(f"save: {target} exists and is not a saved estimator; give a new or empty folder")
    with atomic_folder(target) as whole:
        write(whole)
        text = json.dumps({"format": FORMAT, **manifest}, indent=2) + "\n"
        (whole / MANIFEST).write_text(text, encoding="utf-8")
    return target


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the saved estimator in `folder`; BaseModelError for another folder, another format, or damage."""
    path = folder / MANIFEST
    if not path.is_file():
        raise BaseModelError(
            f"{folder} is not a saved estimator: it has no {MANIFEST}; give a folder that save() wrote"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{path} is not valid JSON ({error}); restore it or train again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise BaseModelError(f"{path} has format {found}, this fastprice reads format {FORMAT}; use its own version")
    return manifest
