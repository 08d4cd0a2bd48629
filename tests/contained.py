"""One command line in a process of its own: as another user, in an odd environment, without harm to the machine.

The process writes below its own folder only, connects to the loopback only, and is bounded in memory and time.
"""

import contextlib
import ctypes
import errno
import faulthandler
import io
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import SERVER
from hostile import Sample

LIMIT_S = 8.0  # then Ctrl-C, as a user would press it
PATIENCE_S = 60.0  # for Ctrl-C to have an effect: the machine may be busy with other work
MEMORY = 4 << 30  # bytes of private memory: more than any tiny run needs
NOBODY = 61234  # an unused user id
ALLOWED = (0, 1, 2, 75, 130)
NO_PYTHON = 99  # the child's exit code when the plain user cannot read this Python
LOOPBACK = (None, "", "127.0.0.1", "::1", "localhost", "0.0.0.0", b"127.0.0.1", b"localhost")


@dataclass(frozen=True)
class Ending:
    code: int
    out: bytes
    err: str
    stack: str

    def complaint(self, verb: str) -> str | None:
        """What is wrong with it, if anything is."""
        if self.stack:
            return f"Ctrl-C had no effect for {PATIENCE_S:.0f} s"
        if self.code not in ALLOWED:
            return f"exit code {self.code}"
        for sign in ("Traceback", "Exception ignored", "Warning:", "Warning "):
            if sign in self.err:
                return f"{sign!r} on standard error"
        lines = self.err.split("\n")[:-1]
        if any(not line.isprintable() for line in lines):
            return "an unprintable character on standard error"
        if max(map(len, lines), default=0) > 4000:
            return "a line of more than 4,000 characters on standard error"
        errors = [line for line in lines if line.startswith("error: ")]
        if self.code == 2 and (len(errors) != 1 or lines[-1] != errors[0]):
            return "exit code 2 without one line that says why, at the end"
        if self.code == 1 and (len(errors) > 1 or (errors and lines[-1] != errors[0])):
            return "more than one line says why it failed"
        if self.code == 1 and not errors and not self.may_be_silent(verb):
            return "exit code 1 without a reason"
        return None

    def may_be_silent(self, verb: str) -> bool:
        """A reader that has left needs no reason; `plan` and `verify` print theirs as their result."""
        return self.out == b"(pipe)" or verb == "plan" or (verb == "verify" and bool(self.err))


def attempt(sample: Sample, home: Path, place: Path, user: str) -> Ending:
    """Run one sample in a process of its own, in a copy of `home`'s files at `place`."""
    shutil.copytree(home, place, symlinks=True)
    logs = place.with_name(f"{place.name}-logs")
    logs.mkdir()
    process = SERVER.Process(target=_child, args=(sample, str(place), str(logs), user))
    process.start()
    stack = ""
    begun = time.monotonic()
    while not (logs / "begun").exists() and process.exitcode is None and time.monotonic() < begun + PATIENCE_S:
        time.sleep(0.01)
    until = time.monotonic() + LIMIT_S
    while process.exitcode is None and time.monotonic() < until:
        process.join(0.2 if sample.words[0] == "serve" else LIMIT_S)
        if b"in a browser" in _read(logs / "out"):
            break
    if process.exitcode is None:
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(PATIENCE_S)
    if process.exitcode is None:
        os.kill(process.pid or 0, signal.SIGUSR1)
        process.join(1)
        stack = (logs / "stack").read_text() or "no stack"
    if process.exitcode is None:
        process.kill()
        process.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)  # its children, if it left any
    out = b"(pipe)" if sample.stdout == "pipe" else _read(logs / "out")
    err = _read(logs / "err").decode(errors="replace")
    ended = Ending(process.exitcode if process.exitcode is not None else -9, out, err, stack)
    process.close()
    for folder in (place, logs):
        for below, folders, _files in os.walk(folder):
            for name in folders:  # before the walk enters them: some have no permissions
                if not Path(below, name).is_symlink():
                    os.chmod(Path(below, name), 0o700)
        shutil.rmtree(folder)
    return ended


def _read(file: Path) -> bytes:
    """What the process has written so far; nothing when it has not begun yet."""
    return file.read_bytes() if file.exists() else b""


def _child(sample: Sample, place: str, logs: str, user: str) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stack = open(f"{logs}/stack", "w")  # noqa: SIM115 - open until the process ends
    faulthandler.register(signal.SIGUSR1, stack)
    _connect(sample.stdout, logs)
    os.chdir(place)
    _furnish(user)
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _set_environment(sample.environment, place)
    tempfile.tempdir = None  # it was found before TMPDIR was set
    Path(logs, "begun").touch()
    _confine((place, logs))
    os.umask(sample.umask)
    if user == "plain":
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    from gristmill.cli import main

    sys.argv = ["gristmill", *sample.words]
    main()


def _connect(stdout: str, logs: str) -> None:
    """Standard streams as the shell or the interpreter would have set them up."""
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(os.open(f"{logs}/err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    out = os.open(f"{logs}/out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if stdout == "pipe":
        reader, out = os.pipe()
        os.close(reader)
    elif stdout == "full":
        out = os.open("/dev/full", os.O_WRONLY)
    os.dup2(out, 1)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    encoding = {"ascii": "ascii", "latin": "latin-1"}.get(stdout, "utf-8")
    errors = "surrogateescape" if stdout == "latin" else "strict"
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), encoding=encoding, errors=errors)
    if stdout == "closed":
        os.close(1)
        sys.stdout = None


def _furnish(user: str) -> None:
    """Links and files with odd rights, which no copy keeps; and the plain user's ownership of the rest."""
    for name, target in (("dangling", "nowhere"), ("loop", "loop"), ("null", "/dev/null"), ("full", "/dev/full")):
        os.symlink(target, name)
    os.symlink(".", "notes/around")
    for folder in ("unreadable", "readonly"):
        Path(folder).mkdir()
        Path(folder, "inside.txt").write_text("inside")
    for file in ("unreadable.txt", "unreadable.yaml"):
        Path(file).write_text("secret: 1")
    if user == "plain":
        for folder, folders, files in os.walk("."):
            for name in (".", *folders, *files):
                os.chown(Path(folder, name), NOBODY, NOBODY, follow_symlinks=False)
        _open_python()
    for name in ("unreadable", "unreadable.txt", "unreadable.yaml"):
        os.chmod(name, 0)
    os.chmod("readonly", 0o500)


def _set_environment(changes: dict[str, str | None], place: str) -> None:
    plain = {
        "HOME": f"{place}/home",
        "TMPDIR": f"{place}/home",
        "PATH": os.environ.get("PATH", ""),
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
        "COLUMNS": "200",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "1",
        "CXX": "none",
    }
    for name in [*os.environ]:
        if name not in plain:
            del os.environ[name]
    os.environ.update(plain)
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _confine(allowed: tuple[str, ...]) -> None:
    """No network but the loopback and no writing elsewhere, by errors that the system itself could give."""
    inside = tuple(os.path.realpath(folder) for folder in allowed)

    def may_write(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return True
        real = os.path.realpath(os.fsdecode(path))
        return real.startswith(inside) or real in ("/dev/null", "/dev/full") or real.startswith("/dev/shm/")

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(args[1], tuple):
            if args[1][0] not in LOOPBACK:
                raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        elif event == "socket.getaddrinfo":
            if args[0] not in LOOPBACK:
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        elif event == "open":
            mode, flags = args[1], args[2]
            writing = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if mode is None else set(mode) & set("wax+")
            if writing and not may_write(args[0]):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), args[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            changed = args[:2] if event == "os.rename" else args[1:2]
            for path in changed:
                if not may_write(os.path.dirname(os.path.abspath(os.fsdecode(path)))):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        elif event in ("os.remove", "os.mkdir", "os.rmdir") and not isinstance(args[0], int):
            if not may_write(os.path.dirname(os.path.abspath(os.fsdecode(args[0])))):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), args[0])
        elif event in ("os.chmod", "os.truncate", "sqlite3.connect") and not may_write(args[0]):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), args[0])

    sys.addaudithook(watch)


def _open_python() -> None:
    """Where this Python is installed below a folder that only root can enter, show the plain user that part of it."""
    base = Path(sys.base_prefix).resolve()
    closed = next((p for p in reversed(base.parents) if not p.stat().st_mode & 1), None)
    if closed is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    private, bind, new_namespace = (1 << 18) | (1 << 14), 1 << 12, 0x20000

    def mount(source: Path | None, target: Path, kind: bytes | None, flags: int) -> None:
        if libc.mount(os.fsencode(source) if source else b"none", os.fsencode(target), kind, flags, None):
            raise OSError(ctypes.get_errno(), "mount")

    try:
        if libc.unshare(new_namespace):
            raise OSError(ctypes.get_errno(), "unshare")
        mount(None, Path("/"), None, private)
        held = Path("held").absolute()
        held.mkdir()
        mount(base, held, None, bind)
        mount(None, closed, b"tmpfs", 0)
        closed.chmod(0o755)
        base.mkdir(parents=True)
        mount(held, base, None, bind)
        libc.umount2(os.fsencode(held), 2)
        held.rmdir()
    except OSError:
        os._exit(NO_PYTHON)
