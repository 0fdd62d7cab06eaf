"""Loading a 4-bit model from its folder, as fastprice, stock transformers and Unsloth load it, ready for adapters."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch

from fastprice.benchmarking.host_memory import host_peak, reset_host_peak
from fastprice.benchmarking.timing import synchronize
from fastprice.models.peft_engine import PeftEngine, compute_dtype

__all__ = ["load_rounds"]

_TOKENS = 512


def load_rounds(way: str, folder: str, rounds: int) -> Iterator[dict[str, Any]]:
    """A row a round: seconds and peaks in bytes of loading the model in `folder`; the first includes lazy imports.

    Raises KeyError for a way that is none of `peers.LOADING_WAYS`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = _LOADERS[way]
    for number in range(rounds):
        gc.collect()
        reset = reset_host_peak()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        model = load(folder)
        synchronize(device)
        row: dict[str, Any] = {
            "way": way,
            "round": number,
            "load_seconds": time.perf_counter() - began,
            "host_peak": host_peak(),
            "own_host_peak": reset,
            "peak_allocated": None,
            "peak_reserved": None,
        }
        if device.type == "cuda":
            row["peak_allocated"] = torch.cuda.max_memory_allocated()
            row["peak_reserved"] = torch.cuda.max_memory_reserved()
        del model
        yield row


def _fastprice(folder: str) -> Any:
    return PeftEngine().load_base(folder, method="qlora", max_tokens=_TOKENS).model


def _transformers(folder: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)  # a part of what the others load
    options: dict[str, Any] = {"dtype": compute_dtype()}
    if torch.cuda.is_available():
        options["device_map"] = {"": 0}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def _unsloth(folder: str) -> Any:
    engine = import_module("fastprice.models.unsloth_engine")
    return engine.FastLanguageModel.from_pretrained(model_name=folder, max_seq_length=_TOKENS, load_in_4bit=True)[0]


_LOADERS: dict[str, Callable[[str], Any]] = {
    "fastprice": _fastprice,
    "transformers": _transformers,
    "unsloth": _unsloth,
}
