"""Scorers: the log-probabilities of tokens after prompts, by the stock model or by merged dense weights."""
