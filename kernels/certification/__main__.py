"""`python -m exo_fast.kernels.certification`: the command line of certify.py."""

import sys

from exo_fast.kernels.certification.certify import main

if __name__ == "__main__":  # worker processes import this module again
    sys.exit(main())
