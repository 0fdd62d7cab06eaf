"""`fastprice quantize`: a base in NF4, written as safetensors shards that stock transformers reads as well.

Reading 8 B weights in 16 bits and quantizing them takes minutes at every start; the copy is a third of the size and is
only memory-mapped. It is written while the source is read: one shard of each is in memory, never the model.
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
from fastprice.errors import BaseModelError, ConfigError
from fastprice.models.base_models import load_config, load_tokenizer
from fastprice.offload.nf4_loading import copy_unmapped, empty_model, iterate_nf4_weights
from fastprice.offload.weight_files import INDEX_FILE, SINGLE_FILE, find_file

__all__ = ["SHARD_BYTES", "quantize"]

SHARD_BYTES = 2 << 30


def quantize(base: str, out: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes `base` (folder, hub id or "nano") with linear layers in NF4 to the new folder `out`, and returns it.

    Everything else stays in the dtype of the base. The folder appears complete or not at all. Raises ConfigError for a
    folder that is not empty or a base that is quantized already, BaseModelError for a base that cannot be read or a
    disk that cannot be written.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"quantize: {target} exists; give a new or empty folder")
    config = load_config(base)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"quantize: {base!r} is quantized already; use it as the base directly")
    dtype = config.dtype or torch.float32
    model, quantizer = empty_model(base, dtype)
    try:
        with atomic_folder(target) as complete:
            _write_shards(complete, _tensors(model, base, dtype), shard_bytes)
            _write_configuration(complete, model, quantizer, base)
            if target.exists():
                target.rmdir()  # refuses what was put there meanwhile
    except OSError as error:
        raise BaseModelError(
            f"quantize: {target} cannot be written ({error.strerror or error}); free space or give another folder"
        ) from error
    return target


def _tensors(model: Any, base: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the copy under transformers' names: a 4-bit weight is followed by its statistics."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in iterate_nf4_weights(model, base, dtype=dtype, device=device):
        state = getattr(value, "quant_state", None)
        if state is None:
            yield name, copy_unmapped(value, dtype if value.is_floating_point() else None, torch.device("cpu"))
            continue
        yield name, value.data.cpu()
        for part, tensor in state.as_dict(packed=True).items():
            yield f"{name}.{part}", tensor.cpu()


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def write() -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(pending, folder / f"{len(shards)}", metadata={"format": "pt"})
        except SafetensorError as error:  # which it raises also for a full disk
            raise OSError(" ".join(str(error).split())) from error
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > shard_bytes:
            write()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / "0").rename(folder / SINGLE_FILE)
        return
    shard_of: dict[str, str] = {}
    for number, names in enumerate(shards):
        shard = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}").rename(folder / shard)
        shard_of.update(dict.fromkeys(names, shard))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_configuration(folder: Path, model: Any, quantizer: Any, base: str) -> None:
    model.config.quantization_config = quantizer.quantization_config
    model.config.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    generation = find_file(base, "generation_config.json")
    if generation is not None:
        shutil.copyfile(generation, folder / generation.name)
