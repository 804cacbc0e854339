"""The command line: `exo-fast STAGE`. Nothing else imports it by name but recipes' runs, which need its stages."""

from exo_fast.training.cli.command import STAGES, main

__all__ = ["STAGES", "main"]
