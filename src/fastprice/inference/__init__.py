"""From a tuned model to prices: distributions, estimates, calibrated intervals, explanations, whole files.

predictor            `PricePredictor`: what a fitted `PriceEstimator` can do
price_trie           the token sequences of all prices; trie_walk: which of them are scored
scorers/             log-probabilities of tokens, by the stock model or by merged dense weights
price_decoder        p(price | prompt) from both; greedy: the price that the model generates, for comparison
price_heads          the same distributions from a hidden state, without any digit
price_distribution   `PriceDistribution`, and the best estimate for each criterion
conformal            intervals with calibrated coverage
explain              the effect of each word on an estimate
batch/               estimates for files of any length
"""
