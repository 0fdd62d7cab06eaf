"""`python -m fastprice_kernels.codegen`: see report.py."""

import sys

from fastprice_kernels.codegen.report import main

if __name__ == "__main__":
    sys.exit(main())
