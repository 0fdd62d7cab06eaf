"""`PriceEstimator` as a scikit-learn regressor, cross-validated beside TF-IDF with ridge on the same folds.

On synthetic products, or on your own file:

    python examples/scikit_learn.py
    python examples/scikit_learn.py --data products.csv --text title description --price price --group sku
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline

import fastprice


def read_items(options: argparse.Namespace) -> fastprice.Items:
    if options.data is not None:
        items = fastprice.load_items(options.data, text=options.text, price=options.price, group=options.group)
        return fastprice.clean_items(items)
    from fastprice.data.synthetic import make_synthetic_items

    return fastprice.clean_items(make_synthetic_items(150, seed=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CSV, TSV, JSON Lines or Parquet; default: synthetic products")
    parser.add_argument("--text", nargs="+", default=["title", "description"], help="text columns")
    parser.add_argument("--price", default="price", help="price column")
    parser.add_argument("--group", default=None, help="column whose equal rows stay in one fold")
    options = parser.parse_args()

    items = read_items(options)
    texts = [item.text for item in items]
    prices = np.array([item.price for item in items])
    # Offers of one product in training and test at once would make every model look better than it is.
    groups = [item.group or f"row {item.row}" for item in items]

    language_model = fastprice.PriceEstimator(base="nano", epochs=1, max_tokens=96, pack_tokens=512)
    word_statistics = TransformedTargetRegressor(
        make_pipeline(TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), Ridge(alpha=1.0)),
        func=np.log1p,
        inverse_func=np.expm1,
    )
    for name, model in (("nano, tuned", language_model), ("TF-IDF + ridge", word_statistics)):
        errors = -cross_val_score(
            clone(model), texts, prices, groups=groups, cv=GroupKFold(3), scoring="neg_mean_absolute_error"
        )
        print(f"{name:15} mean absolute error ${errors.mean():.2f} over {len(errors)} folds: {errors.round(2)}")
    print("The nano is a tiny model that shows the pipeline; accuracy comes from a real base model.")


if __name__ == "__main__":
    main()
