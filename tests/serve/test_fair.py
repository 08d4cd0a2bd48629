"""Fair turns: bounds that hold for any requests in any order, and what one key can do to another."""

from collections import Counter, deque
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from gristmill.inference.scheduler import EngineConfig, Job, Scheduler
from gristmill.serve.fair import FairQueue, Turn

KEYS = "abcd"
pushes = st.tuples(st.sampled_from(KEYS), st.integers(1, 50))


@given(st.lists(st.one_of(pushes, st.just("pop"), st.tuples(st.just("drop"), st.integers(0, 99))), max_size=200))
def test_nothing_is_lost_or_comes_twice_and_each_key_keeps_its_order(todo: list) -> None:
    fair: FairQueue[int] = FairQueue(1000)
    waiting: dict[str, deque[int]] = {key: deque() for key in KEYS}
    for number, what in enumerate(todo):
        if what == "pop":
            turn = fair.pop()
            assert (turn is None) == (not any(waiting.values()))
            if turn is not None:
                assert turn.item == waiting[turn.key].popleft()
        elif what[0] == "drop":
            owner = next((key for key in KEYS if what[1] in waiting[key]), None)
            assert fair.remove(owner or "a", what[1]) == (owner is not None)
            if owner:
                waiting[owner].remove(what[1])
        else:
            assert fair.push(what[0], number, what[1]) is None
            waiting[what[0]].append(number)
        assert len(fair) == sum(map(len, waiting.values()))


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=20, max_size=20), min_size=2, max_size=4),
    st.lists(pushes, max_size=20),
    st.integers(0, 10),
)
def test_keys_that_wait_all_the_time_get_the_same_within_a_request_of_each(
    costs: list[list[int]], before: list[tuple[str, int]], popped: int
) -> None:
    fair: FairQueue[int] = FairQueue(1000)
    for key, cost in before:  # whatever was before
        fair.push(key, 0, cost)
    left = Counter(key for key, _ in before)
    for turn in [fair.pop() for _ in range(min(popped, len(before)))]:
        assert turn is not None
        left[turn.key] -= 1
    for key, row in zip(KEYS, costs, strict=False):
        left[key] += len(row)
        for cost in row:
            fair.push(key, 1, cost)
    keys = KEYS[: len(costs)]
    largest = {key: max([*row, *(c for k, c in before if k == key)]) for key, row in zip(keys, costs, strict=False)}
    served: Counter[str] = Counter()
    history: list[Counter[str]] = [Counter()]
    while turn := fair.pop():
        served[turn.key] += turn.cost
        left[turn.key] -= 1
        history.append(Counter(served))
        if not all(left[key] > 0 for key in keys):
            break
    for a in keys:
        for b in keys:
            ahead = [past[a] - past[b] for past in history]  # over any stretch: its end less its beginning
            assert max(ahead) - min(ahead) <= largest[a] + largest[b]


@given(st.lists(pushes, min_size=1, max_size=100), st.integers(0, 100), st.integers(1, 10**6))
def test_a_new_keys_request_waits_for_one_of_each_other_key_at_most(
    others: list[tuple[str, int]], popped: int, cost: int
) -> None:
    fair: FairQueue[str] = FairQueue(1000)
    for key, amount in others:
        fair.push(key, "theirs", amount)
    for _ in range(popped):
        fair.pop()
    fair.push("new", "mine", cost)
    before: list[str] = []
    while (turn := fair.pop()) and turn.item != "mine":
        before.append(turn.key)
    assert turn is not None
    assert len(before) == len(set(before))


def test_one_request_passes_a_thousand_of_another_key() -> None:
    fair: FairQueue[str] = FairQueue(2000)
    for number in range(1000):
        fair.push("many", f"many {number}", 500)
    for _ in range(10):
        fair.pop()
    fair.push("one", "one", 500)
    assert "one" in [turn.item for turn in (fair.pop(), fair.pop()) if turn]


def test_what_a_request_did_not_use_is_not_held_against_its_key() -> None:
    fair: FairQueue[None] = FairQueue(10_000)
    for _ in range(1000):
        fair.push("wide", None, 100)  # says max_tokens=90, and stops after none
        fair.push("exact", None, 10)
    used: Counter[str] = Counter()
    for _ in range(1000):
        turn = fair.pop()
        assert turn is not None
        used[turn.key] += 10
        if turn.key == "wide":
            fair.credit("wide", 90)
    assert abs(used["wide"] - used["exact"]) <= 110


def test_nobody_saves_up_turns_by_being_away() -> None:
    fair: FairQueue[int] = FairQueue(1000)
    for number in range(500):
        fair.push("busy", number, 10)
    for _ in range(300):
        fair.pop()
    for number in range(200):
        fair.push("back", number, 10)
    turns = [turn.key for turn in (fair.pop() for _ in range(100)) if turn]
    assert 49 <= turns.count("back") <= 51


def test_a_key_that_sends_one_large_request_after_another_gets_no_more_than_its_share() -> None:
    fair: FairQueue[int] = FairQueue(2000)
    for number in range(1000):
        fair.push("small", number, 10)
    fair.push("large", 0, 1000)
    given: Counter[str] = Counter()
    while (turn := fair.pop()) and sum(given.values()) < 15_000:
        given[turn.key] += turn.cost
        if turn.key == "large":
            fair.push("large", 0, 1000)  # it never has two that wait, and is away at the moment of its turn
    assert abs(given["small"] - given["large"]) <= 1010


def test_what_was_used_before_a_pause_is_forgotten() -> None:
    fair: FairQueue[int] = FairQueue(1000)
    fair.push("a", 0, 10**6)
    fair.pop()
    assert fair.pop() is None
    for number in range(20):
        fair.push("b", number, 10)
        fair.push("a", number, 10)
    turns = [turn.key for turn in (fair.pop() for _ in range(20)) if turn]
    assert turns.count("a") == 10


@given(st.lists(st.one_of(pushes, st.just("pop")), max_size=120))
def test_a_full_queue_gives_up_the_last_of_the_longest(todo: list) -> None:
    fair: FairQueue[int] = FairQueue(6)
    waiting: dict[str, list[int]] = {key: [] for key in KEYS}
    for number, what in enumerate(todo):
        if what == "pop":
            if turn := fair.pop():
                waiting[turn.key].remove(turn.item)
            continue
        waiting[what[0]].append(number)
        displaced = fair.push(what[0], number, what[1])
        assert (displaced is None) == (sum(map(len, waiting.values())) <= 6)
        if displaced is not None:
            longest = next(key for key in KEYS if displaced in waiting[key])
            assert waiting[longest].pop() == displaced
            assert all(len(waiting[longest]) + 1 >= len(other) for other in waiting.values())
            if longest != what[0]:  # others give way to who has less than they
                assert len(waiting[longest]) >= len(waiting[what[0]])
        assert len(fair) <= 6


def test_a_turn_says_whose_it_is_and_what_it_cost() -> None:
    fair: FairQueue[str] = FairQueue(1)
    fair.push("k", "x", 7)
    assert fair.pop() == Turn("k", "x", 7)
    assert fair.pop() is None


def run(scheduler: Scheduler, fair: FairQueue[Job], late: dict[int, list[Job]], until: list[Job]) -> int:
    """Steps until these are done. late: jobs of the key "few" by the step of their arrival."""
    steps = 0
    while any(job.finish is None for job in until):
        for job in late.get(steps, ()):
            fair.push("few", job, len(job.prompt) + job.max_tokens)
        while scheduler.has_room and (turn := fair.pop()):
            scheduler.submit([turn.item])
        plan = scheduler.schedule()
        scheduler.postprocess(plan, [1 for part in plan.parts if part.samples])
        steps += 1
    return steps


CFG = EngineConfig(cache_tokens=1024, block_tokens=16, token_budget=64, max_running=8, prefix_cache=False)


def some_jobs(count: int, seed: int) -> list[Job]:
    chance = Random(seed)
    return [Job(prompt=range(chance.randint(1, 100)), max_tokens=chance.randint(1, 40)) for _ in range(count)]


def test_before_the_engine_a_thousand_requests_do_not_keep_another_keys_waiting() -> None:
    fair, many, few = FairQueue[Job](2000), some_jobs(1000, 0), some_jobs(3, 1)
    for job in many:
        fair.push("many", job, len(job.prompt) + job.max_tokens)
    steps = run(Scheduler(CFG), fair, {100: few}, few) - 100
    assert sum(job.finish is None for job in many) > 900  # which in the order of arrival would be done before
    assert steps < 3 * 40  # no more than what runs, what they wait for in turn, and they themselves


def test_what_waits_outside_of_the_engine_takes_no_step_more_than_within() -> None:
    inside = Scheduler(CFG)
    jobs = some_jobs(300, 2)
    inside.submit(jobs)
    alone = run(inside, FairQueue(1), {}, jobs)
    fair, jobs = FairQueue[Job](300), some_jobs(300, 2)
    for job in jobs:
        fair.push("many", job, len(job.prompt) + job.max_tokens)
    assert run(Scheduler(CFG), fair, {}, jobs) <= alone


def test_long_prompts_do_not_pile_up_in_the_engine_before_another_keys() -> None:
    cfg = EngineConfig(cache_tokens=16384, block_tokens=16, token_budget=64, max_running=64, prefix_cache=False)
    fair, few = FairQueue[Job](2000), [Job(prompt=range(10), max_tokens=1)]
    for _ in range(200):
        fair.push("many", Job(prompt=range(200), max_tokens=1), 201)
    assert run(Scheduler(cfg), fair, {50: few}, few) - 50 <= 10  # 64 of them would take 200 steps
