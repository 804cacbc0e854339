"""Places in the repository that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"
RAW = ROOT / "tests" / "data" / "raw"  # rows of data sets as their publishers ship them
SEED_LOSSES = ROOT / "tests" / "data" / "seed_losses.json"  # losses of the original EXO code
