"""Estimates for the rows of a file of any length: read, priced and written a chunk at a time.

source ─► rows ─► chunks of 1,024 ─► estimates ─► parts beside the target ─► the target, whole

chunks   what is priced at once, and the columns that come out
parts    the numbered files beside the target, and going on after a stop
files    the job: `predict_file`
"""

from fastprice.inference.batch.chunks import Estimates, estimate_rows
from fastprice.inference.batch.files import Progress, check_options, predict_file
from fastprice.inference.batch.parts import Totals, check_target

__all__ = ["Estimates", "Progress", "Totals", "check_options", "check_target", "estimate_rows", "predict_file"]
