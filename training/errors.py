"""Errors that are the user's to fix: the command line prints them without a traceback and exits with status
2."""


class InputError(ValueError):
    """Bad configuration, data or paths. The message names the thing, its value and the fix."""
