"""`python -m exo_fast.kernels.certification`: certify.py as a command."""

import sys

from exo_fast.kernels.certification.certify import main

if __name__ == "__main__":  # worker processes import this module again
    sys.exit(main())
