"""The data sets that exo_fast knows by name, one module each."""
