"""The gate: who may come in, for how much, and what was used. Without a database it is open to all.

    tenant = await gate.identify(request.headers.get("authorization"))            # on every route; raises 401
    admission = await gate.admit(tenant, model, input_tokens, max_tokens)         # raises 429, 400 or 503
    ...                                                                           # its headers go into the answer
    await admission.finish(input_tokens, output_tokens)                           # then the last byte goes out
    admission.release()                                                           # instead, if it never began

For one event loop. `identify` reads one row of the database, in a thread, so that a key works from the moment of its
creation to that of its revocation. `admit` waits for nothing, and `finish` for the commit of usage.py. Limits are
counted in this process; usage is in the database, for all processes.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime

from gristmill.errors import Failure
from gristmill.serve.database import Database
from gristmill.serve.errors import ApiError, overloaded
from gristmill.serve.keys import find
from gristmill.serve.limits import Meter, Refusal, Reservation
from gristmill.serve.usage import Prices, Usage, Used, used


class Admission:
    """A request that may run. The first `finish` or `release` counts; a later one changes nothing.

    headers: of its answer, such as the rest of the budget. reservation, record: None at an open gate.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        reservation: Reservation | None = None,
        record: "Callable[[int, int], Future[None]] | None" = None,
    ) -> None:
        self.headers = headers
        self._reservation, self._record = reservation, record

    async def finish(self, input_tokens: int, output_tokens: int) -> None:
        """The request has ended, or was broken off: its tokens count. Returns when they are on the disk; they are
        written even if nobody waits any more. Raises Failure when the server ends and they could not be written."""
        if self._reservation is None or self._record is None or not self._reservation.is_open:
            return
        self._reservation.settle(output_tokens)
        await asyncio.wrap_future(self._record(input_tokens, output_tokens))

    def release(self) -> None:
        """Nothing was computed: the request does not count at all."""
        if self._reservation is not None:
            self._reservation.release()


class Gate:
    """database: of the keys; None is open to all. clock: seconds that never run backward.

    Every method refuses by raising an ApiError.
    """

    def __init__(
        self,
        database: Database | None = None,
        prices: Prices | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database, self._clock = database, clock
        self._usage = None if database is None else Usage(database, prices or Prices())
        self._meters: dict[str, Meter] = {}  # of all keys that have come, by their ids
        self._operators: set[str] = set()  # ids of those among them that have this scope

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return self._database is None

    @property
    def problem(self) -> str | None:
        """Why no request can be admitted now, for clients; None when they can. The log has the reason."""
        if self._database is None or self._usage is None:
            return None
        is_fine = self._usage.problem is None and self._database.is_in_place
        return None if is_fine else "usage cannot be recorded now; try again later"

    async def identify(self, authorization: str | None) -> str:
        """Return the id of the key in a header, `Bearer gm-...`; empty at an open gate."""
        if self._database is None:
            return ""
        if authorization is None:
            raise _unauthorized("no key was given; send the header `Authorization: Bearer gm-...`")
        scheme, _, given = authorization.partition(" ")
        try:
            key = await asyncio.to_thread(find, self._database, given.strip()) if scheme.lower() == "bearer" else None
        except Failure as failure:
            raise overloaded("keys cannot be looked up now; try again later", retry_after_s=5) from failure
        if key is None:
            raise _unauthorized("the key is not one of this server's; `gristmill keys create NAME` makes one")
        if key.revoked is not None:
            raise _unauthorized(f"the key {key.label} was revoked on {key.revoked:%Y-%m-%d}; ask for a new one")
        self._meters.setdefault(key.id, Meter(key.limits))
        if key.is_operator:
            self._operators.add(key.id)
        return key.id

    def is_operator(self, tenant: str) -> bool:
        """Whether it may read the figures of the whole server."""
        return self.is_open or tenant in self._operators

    async def used(self, tenant: str) -> Sequence[Used]:
        """Return its own usage, by day and model."""
        if self._database is None:
            return ()
        try:
            return await asyncio.to_thread(used, self._database, tenant)
        except Failure as failure:
            raise overloaded("usage cannot be looked up now; try again later", retry_after_s=5) from failure

    def most_tokens(self, tenant: str) -> int | None:
        """The most tokens that a request of this key may ask for; None has no bound."""
        return None if self.is_open else self._meters[tenant].limits.output_tokens_per_minute

    async def admit(self, tenant: str, model: str, input_tokens: int, max_tokens: int) -> Admission:
        """tenant: of `identify`. max_tokens: of all answers together."""
        if self._usage is None:
            return Admission({})
        if (problem := self.problem) is not None:  # work that could not be accounted for is not begun
            raise overloaded(problem, retry_after_s=5)
        usage, now, meter = self._usage, self._clock(), self._meters[tenant]
        match meter.admit(now, input_tokens, max_tokens):
            case Refusal(message=message, retry_after_s=None):
                raise ApiError(400, message, code="request_exceeds_limit", headers=meter.headers(now))
            case Refusal(message=message, retry_after_s=seconds):
                headers = {"retry-after": str(seconds), **meter.headers(now)}
                raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)
            case Reservation() as reservation:
                pass

        def record(input_tokens: int, output_tokens: int) -> "Future[None]":
            today = datetime.now(UTC).date().isoformat()
            return usage.record(tenant, model, today, input_tokens, output_tokens)

        return Admission(meter.headers(now), reservation, record)

    def close(self) -> None:
        """Write the rest of the usage, which may take a moment. Raises Failure when that fails."""
        if self._usage is not None:
            self._usage.close()


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
