"""Decoder layers whose frozen NF4 weights stay dequantized, as many as the memory that nothing else needs allows.

They never change, so such a layer dequantizes nothing: two passes over its weights a step less, for 2 bytes a weight
beside the packed ones (436 MB for a layer of Llama-3.1-8B). Recomputing less saves more time for the same memory, so
dense weights come last: only where no layer recomputes anything, and they go first when memory runs out.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["DenseWeights"]


class DenseWeights:
    """How many layers are dense, and how that is changed.

    layers       that may be dense: the last ones of the model
    layer_bytes  that the dense weights of one take
    apply        makes so many layers dense and the others not
    fixed        a number that was asked for; None: what fits
    """

    def __init__(
        self, layers: int, layer_bytes: int, apply: Callable[[int], object], *, fixed: int | None = None
    ) -> None:
        self.count = 0
        self._layers = layers if fixed is None else min(fixed, layers)
        self._layer_bytes, self._apply, self._is_fixed = layer_bytes, apply, fixed is not None

    @property
    def bytes(self) -> int:
        """That they take now."""
        return self.count * self._layer_bytes

    def fit(self, free: int) -> bool:
        """Makes as many layers dense as fit in `free` bytes, their own included, or the fixed number; whether that
        changed anything."""
        count = self._layers if self._is_fixed else max(0, min(self._layers, free // max(1, self._layer_bytes)))
        return self._set(count)

    def give_up(self) -> bool:
        """Frees all of them for good; False if there are none."""
        self._layers = 0
        return self._set(0)

    def _set(self, count: int) -> bool:
        if count == self.count:
            return False
        self._apply(count)
        self.count = count
        return True
