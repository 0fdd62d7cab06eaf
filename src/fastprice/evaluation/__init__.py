"""How good estimates are: metrics, baselines, models side by side, the report."""
