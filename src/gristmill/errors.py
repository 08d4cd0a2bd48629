"""The two errors that a user can meet; any other exception that escapes is a bug of ours and shows a traceback."""

LONGEST = 2000  # characters of a message: enough for a long path and its reason


class InputError(ValueError):
    """Bad input: states the value given, the rule and the fix. The command line exits with 2."""


class Failure(RuntimeError):
    """Good input, but the work could not be done (a full disk, a damaged file). The command line exits with 1."""


def one_line(message: object) -> str:
    """Show a message on one printable line: escape control characters, and cut the middle out of a very long one."""
    parts = [part.strip() for part in str(message).splitlines() if part.strip()]
    joined = " ".join(part if part[-1] in ".,;:" or part is parts[-1] else f"{part};" for part in parts)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)
    if len(shown) <= LONGEST:
        return shown
    return f"{shown[: LONGEST // 2]} [{len(shown) - LONGEST:,} characters left out] {shown[-(LONGEST // 2) :]}"
