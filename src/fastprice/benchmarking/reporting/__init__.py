"""From result files to people: summaries, tables, plots, the page, comparison of two results."""
