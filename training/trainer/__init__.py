"""The training loop, its checkpoints and its engines. Read run.py first."""
