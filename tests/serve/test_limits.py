"""Limits beside a brute-force model: a list of all that was admitted, added up again for each question."""

import copy
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import InputError
from gristmill.serve.limits import Limits, Meter, Refusal, Reservation, duration

PERIODS = {"input_tokens_per_minute": 60, "output_tokens_per_minute": 60, "requests_per_hour": 3600}


@dataclass
class Admitted:
    at: float
    amounts: dict[str, int]
    reservation: Reservation
    is_running: bool = True


def taken(admitted: list[Admitted], name: str, now: float) -> int:
    return sum(one.amounts[name] for one in admitted if one.at + PERIODS[name] > now)


def fits(limits: Limits, admitted: list[Admitted], now: float, asked: dict[str, int]) -> bool:
    for name, limit in limits.given().items():
        if name == "parallel_requests":
            if sum(one.is_running for one in admitted) >= limit:
                return False
        elif taken(admitted, name, now) + asked[name] > limit:
            return False
    return True


limits_of = st.builds(
    Limits,
    input_tokens_per_minute=st.none() | st.integers(1, 60),
    output_tokens_per_minute=st.none() | st.integers(1, 60),
    requests_per_hour=st.none() | st.integers(1, 12),
    parallel_requests=st.none() | st.integers(1, 6),
)
waits = st.one_of(
    st.sampled_from([0.0, 30.0, 60.0, 3600.0]), st.integers(0, 800).map(lambda n: n / 8), st.floats(0, 99)
)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), waits, st.integers(0, 40), st.integers(0, 40)),
        st.tuples(st.just("finish"), waits, st.integers(0, 30), st.integers(0, 60)),
        st.tuples(st.just("release"), waits, st.integers(0, 30), st.just(0)),
    ),
    max_size=60,
)


@given(limits_of, st.floats(1e4, 1e9), operations)
def test_every_decision_is_that_of_a_brute_force_count(limits: Limits, now: float, todo: list) -> None:
    meter = Meter(limits)
    admitted: list[Admitted] = []
    for what, wait, a, b in todo:
        now += wait
        if what == "ask":
            asked = {"input_tokens_per_minute": a, "output_tokens_per_minute": b, "requests_per_hour": 1}
            before = meter.headers(now)
            answer = meter.admit(now, a, b)
            assert isinstance(answer, Reservation) == fits(limits, admitted, now, asked)
            if isinstance(answer, Reservation):
                admitted.append(Admitted(now, asked, answer))
            else:
                assert meter.headers(now) == before  # a refused request takes nothing
                check_retry(meter, answer, admitted, now, a, b)
        elif admitted:
            one = admitted[a % len(admitted)]
            if what == "finish":
                one.reservation.settle(b)
            else:
                one.reservation.release()
            if one.is_running:  # the first word counts
                one.is_running = False
                used = dict.fromkeys(PERIODS, 0) if what == "release" else {**one.amounts}
                used["output_tokens_per_minute"] = min(b, one.amounts["output_tokens_per_minute"])
                one.amounts = used
        told = meter.headers(now)
        for name in PERIODS.keys() & limits.given().keys():
            unit = name.partition("_per_")[0].replace("_", "-")
            assert told[f"x-ratelimit-remaining-{unit}"] == str(vars(limits)[name] - taken(admitted, name, now))
    for name in PERIODS.keys() & limits.given().keys():  # in any window: those that begin where something was admitted
        for start in admitted:
            inside = [o for o in admitted if start.at <= o.at < start.at + PERIODS[name]]
            assert sum(o.amounts[name] for o in inside) <= vars(limits)[name]


def check_retry(meter: Meter, refusal: Refusal, admitted: list[Admitted], now: float, a: int, b: int) -> None:
    if refusal.retry_after_s is None:  # no time helps
        assert isinstance(copy.deepcopy(meter).admit(now + 1e7, a, b), Refusal)
        return
    assert refusal.retry_after_s >= 1
    if refusal.limit == "parallel_requests":
        return  # it depends on when others end
    later = copy.deepcopy(meter)
    later.num_running = 0
    assert isinstance(copy.deepcopy(later).admit(now + refusal.retry_after_s, a, b), Reservation)
    if refusal.retry_after_s > 1:  # and it was not told to wait a second too long
        sooner = later.admit(now + refusal.retry_after_s - 1.001, a, b)
        assert isinstance(sooner, Refusal)


def test_a_refusal_names_the_strictest_limit_and_the_time() -> None:
    meter = Meter(Limits(input_tokens_per_minute=100, output_tokens_per_minute=100, requests_per_hour=2))
    assert isinstance(meter.admit(0.0, 60, 10), Reservation)
    refused = meter.admit(20.5, 60, 10)
    assert isinstance(refused, Refusal)
    assert (refused.limit, refused.retry_after_s) == ("input_tokens_per_minute", 40)
    assert "40 are left now and the request asks for 60 input tokens" in refused.message
    assert isinstance(meter.admit(20.5, 1, 10), Reservation)
    refused = meter.admit(21.0, 60, 10)  # by tokens in 40 s, by requests in an hour
    assert isinstance(refused, Refusal)
    assert (refused.limit, refused.retry_after_s) == ("requests_per_hour", 3579)


def test_what_waiting_cannot_change_has_no_time() -> None:
    refused = Meter(Limits(output_tokens_per_minute=50)).admit(0.0, 1, 51)
    assert isinstance(refused, Refusal)
    assert refused.retry_after_s is None
    assert "lower max_tokens" in refused.message


def test_the_budget_is_told_under_openais_names() -> None:
    meter = Meter(Limits(output_tokens_per_minute=100, requests_per_hour=10, parallel_requests=3))
    reservation = meter.admit(0.0, 5, 40)
    assert isinstance(reservation, Reservation)
    reservation.settle(15)
    assert meter.headers(9.5) == {
        "x-ratelimit-limit-output-tokens": "100",
        "x-ratelimit-remaining-output-tokens": "85",
        "x-ratelimit-reset-output-tokens": "51s",
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "59m51s",
        "x-ratelimit-limit-parallel-requests": "3",
        "x-ratelimit-remaining-parallel-requests": "3",
    }
    assert [duration(s) for s in (0, 0.0121, 0.9995, 1, 6.2, 360, 3600)] == [
        *("0s", "13ms", "1s", "1s", "7s", "6m0s", "60m0s")
    ]


def test_what_has_left_the_window_is_not_given_back_a_second_time() -> None:
    meter = Meter(Limits(output_tokens_per_minute=100))
    reservations = [meter.admit(at, 1, 50) for at in (0.0, 60.0)]
    for now, reservation, left in ((60.0, reservations[0], "50"), (60.0, reservations[1], "90")):
        assert isinstance(reservation, Reservation)
        reservation.settle(10)
        assert meter.headers(now)["x-ratelimit-remaining-output-tokens"] == left


def test_requests_that_are_given_back_leave_nothing_in_memory() -> None:
    meter = Meter(Limits(requests_per_hour=5))
    for _ in range(1000):
        reservation = meter.admit(0.0, 1, 1)
        assert isinstance(reservation, Reservation)
        reservation.release()
    assert len(meter._windows["requests_per_hour"]._entries) == 0
    assert meter.num_running == 0


@pytest.mark.parametrize("value", [0, -1, 2**63])
def test_a_limit_that_cannot_be_is_refused(value: int) -> None:
    with pytest.raises(InputError, match=r"requests_per_hour=.* must be from 1"):
        Limits(requests_per_hour=value)
