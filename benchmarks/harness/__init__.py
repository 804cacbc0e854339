"""How every benchmark is measured: the contract of a suite, the runner, and the comparison of results."""
