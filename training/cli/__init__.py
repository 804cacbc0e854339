"""The command line: `exo-fast STAGE`. Nothing else imports it."""

from exo_fast.training.cli.command import STAGES, main

__all__ = ["STAGES", "main"]
