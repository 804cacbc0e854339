"""What ends a stage other than its own end, each printed by the command line without a traceback."""


class InputError(ValueError):
    """Bad configuration, data or paths, for the user to fix. The message names the thing, its value and the fix.
    Exit status 2."""


class RunError(RuntimeError):
    """A run that cannot go on: a full disk, a loss that is not finite. The message says what happened, what is safe and
    what to do. Exit status 1."""


class Stopped(Exception):
    """A run that was asked to stop (SIGTERM) and did. The message says what was saved. Exit status 0."""
