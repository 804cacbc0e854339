"""The suites of `exo-fast bench`: what is measured."""
