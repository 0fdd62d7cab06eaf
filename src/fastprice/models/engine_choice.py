"""Which engine runs: the one that is named, or for "auto" the faster one that has what the settings need.

On fastprice's kernels both engines run the same frozen products (two dequantizations of a weight, nothing recomputed
that fits), the same adapters, attention and loss. They differ in norms, rotary embedding and residual adds, which are
bound by bytes. Counted in passes over a row of the hidden state, forward and backward, for each norm with its add:
fastprice 8 (the add is part of the norm's kernel), Unsloth 11 (norm 2 + 3, add 3 + 3, the latter the gradient's);
and over queries and keys: fastprice 4 (in place), Unsloth 8 (it copies them first). For Llama-3.1-8B that is 172
against 262 kB a token and layer, so "auto" is PEFT. Without the kernels PEFT runs adapters, norms and activations as
separate operations and dequantizes for each, and Unsloth's own fused ones are faster, so "auto" is Unsloth where it
runs. Arithmetic, not measurement: docs/explanation/engines.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from fastprice.errors import ConfigError, MissingDependencyError, nearest_name
from fastprice.models.base_models import model_type_of
from fastprice.models.engine import Engine
from fastprice.models.engine_features import UNSLOTH_LACKS, Feature, unsloth_lacks_model

__all__ = ["ENGINES", "auto_engine", "choose_engine", "unsloth_missing"]

ENGINES = ("auto", "peft", "unsloth")


def choose_engine(
    name: str = "auto", *, needs: Mapping[Feature, str] | None = None, base: str | None = None, kernels: bool = True
) -> Engine:
    """The engine of that name; "auto" is `auto_engine`, or PEFT, with a warning, where that lacks what is needed.

    needs     features, and of each the setting that needs it, for messages
    base      the base model; Unsloth does not run every family
    kernels   whether fastprice_kernels will be under the model

    Raises ConfigError for an unknown name and for "unsloth" without what is needed, MissingDependencyError for
    "unsloth" where it cannot run.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine: {name!r} is not one of {', '.join(ENGINES)}{nearest_name(name, ENGINES)}")
    chosen = auto_engine(kernels=kernels)[0] if name == "auto" else name
    if chosen == "unsloth":
        # Before Unsloth is imported: it patches trl, transformers and peft for the whole process.
        lacking = _unsloth_lacks(needs or {}, base)
        if lacking and name == "unsloth":
            raise ConfigError(f"engine: 'unsloth' has no {lacking}; use engine='peft'")
        if lacking:
            warnings.warn(f"engine: peft runs, and not unsloth, which has no {lacking}", stacklevel=2)
            chosen = "peft"
    if chosen == "unsloth":
        missing = unsloth_missing()
        if missing:
            raise MissingDependencyError(f"engine: unsloth cannot run here: {missing}; or use engine='peft'")
        from fastprice.models.unsloth_engine import UnslothEngine

        return UnslothEngine()
    from fastprice.models.peft_engine import PeftEngine

    return PeftEngine()


def auto_engine(*, kernels: bool) -> tuple[str, str]:
    """The engine that "auto" takes on this machine, whatever the settings need, and why.

    kernels: whether fastprice_kernels will be under the model.
    """
    missing = unsloth_missing()
    if missing:
        return "peft", f"unsloth cannot run here: {missing}"
    if kernels:
        return "peft", "on fastprice's kernels it moves fewer bytes than unsloth does, and it has every feature"
    return "unsloth", "without fastprice's kernels its own fused layers move fewer bytes than peft's"


def unsloth_missing() -> str:
    """Why Unsloth cannot run here and what to do about it; empty when it can."""
    from importlib.util import find_spec

    import torch

    if not torch.cuda.is_available():
        return "it needs a CUDA device and PyTorch sees none"
    if find_spec("unsloth") is None:
        return "it is not installed; install it with: pip install 'fastprice[gpu]'"
    return ""


def _unsloth_lacks(needs: Mapping[Feature, str], base: str | None) -> str | None:
    """What Unsloth's engine lacks of what is needed, what needs it and why, in words; None if nothing."""
    for feature, setting in needs.items():
        if feature in UNSLOTH_LACKS:
            return f"{feature}, which {setting} needs: {UNSLOTH_LACKS[feature]}"
    reason = None if base is None else unsloth_lacks_model(model_type_of(base))
    return None if reason is None else f"packs for base={base!r}: {reason}"
