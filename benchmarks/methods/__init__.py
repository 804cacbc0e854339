"""The inputs and the competing methods that the suites measure."""
