"""A file of products as the guides' commands and lines of Python expect it in the current folder."""

from __future__ import annotations

import csv

from fastprice.data.synthetic import make_synthetic_items


def write_products(seed: int, count: int = 120) -> None:
    """products.csv: sku, title, description and price of items of the synthetic catalogue."""
    with open("products.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sku", "title", "description", "price"])
        for item in make_synthetic_items(count, seed=seed):
            title, _, rest = item.text.partition("\n")
            writer.writerow([item.group, title, rest, item.price])
