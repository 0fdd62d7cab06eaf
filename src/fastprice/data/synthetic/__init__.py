"""A synthetic product catalog: realistic texts with prices from a known random process, any size, any seed."""

from __future__ import annotations

from fastprice.data.synthetic.generator import Offer, Product, generate_offers, make_synthetic_items

__all__ = ["Offer", "Product", "generate_offers", "make_synthetic_items"]
