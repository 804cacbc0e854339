"""Models run without training: sampling, scoring, log-probs."""
