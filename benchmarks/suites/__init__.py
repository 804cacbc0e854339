"""The suites of `exo-fast bench`: the cases and their measurements."""
