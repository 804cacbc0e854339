"""One file for each command: its configuration, then one function that reads from top to bottom."""
