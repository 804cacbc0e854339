"""Weights on disk, to a model, its head and its layout."""
