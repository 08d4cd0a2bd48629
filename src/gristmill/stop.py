"""The request to stop. A signal sets it; long computations check it and end early."""

import signal


class StopRequested(Exception):
    """A computation ended early because a stop was requested."""


class Stop:
    """Whether a stop was requested, and by which signal. Any thread may set it or check it.

    Unlike `threading.Event` it holds no lock, so a signal handler can set it while the same thread is checking it.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def set(self, signum: int = signal.SIGTERM) -> None:
        self.signum = signum

    def is_set(self) -> bool:
        return self.signum is not None

    def raise_if_set(self) -> None:
        """Raises StopRequested if a stop was requested."""
        if self.is_set():
            raise StopRequested
