"""File locks. The kernel drops a lock when its process ends, however it ends."""

import errno
import fcntl
from pathlib import Path
from typing import IO, Any

from gristmill.errors import Failure

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def lock(file: IO[Any], path: Path, *, wait: bool = False) -> None:
    """Lock the open `file`; `path` is its name in errors.

    Raises BlockingIOError when somebody else holds the lock and `wait` is false, Failure when the file system has no
    locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as problem:
        if problem.errno not in NO_LOCKS:
            raise
        raise Failure(
            f"{path} cannot be locked ({problem.strerror}): this file system has no file locks; mount it with locks "
            "(Lustre: -o flock; NFS: version 4, or a running lockd), or choose a folder on another disk"
        ) from None


def unlock(file: IO[Any]) -> None:
    """Closing the file is not enough where a forked child has it open too."""
    fcntl.flock(file, fcntl.LOCK_UN)
