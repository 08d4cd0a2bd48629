"""The two errors that a user can meet; anything else that escapes is our bug and shows a traceback."""


class InputError(ValueError):
    """Bad input: says what was given, the rule, and the fix. The command line exits with 2."""


class Failure(RuntimeError):
    """Good input, but the work could not be done (a full disk, a damaged file). The command line exits with 1."""
