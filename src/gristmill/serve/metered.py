"""The gate of a server with keys: who may come in, how much for, and what was used at the end.

    tenant = await gate.identify(request.headers.get("authorization"))            # on every route; Refused is 401
    admission = await gate.admit(tenant, model, input_tokens, max_tokens)         # Refused is 429, 400 or 503
    ...                                                                           # its headers go into the answer
    await admission.finish(input_tokens, output_tokens)                           # then the last byte goes out
    admission.release()                                                           # instead, if it was never begun

For one event loop. `identify` reads one row of the database, in a thread, so that a key works from the moment of its
creation to that of its revocation. `admit` waits for nothing, and `finish` for the commit of usage.py. Limits are
counted in this process; usage is the database's, of all processes.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from gristmill.errors import Failure
from gristmill.serve.database import Database
from gristmill.serve.gate import Refused
from gristmill.serve.keys import find
from gristmill.serve.limits import Meter, Refusal, Reservation
from gristmill.serve.usage import Prices, Usage, Used, used


class Admission:
    """A request that may run. The first `finish` or `release` counts; a later one changes nothing."""

    def __init__(
        self, usage: Usage, row: tuple[str, str], reservation: Reservation, headers: Mapping[str, str]
    ) -> None:
        self.headers = headers
        self._usage, self._row, self._reservation = usage, row, reservation

    async def finish(self, input_tokens: int, output_tokens: int) -> None:
        """It has ended, or was broken off: what was said counts. Returns when that is on the disk, and is written
        even if nobody waits for it any more. Raises Failure when the server ends and it could not be written."""
        if not self._reservation.is_open:
            return
        self._reservation.settle(output_tokens)
        today = datetime.now(UTC).date().isoformat()
        await asyncio.wrap_future(self._usage.record(*self._row, today, input_tokens, output_tokens))

    def release(self) -> None:
        """Nothing of it was computed: it does not count at all."""
        self._reservation.release()


class Metered:
    """clock: seconds that never run backward."""

    is_open = False

    def __init__(
        self, database: Database, prices: Prices | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database, self._clock = database, clock
        self._usage = Usage(database, prices or Prices())
        self._meters: dict[str, Meter] = {}  # of all keys that have come, by their ids
        self._operators: set[str] = set()  # ids of those among them that have this scope

    @property
    def problem(self) -> str | None:
        """What to tell clients when no request can be admitted; None when they can. The log has the reason."""
        if self._usage.problem is None and self._database.is_in_place:
            return None
        return "usage cannot be recorded now; try again later"

    async def identify(self, authorization: str | None) -> str:
        """authorization: the header, `Bearer gm-...`. The key's id. Raises Refused."""
        if authorization is None:
            raise _unauthorized("no key was given; send the header `Authorization: Bearer gm-...`")
        scheme, _, given = authorization.partition(" ")
        try:
            key = await asyncio.to_thread(find, self._database, given.strip()) if scheme.lower() == "bearer" else None
        except Failure as failure:
            raise _unavailable("keys cannot be looked up now; try again later") from failure
        if key is None:
            raise _unauthorized("the key is not one of this server's; `gristmill keys create NAME` makes one")
        if key.revoked is not None:
            raise _unauthorized(f"the key {key.label} was revoked on {key.revoked:%Y-%m-%d}; ask for a new one")
        self._meters.setdefault(key.id, Meter(key.limits))
        if key.is_operator:
            self._operators.add(key.id)
        return key.id

    def is_operator(self, tenant: str) -> bool:
        return tenant in self._operators

    async def used(self, tenant: str) -> Sequence[Used]:
        """Raises Refused when the database does not answer."""
        try:
            return await asyncio.to_thread(used, self._database, tenant)
        except Failure as failure:
            raise _unavailable("usage cannot be looked up now; try again later") from failure

    def most_tokens(self, tenant: str) -> int | None:
        """What a request of this key may ask for at most, and the largest default of one that says nothing; None is
        any number."""
        return self._meters[tenant].limits.output_tokens_per_minute

    async def admit(self, tenant: str, model: str, input_tokens: int, max_tokens: int) -> Admission:
        """tenant: of `identify`. max_tokens: of all answers together. Raises Refused."""
        if (problem := self.problem) is not None:  # work that could not be accounted for is not begun
            raise _unavailable(problem)
        now, meter = self._clock(), self._meters[tenant]
        match meter.admit(now, input_tokens, max_tokens):
            case Refusal(message=message, retry_after_s=None):
                raise Refused(400, message, code="request_exceeds_limit", headers=meter.headers(now))
            case Refusal(message=message, retry_after_s=seconds):
                headers = {"retry-after": str(seconds), **meter.headers(now)}
                raise Refused(429, message, code="rate_limit_exceeded", headers=headers)
            case Reservation() as reservation:
                return Admission(self._usage, (tenant, model), reservation, meter.headers(now))

    def close(self) -> None:
        """Writes what is left; it may take a moment. Raises Failure when it cannot be written."""
        self._usage.close()


def _unauthorized(message: str) -> Refused:
    return Refused(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _unavailable(message: str) -> Refused:
    return Refused(503, message, code="overloaded", headers={"retry-after": "5"})
