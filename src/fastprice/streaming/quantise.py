"""`fastprice quantise`: a base in NF4, written as safetensors shards that stock transformers reads as well.

Reading 8 B weights in 16 bits and quantising them takes minutes at every start; the copy is a third of the size and is
only mapped. It is written as it is read: one shard of the source and one of the copy are held, never the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprice.common.files import atomic_folder
from fastprice.engines.bases import load_config, load_tokenizer
from fastprice.errors import BaseModelError, ConfigError
from fastprice.streaming.checkpoint import INDEX, SINGLE, find_file
from fastprice.streaming.loading import nf4_weights, own_copy, skeleton

__all__ = ["SHARD_BYTES", "quantise"]

SHARD_BYTES = 2 << 30


def quantise(base: str, out: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes `base` (folder, hub id or "nano") with linear layers in NF4 to the new folder `out`, and returns it.

    Everything else keeps the dtype of the base. The folder appears whole or not at all. Raises ConfigError for a folder
    that holds something or a base that is in NF4 already, BaseModelError for a base that cannot be read or a disk that
    cannot be written.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"quantise: {target} exists; give a new or empty folder")
    config = load_config(base)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"quantise: {base!r} is quantised already; train from it as it is")
    dtype = config.dtype or torch.float32
    model, quantizer = skeleton(base, dtype)
    try:
        with atomic_folder(target) as whole:
            _write_shards(whole, _tensors(model, base, dtype), shard_bytes)
            _write_settings(whole, model, quantizer, base)
            if target.exists():
                target.rmdir()  # refuses what was put there meanwhile
    except OSError as error:
        raise BaseModelError(
            f"quantise: {target} cannot be written ({error.strerror or error}); free space or give another folder"
        ) from error
    return target


def _tensors(model: Any, base: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the copy under transformers' names: a 4-bit weight comes with its statistics."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in nf4_weights(model, base, dtype=dtype, device=device):
        state = getattr(value, "quant_state", None)
        if state is None:
            yield name, own_copy(value, dtype if value.is_floating_point() else None, torch.device("cpu"))
            continue
        yield name, value.data.cpu()
        for part, tensor in state.as_dict(packed=True).items():
            yield f"{name}.{part}", tensor.cpu()


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def write() -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(held, folder / f"{len(shards)}", metadata={"format": "pt"})
        except SafetensorError as error:  # its only sign that the disk is full
            raise OSError(" ".join(str(error).split())) from error
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            write()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / "0").rename(folder / SINGLE)
        return
    where: dict[str, str] = {}
    for number, names in enumerate(shards):
        shard = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}").rename(folder / shard)
        where.update(dict.fromkeys(names, shard))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_settings(folder: Path, model: Any, quantizer: Any, base: str) -> None:
    model.config.quantization_config = quantizer.quantization_config
    model.config.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    generation = find_file(base, "generation_config.json")
    if generation is not None:
        shutil.copyfile(generation, folder / generation.name)
