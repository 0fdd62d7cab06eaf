"""Functions of the peers, fetched by name: the one place that reaches into their modules.

Each raises ImportError where the library, or the function in its version, is missing; the case's row then says so.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["liger_function", "liger_loss", "trl_chunked_loss", "unsloth_attention", "unsloth_kernel"]

Function = Callable[..., Any]


def unsloth_kernel(name: str) -> Function:
    """A function of Unsloth's kernels; ImportError too where Unsloth does not run on this device."""
    try:
        # Through the engine, which alone imports unsloth and keeps its compile cache out of the current folder.
        import_module("fastprice.models.unsloth_engine")
    except (NotImplementedError, RuntimeError, OSError, AttributeError) as error:
        message = (str(error).strip().splitlines() or [""])[0]
        raise ImportError(f"{type(error).__name__}: {message}") from error
    return _attribute("unsloth.kernels.utils", name)


def unsloth_attention() -> tuple[str, bool]:
    """The attention backend that Unsloth chooses for packed texts here, and whether it is the best that Unsloth has.

    Flash Attention wins where it is installed, then xformers; from torch 2.12 on "sdpa" means `varlen_attn`, before
    that one SDPA call for each run of equally long texts. ("unknown", False) where Unsloth does not say.
    """
    module = "unsloth.utils.attention_dispatch"
    try:
        chosen = str(_attribute(module, "select_attention_backend")(use_varlen=True))
    except ImportError:
        return "unknown", False
    if chosen != "sdpa":
        return chosen, "flash" in chosen
    try:
        varlen = _attribute(module, "_TORCH_VARLEN_ATTN") is not None
    except ImportError:
        return "sdpa", False
    if varlen:
        return "torch varlen", True
    return "sdpa, a call for each run of equal texts", False


def trl_chunked_loss() -> Function:
    """TRL's default loss since 1.7, cross-entropy in chunks of the labeled positions: (hidden states (1, T, D),
    lm_head weight, chunk size, labels=) -> (loss, ...)."""
    return _attribute("trl.trainer.sft_trainer", "_chunked_cross_entropy_loss")


def liger_loss(ignore_index: int) -> Function:
    """Liger's fused linear cross-entropy: (lm_head weight, hidden states (T, D), labels (T,)) -> loss."""
    loss_class = _attribute("liger_kernel.transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss")
    loss: Function = loss_class(ignore_index=ignore_index)
    return loss


def liger_function(name: str) -> Function:
    """A function of Liger's functional interface: liger_rms_norm(x, weight, eps, offset, casting mode, in place) or
    liger_rope(q, k, cos, sin)."""
    return _attribute("liger_kernel.transformers.functional", name)


def _attribute(module: str, name: str) -> Function:
    try:
        found: Function = getattr(import_module(module), name)
        return found
    except AttributeError as error:
        raise ImportError(str(error)) from error
