"""Scorers: the log-probabilities of price tokens after prompts, from the stock model or from merged dense weights."""
