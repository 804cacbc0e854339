"""`python -m exo_fast.training.cli STAGE …`: the command `exo-fast`."""

import sys

from exo_fast.training.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
