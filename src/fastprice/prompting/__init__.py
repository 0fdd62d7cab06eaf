"""Prompting without training: named strategies that build a prompt for any model, base or tuned.

    zero-shot        the question and the item                                      zero_shot.py
    few-shot:K       K priced training items as examples, drawn by seed             few_shot.py
    retrieval:K      the K most similar priced items as examples, by BM25, or by
                     sentence embeddings (retrieval:K:embeddings)                   retrieval.py
    chaining         the model generates brand, type, condition and quantity first  chaining.py
    tools            the model may call a calculator and a unit converter first     tools/

A strategy turns items into prompts whose next token is the first of the price; prompt_builder.py writes them and fits
them into the context window. The rest is the same for all: p(price | prompt), the estimate for a criterion, and an
interval that is calibrated for the strategy. `PromptedEstimator` combines a model and a strategy:

    prompted = PromptedEstimator(estimator, "retrieval:4", split.train).calibrate(split.validation)
    prompted.predict(texts)
    prompted.predict_interval(texts, coverage=0.9)
"""

from __future__ import annotations

from fastprice.prompting.prompted_estimator import PromptedEstimator, QueryResult
from fastprice.prompting.registry import STRATEGIES, make_strategy
from fastprice.prompting.strategy import PromptBatch, Strategy

__all__ = ["STRATEGIES", "PromptBatch", "PromptedEstimator", "QueryResult", "Strategy", "make_strategy"]
