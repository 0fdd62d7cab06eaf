"""The peers whose training steps are measured: one table of what differs between them; peer_training.py runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FASTPRICE", "PEERS", "STOCK", "Peer"]


@dataclass(frozen=True)
class Peer:
    """One way to run the same training steps.

    description   as its users know it
    trainer       whose trainer runs
    padded        micro-batches are rows padded to the longest, not packs
    engine, kernels, cuda_graphs   settings of fastprice's own trainer
    """

    description: str
    trainer: Literal["fastprice", "trl", "unsloth"]
    padded: bool = False
    engine: Literal["peft", "unsloth"] = "peft"
    kernels: Literal["on", "off"] = "off"
    cuda_graphs: Literal["on", "off"] = "off"


# The most important first: in this order a round runs.
PEERS = {
    "peft": Peer("fastprice on the peft engine, its kernels on", "fastprice", kernels="on"),
    "unsloth-tuned": Peer("Unsloth without recomputation, packing=True", "unsloth"),
    "trl-packed": Peer("transformers + PEFT + TRL with packing=True", "trl"),
    "unsloth": Peer("Unsloth's notebooks: its checkpointing, 8-bit AdamW, rows", "unsloth", padded=True),
    "unsloth-kernels": Peer("fastprice on the unsloth engine", "fastprice", engine="unsloth", kernels="on"),
    "peft-graphs": Peer("as peft, its steps replayed as CUDA graphs", "fastprice", kernels="on", cuda_graphs="on"),
    "peft-off": Peer("fastprice on the peft engine, its kernels off", "fastprice"),
    "trl-padded": Peer("transformers + PEFT + TRL with its defaults, padded rows", "trl", padded=True),
}

# The reference of the check, and the stock path of ratios: the first of these that was measured.
STOCK = ("trl-packed", "trl-padded", "peft-off")
FASTPRICE = tuple(name for name, peer in PEERS.items() if peer.kernels == "on")
