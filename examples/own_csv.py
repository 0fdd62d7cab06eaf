"""A CSV of products: read, cleaned, split, a model trained, prices with intervals, saved and loaded.

On synthetic products, or on your own file:

    python examples/own_csv.py                                    # writes and uses a small synthetic CSV
    python examples/own_csv.py --data products.csv --text title description --price price --group sku
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import fastprice


def write_synthetic_csv(path: Path, count: int) -> None:
    """A file as a shop would export it: prices as text, one of them unusable."""
    from fastprice.data.synthetic import make_synthetic_items

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sku", "title", "description", "price"])
        for item in make_synthetic_items(count, seed=1):
            title, _, description = item.text.partition("\n")
            writer.writerow([item.group, title, description, f"${item.price:,.2f}"])
        writer.writerow(["none/none", "Desk lamp", "brass, works", "call us"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CSV, TSV, JSON Lines or Parquet; default: a synthetic CSV")
    parser.add_argument("--text", nargs="+", default=["title", "description"], help="text columns")
    parser.add_argument("--price", default="price", help="price column")
    parser.add_argument("--group", default=None, help="column whose equal rows stay in one part of the split")
    parser.add_argument("--base", default="nano", help="nano, a folder or a hub id such as Qwen/Qwen2.5-0.5B")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        data, group = options.data, options.group
        if data is None:
            data, group = Path(folder) / "products.csv", "sku"
            write_synthetic_csv(data, 160)

        items = fastprice.load_items(data, text=options.text, price=options.price, group=group)
        items = fastprice.clean_items(items)
        print(f"{len(items)} items, {len(items.rejects)} rows that cannot be used")
        for reject in items.rejects[:3]:
            print(f"  row {reject.row}: {reject.reason}")

        split = fastprice.split_items(items)
        estimator = fastprice.PriceEstimator(base=options.base, epochs=1, max_tokens=96, pack_tokens=512)
        estimator.fit(split.train, split.validation)

        texts = [item.text for item in split.test]
        prices = estimator.predict(texts)
        intervals = estimator.predict_interval(texts, coverage=0.8)
        for item, price, (low, high) in list(zip(split.test, prices, intervals, strict=True))[:5]:
            title = item.text.splitlines()[0]
            print(f"${price:4.0f}  80 % interval ${low:.0f} to ${high:.0f}  true ${item.price:.0f}  {title[:50]}")
        scores = fastprice.score([item.price for item in split.test], prices)
        print(f"mean absolute error ${scores.mae:.2f} (95 % interval {scores.mae.low:.2f} to {scores.mae.high:.2f})")

        saved = estimator.save(Path(folder) / "estimator")
        loaded = fastprice.PriceEstimator.load(saved)
        assert (loaded.predict(texts[:5]) == prices[:5]).all()
        print("saved, loaded, and the same estimates")


if __name__ == "__main__":
    main()
