"""Settings from a process's environment: the home directory, which a container's user may lack, and the address of the
Hugging Face hub."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from gristmill.errors import InputError


def home(other: str) -> Path:
    """Return the home directory. Raises InputError where there is none; `other` names what can be set instead."""
    try:
        return Path.home()
    except RuntimeError:
        raise InputError(f"the home directory is unknown; set HOME or {other}") from None


def expand(path: str | Path, where: str = "") -> Path:
    """Replace a leading `~` or `~name`. Raises InputError, which begins with `where`, if that home is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        fix = "set HOME or write the full path" if Path(path).parts[0] == "~" else "write the full path"
        raise InputError(f"{where and f'{where}: '}{str(path)!r}: the home directory is unknown; {fix}") from None


def check_endpoint() -> None:
    """Raise InputError if HF_ENDPOINT is no URL: huggingface_hub would fail with a traceback when it is imported."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        urlsplit(endpoint).hostname  # noqa: B018  # raises
    except ValueError as problem:
        raise InputError(f"HF_ENDPOINT={endpoint!r:.80} is not a URL ({problem}); correct it or unset it") from None
