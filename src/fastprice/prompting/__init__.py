"""Prompting without training: named ways to ask any model for a price, base or tuned, all decoded alike.

    zero-shot        the question and the item                              zero_shot.py
    few-shot:K       K priced items of the training set first, by seed      few_shot.py
    retrieval:K      the K most similar priced items first (BM25), or
                     retrieval:K:embeddings                                 retrieval.py
    chaining         brand, type, condition, quantity first, by the model   chaining.py
    tools            the model may calculate and convert first              tools.py

A strategy turns items into prompts whose next token is the price's first (layout.py lays them out and sees to the
context window). What follows is the same for all: p(price | prompt), from it the estimate for a criterion and an
interval, calibrated for this strategy. `PromptedEstimator` puts a model and a strategy together:

    prompted = PromptedEstimator(estimator, "retrieval:4", split.train).calibrate(split.validation)
    prompted.predict(texts)
    prompted.predict_interval(texts, coverage=0.9)
"""

from __future__ import annotations

from fastprice.prompting.prompted_estimator import Answers, PromptedEstimator
from fastprice.prompting.registry import STRATEGIES, choose_strategy
from fastprice.prompting.strategy import Asked, Strategy

__all__ = ["STRATEGIES", "Answers", "Asked", "PromptedEstimator", "Strategy", "choose_strategy"]
