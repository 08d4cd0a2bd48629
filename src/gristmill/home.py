"""The user's home directory, which not every process has: a container's user need not be in the list of users."""

from pathlib import Path

from gristmill.errors import InputError


def home(other: str) -> Path:
    """Return the home directory. Raises InputError where there is none; `other` names what can be set instead."""
    try:
        return Path.home()
    except RuntimeError:
        raise InputError(f"the home directory is unknown; set HOME or {other}") from None


def expand(path: str | Path) -> Path:
    """Replace a leading `~` or `~name`. Raises InputError where that home directory is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        first = Path(path).parts[0]
        fix = "set HOME, or " if first == "~" else ""
        raise InputError(f"{str(path)!r}: the home directory {first} is unknown; {fix}give a path without ~") from None
