"""`quantize`: base models made ready."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastprice.cli.options import make_console


def quantize(
    base: Annotated[str, typer.Argument(metavar="BASE", help="'nano', a folder, or a hub id.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the copy.")],
) -> None:
    """Write a base in NF4, a third of its size, which is then read through mmap; never holds it in 16 bits."""
    from fastprice.offload.quantize import quantize as write_copy

    folder = write_copy(base, out)
    size = sum(file.stat().st_size for file in folder.iterdir())
    make_console().print(f"{base} in NF4: {folder}, {size / 1e9:,.2f} GB", highlight=False, soft_wrap=True)
