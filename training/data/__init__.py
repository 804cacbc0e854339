"""Reading, validating, tokenising and batching alignment data."""
