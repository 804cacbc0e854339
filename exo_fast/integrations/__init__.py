"""exo_fast inside the libraries people already train with, one module each. Importing this package imports none."""
