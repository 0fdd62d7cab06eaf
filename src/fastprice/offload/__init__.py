"""Layer offload: models whose frozen 4-bit weights do not fit on the GPU train with them in host memory.

`offload_layers` moves the weights of decoder layers to the host and prefetches each when it is needed;
`fastprice.offload.nf4_loading` reads a model without ever holding it in 16 bits.
"""

from __future__ import annotations

from fastprice.offload.layer_offload import LayerOffload, offload_layers, spread_layers

__all__ = ["LayerOffload", "offload_layers", "spread_layers"]
