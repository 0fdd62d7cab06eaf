"""Estimates for the rows of a file of any length: read, estimated and written a chunk at a time.

source ─► rows ─► chunks of 1,024 ─► estimates ─► parts beside the target ─► the complete target

chunks   which rows are estimated together, and the columns of the result
parts    the numbered files beside the target, from which a stopped job goes on
files    the job: `predict_file`
"""

from fastprice.inference.batch.chunks import Estimates, estimate_rows
from fastprice.inference.batch.files import Progress, check_options, predict_file
from fastprice.inference.batch.parts import Totals, check_target

__all__ = ["Estimates", "Progress", "Totals", "check_options", "check_target", "estimate_rows", "predict_file"]
