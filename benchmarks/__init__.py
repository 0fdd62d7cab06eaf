"""Benchmarks of the checkout: ratios that CI watches (test_*.py), and `python -m benchmarks.gpu` for a GPU machine."""
