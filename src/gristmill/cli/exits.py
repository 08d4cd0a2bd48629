"""Exit codes, errors as one line on standard error, and standard streams that are closed or cannot encode a text."""

import codecs
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer

from gristmill.errors import Failure, InputError, one_line

UsageError: Any = typer.BadParameter.__base__  # typer has a private copy of click, which defines it
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Closed(io.TextIOBase):
    """Replaces a standard output that was closed before Python started; raises Failure when a verb prints."""

    def write(self, text: str) -> int:
        raise Failure("standard output is closed; redirect it to a file, or to /dev/null to discard it")


def prepare_streams() -> None:
    """Replace closed streams, which Python sets to None, and escape characters that the locale cannot encode."""
    codecs.register_error("gristmill", _encodable)
    if sys.stdout is None:
        sys.stdout = _Closed()
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="gristmill")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends


def _encodable(problem: UnicodeError) -> tuple[str | bytes, int]:
    """Return the original bytes of a file name, and escapes for characters that the encoding does not have."""
    try:
        return codecs.lookup_error("surrogateescape")(problem)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(problem)


def exit_code(call: Callable[[], Any]) -> int:
    """Run `call` and return its exit code. Errors of the user or the environment print one line on standard error."""
    try:
        code = int(call() or 0)
        sys.stdout.flush()  # here, because an error at the interpreter's exit would print a traceback
        return code
    except UsageError as bad:
        return _usage(bad)
    except InputError as bad:
        return _fail(bad, 2)
    except Failure as failure:
        return _fail(failure, 1)
    except UnicodeEncodeError as bad:  # Python's form of bytes that are not UTF-8, in an argument or a file name
        if "surrogates" not in bad.reason:
            raise
        return _fail(f"{bad.object!r} holds bytes that are not UTF-8, which is only possible in names of files", 2)
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does: no message
        _discard_output()
        return 1
    except OSError as problem:
        if problem.errno is None:
            raise
        _discard_output()
        return _fail(_reason(problem), 1)
    except (MemoryError, RuntimeError) as problem:
        if not _is_out_of_memory(problem):
            raise
        return _fail("not enough memory; close other programs, or use a smaller model, batch or limit", 1)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BaseException as stop:
        signum = getattr(stop, "signum", None)
        if signum is None:
            raise
        print("stopped; run the same command again to resume", file=sys.stderr)
        return 130 if signum == signal.SIGINT else 75


def _fail(message: object, code: int) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    return code


def _usage(bad: Any) -> int:
    """Print the error in a command line and where to read the rule; print the help if no verb is given."""
    command = bad.ctx.command_path if bad.ctx is not None else "gristmill"
    if bad.__class__.__name__ == "NoArgsIsHelpError":
        bad.show()
        return 2
    problem = bad.format_message().strip().rstrip(".").replace("Value error, ", "")
    return _fail(f"{command}: {problem[:1].lower()}{problem[1:]}; see `{command} --help`", 2)


def _is_out_of_memory(problem: MemoryError | RuntimeError) -> bool:
    """Whether memory ran out. Compares names, because importing torch for its exception would slow every verb down."""
    named = type(problem).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(problem)
    return isinstance(problem, MemoryError) or named


def _reason(problem: OSError) -> str:
    """Return what the system refused, for which file, and the fix."""
    files = [str(file) for file in (problem.filename, problem.filename2) if file is not None]
    where = f" ({' -> '.join(files)})" if files else ""
    if problem.errno in DISK_FULL:
        fix = "free some room"
    elif problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "make it writable or choose --out"
    else:
        fix = "correct this"
    return f"{problem.strerror}{where}; {fix}, then run the same command: finished stages are kept"


def _discard_output() -> None:
    """Discard buffered output: the interpreter would flush it at exit and fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
