"""The common part of all benchmarks: the contract of a suite, the runner, and the comparison of results."""
