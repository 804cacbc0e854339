"""exo_fast inside the libraries people already train with, one module each. This package itself imports no library."""
