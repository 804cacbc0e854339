"""The command line: `exo-fast STAGE`. Only the runs of recipes import it by name: they need its stages."""

from exo_fast.training.cli.command import STAGES, main

__all__ = ["STAGES", "main"]
