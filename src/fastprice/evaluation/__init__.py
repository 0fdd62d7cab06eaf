"""Evaluation of price estimates: metrics, baselines, several models on the same items, the report.

metrics      MAE, RMSE, RMSLE, MAPE, R² and hits, with bootstrap intervals
baselines    estimators without a language model
evaluate     several models on the same unseen items, in one table
report       the HTML page of a run; charts: the SVG plots in it
"""
