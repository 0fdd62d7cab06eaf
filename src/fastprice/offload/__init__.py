"""Streaming the frozen base: models whose 4-bit weights do not fit on the device train from host memory.

`stream` puts the weights of decoder layers on the host and brings each in when it is needed; `loading` reads a model
without ever holding it in 16 bits.
"""

from __future__ import annotations

from fastprice.offload.layer_offload import Streaming, spread, stream

__all__ = ["Streaming", "spread", "stream"]
