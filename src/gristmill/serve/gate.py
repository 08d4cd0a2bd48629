"""Who may ask, and for how much: what the server wants of keys and limits, and the gate that is open to all."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gristmill.serve.usage import Used


class Refused(Exception):
    """For the answer: HTTP's status, a message, a code for programs, headers."""

    def __init__(self, status: int, message: str, *, code: str, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


class Admission(Protocol):
    """A request that may go on. `headers`: of its answer, such as what is left of the budget."""

    headers: Mapping[str, str]

    async def finish(self, input_tokens: int, output_tokens: int) -> None:
        """It has ended, in whatever way; called once. Returns when that cannot be lost any more."""

    def release(self) -> None:
        """It was not begun after all."""


class Gate(Protocol):
    @property
    def is_open(self) -> bool:
        """To all, without a key."""

    @property
    def problem(self) -> str | None:
        """Why requests cannot be admitted now; None when they can."""

    async def identify(self, authorization: str | None) -> str:
        """Whose key this is: the tenant. Raises Refused (401) for none or a wrong one."""

    def is_operator(self, tenant: str) -> bool:
        """Whether it may read the figures of the whole server."""

    async def used(self, tenant: str) -> "Sequence[Used]":
        """Its own usage, by day and model."""

    def most_tokens(self, tenant: str) -> int | None:
        """What a request may ask for at most; None is any number."""

    async def admit(self, tenant: str, model: str, input_tokens: int, max_tokens: int) -> Admission:
        """max_tokens: of all answers together. Raises Refused (429) when it exceeds a limit."""

    def close(self) -> None:
        """Writes what is left."""


class Open:
    """No keys: for a server that only this machine can reach."""

    is_open, problem = True, None

    async def identify(self, authorization: str | None) -> str:
        return ""

    def is_operator(self, tenant: str) -> bool:
        return True

    async def used(self, tenant: str) -> "Sequence[Used]":
        return ()

    def most_tokens(self, tenant: str) -> int | None:
        return None

    async def admit(self, tenant: str, model: str, input_tokens: int, max_tokens: int) -> "Free":
        return Free()

    def close(self) -> None:
        pass


class Free:
    """Without limits; nothing is written down."""

    headers: Mapping[str, str] = {}

    async def finish(self, input_tokens: int, output_tokens: int) -> None:
        pass

    def release(self) -> None:
        pass
