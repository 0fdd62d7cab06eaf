"""The peers whose training is measured: one table of what differs between them; peer_training.py runs them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

__all__ = ["FASTPRICE", "HEADLINE", "LOADING_WAYS", "PEERS", "RUN_PEERS", "STOCK", "Peer"]


@dataclass(frozen=True)
class Peer:
    """One way to run the same training.

    description   as its users know it
    trainer       whose trainer runs
    padded        micro-batches are rows padded to the longest, not packs
    equal_tokens  as many padded rows a micro-batch as hold the tokens of a pack, in place of the notebooks' four
    recompute     whether the peer's own checkpointing runs; fastprice plans its own
    engine, kernels, cuda_graphs   settings of fastprice's own trainer
    """

    description: str
    trainer: Literal["fastprice", "trl", "unsloth"]
    padded: bool = False
    equal_tokens: bool = False
    recompute: bool = True
    engine: Literal["peft", "unsloth"] = "peft"
    kernels: Literal["on", "off"] = "off"
    cuda_graphs: Literal["on", "off"] = "off"

    def missing(self, *, cuda: bool) -> str | None:
        """Why this peer cannot run on this machine; None where it can. Imports nothing."""
        libraries = {"fastprice": (), "trl": ("trl",), "unsloth": ("unsloth", "trl")}[self.trainer]
        if self.engine == "unsloth":
            libraries = ("unsloth",)
        absent = [name for name in libraries if find_spec(name) is None]
        if absent:
            return f"{' and '.join(absent)} not installed"
        if not cuda and "unsloth" in libraries:
            return "Unsloth trains on CUDA devices alone"
        if not cuda and self.cuda_graphs == "on":
            return "CUDA graphs need a CUDA device"
        return None


# The most important first: in this order a round runs.
PEERS = {
    "peft": Peer("fastprice on the peft engine, its kernels on", "fastprice", kernels="on"),
    "unsloth-tuned": Peer("Unsloth without recomputation, packing=True", "unsloth", recompute=False),
    "trl-packed": Peer("transformers + PEFT + TRL with packing=True", "trl"),
    "unsloth": Peer("Unsloth's notebooks: its checkpointing, 8-bit AdamW, 4 rows", "unsloth", padded=True),
    "unsloth-equal": Peer("as unsloth, with the tokens of a pack a step", "unsloth", padded=True, equal_tokens=True),
    "trl-packed-no-recompute": Peer("as trl-packed, gradient_checkpointing=False", "trl", recompute=False),
    "unsloth-kernels": Peer("fastprice on the unsloth engine", "fastprice", engine="unsloth", kernels="on"),
    "peft-graphs": Peer("as peft, its steps replayed as CUDA graphs", "fastprice", kernels="on", cuda_graphs="on"),
    "peft-off": Peer("fastprice on the peft engine, its kernels off", "fastprice"),
    "trl-padded": Peer("transformers + PEFT + TRL with its defaults, padded rows", "trl", padded=True),
    "trl-padded-no-recompute": Peer("as trl-padded, gradient_checkpointing=False", "trl", padded=True, recompute=False),
}

# The reference of the check, and the stock path of ratios: the first of these that was measured.
STOCK = ("trl-packed", "trl-padded", "trl-packed-no-recompute", "trl-padded-no-recompute", "peft-off")
FASTPRICE = tuple(name for name, peer in PEERS.items() if peer.kernels == "on")
# Who loads a model: model_loading.py.
LOADING_WAYS = ("fastprice", "transformers", "unsloth")
# What a short run must reach, and what whole training runs are made with.
HEADLINE = ("peft", "unsloth-tuned", "trl-packed")
RUN_PEERS = (
    "peft", "unsloth-tuned", "trl-packed", "trl-packed-no-recompute", "trl-padded", "trl-padded-no-recompute",
)  # fmt: skip
