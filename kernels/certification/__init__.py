"""Certification without a GPU: compile every kernel, read its machine code, check the claims."""
