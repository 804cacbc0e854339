"""One file a command: its configuration, then one function that reads from top to bottom."""
