"""From a model to prices: distributions, estimates, intervals, price heads, whole files."""
