"""The losses of other libraries, compared with the same losses on exo_fast's log-probs."""
