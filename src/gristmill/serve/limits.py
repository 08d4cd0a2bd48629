"""What a key may ask for: tokens a minute, requests an hour, requests at once. Pure: time is passed in, nothing waits.

    meter = Meter(Limits(output_tokens_per_minute=10_000))
    match meter.admit(now, input_tokens=12, max_tokens=500):
        case Reservation() as reservation: ...; reservation.settle(output_tokens=80)
        case Refusal(retry_after_s=seconds): ...

A limit holds in every window of its length, wherever that begins: sums are taken over the last 60 seconds (or the last
hour), not in a bucket that fills up. A bucket lets its whole size through at once and then what has flowed in, so
nearly twice the limit within one window; a calendar minute does the same around its end. The price is an entry in
memory for each request of the window.

What counts is when a request was admitted: `max_tokens` of output are taken then, and what was not said is given back
at the end. So the time at which there will be room again is known, to the second, and is told.
"""

import math
from collections import deque
from dataclasses import dataclass, field

from gristmill.errors import InputError

MINUTE_S, HOUR_S = 60.0, 3600.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """None is no limit. All of them hold: the strictest wins."""

    input_tokens_per_minute: int | None = None
    output_tokens_per_minute: int | None = None
    requests_per_hour: int | None = None
    parallel_requests: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            if not 1 <= value < 2**63:
                raise InputError(f"{name}={value} must be from 1 to {2**63 - 1}; leave it out for no limit")

    def given(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in self.given().items()) or "no limits"


@dataclass(eq=False, slots=True)
class Entry:
    """Taken from a window until `expires`; `amount` is what of it was not given back."""

    expires: float
    amount: int


class Window:
    """So much in any `period_s`: entries in the order of their ends."""

    def __init__(self, name: str, unit: str, limit: int, period_s: float) -> None:
        self.name, self.unit, self.limit, self.period_s = name, unit, limit, period_s
        self._entries: deque[Entry] = deque()
        self._taken = 0

    def remaining(self, now: float) -> int:
        while self._entries and self._entries[0].expires <= now:
            entry = self._entries.popleft()
            self._taken -= entry.amount
            entry.amount = 0  # nothing is left of it that could be given back
        return self.limit - self._taken

    def free_at(self, now: float, amount: int) -> float:
        """When there will be room for so much, if nothing else comes; `now` if there is."""
        missing, at = amount - self.remaining(now), now
        entries = iter(self._entries)
        while missing > 0:
            entry = next(entries)
            missing, at = missing - entry.amount, entry.expires
        return at

    def take(self, now: float, amount: int) -> Entry:
        entry = Entry(now + self.period_s, amount)
        if amount:
            self._entries.append(entry)
            self._taken += amount
        return entry

    def give_back(self, entry: Entry, amount: int) -> None:
        amount = min(amount, entry.amount)
        entry.amount -= amount
        self._taken -= amount
        while self._entries and not self._entries[-1].amount:  # or an hour of them would pile up
            self._entries.pop()

    def empty_at(self, now: float) -> float:
        return self._entries[-1].expires if self._entries else now


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """message: which limit, and what to do. retry_after_s: None when no time will help: it asks for more than a whole
    window holds. For a place among the parallel requests, which comes when another ends, 1 is a guess."""

    limit: str
    message: str
    retry_after_s: int | None


@dataclass(eq=False)
class Reservation:
    """A request on its way. Exactly one of `settle` and `release` counts: the first."""

    meter: "Meter"
    max_tokens: int
    taken: dict[str, Entry]
    is_open: bool = field(default=True, init=False)

    def settle(self, output_tokens: int) -> None:
        """It is complete: what it did not say goes back."""
        self._close({"output_tokens_per_minute": max(0, self.max_tokens - output_tokens)})

    def release(self) -> None:
        """It was not begun after all: everything goes back."""
        self._close({name: entry.amount for name, entry in self.taken.items()})

    def _close(self, credit: dict[str, int]) -> None:
        if self.is_open:
            self.is_open = False
            self.meter.close(self, credit)


class Meter:
    """One key's. `now` is seconds of any clock that does not run backward."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_running = 0
        windows = (
            Window("input_tokens_per_minute", "input tokens", limits.input_tokens_per_minute or 0, MINUTE_S),
            Window("output_tokens_per_minute", "output tokens", limits.output_tokens_per_minute or 0, MINUTE_S),
            Window("requests_per_hour", "requests", limits.requests_per_hour or 0, HOUR_S),
        )
        self._windows = {window.name: window for window in windows if window.limit}

    def admit(self, now: float, input_tokens: int, max_tokens: int) -> Reservation | Refusal:
        """max_tokens: of all answers together. A refusal takes nothing."""
        asked = {
            "input_tokens_per_minute": input_tokens,
            "output_tokens_per_minute": max_tokens,
            "requests_per_hour": 1,
        }
        if refusal := self._refusal(now, asked):
            return refusal
        self.num_running += 1
        return Reservation(self, max_tokens, {name: w.take(now, asked[name]) for name, w in self._windows.items()})

    def close(self, reservation: Reservation, credit: dict[str, int]) -> None:
        self.num_running -= 1
        for name, amount in credit.items():
            if name in self._windows:
                self._windows[name].give_back(reservation.taken[name], amount)

    def headers(self, now: float) -> dict[str, str]:
        """The budgets under OpenAI's names, with input and output tokens apart. `reset`: when all of it is there."""
        told = {}
        for window in self._windows.values():
            name = window.unit.replace(" ", "-")
            told[f"x-ratelimit-limit-{name}"] = str(window.limit)
            told[f"x-ratelimit-remaining-{name}"] = str(window.remaining(now))
            told[f"x-ratelimit-reset-{name}"] = duration(window.empty_at(now) - now)
        if (most := self.limits.parallel_requests) is not None:
            told["x-ratelimit-limit-parallel-requests"] = str(most)
            told["x-ratelimit-remaining-parallel-requests"] = str(most - self.num_running)
        return told

    def _refusal(self, now: float, asked: dict[str, int]) -> Refusal | None:
        for window in self._windows.values():
            if asked[window.name] > window.limit:
                message = (
                    f"the request asks for {asked[window.name]:,} {window.unit} and the key's limit is "
                    f"{window.name}={window.limit:,}, which waiting does not change; "
                    + ("lower max_tokens or n" if "output" in window.name else "shorten the prompt")
                )
                return Refusal(limit=window.name, message=message, retry_after_s=None)
        last = max(self._windows.values(), key=lambda w: w.free_at(now, asked[w.name]), default=None)
        if last is not None and (at := last.free_at(now, asked[last.name])) > now:
            seconds = math.ceil(at - now)
            message = (
                f"the key's limit is {last.name}={last.limit:,}: {last.remaining(now):,} are left now and the request "
                f"asks for {asked[last.name]:,} {last.unit}; try again in {seconds} s"
            )
            return Refusal(limit=last.name, message=message, retry_after_s=seconds)
        most = self.limits.parallel_requests
        if most is not None and self.num_running >= most:
            message = f"the key's limit is parallel_requests={most:,}, and so many are running; try again when one ends"
            return Refusal(limit="parallel_requests", message=message, retry_after_s=1)
        return None


def duration(seconds: float) -> str:
    """As OpenAI writes it, rounded up: "0s", "120ms", "7s", "6m0s", "59m59s"."""
    if 0 < seconds <= 0.999:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
