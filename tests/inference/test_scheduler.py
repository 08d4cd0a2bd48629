"""The scheduler alone: its "model" says a number that depends on the sequence, and nothing is computed."""

import random
from collections import Counter

import pytest

from gristmill.errors import Failure, InputError
from gristmill.inference.scheduler import EngineConfig, Job, Plan, QueueFull, Scheduler


def config(**changes: int | bool) -> EngineConfig:
    return EngineConfig(**{"cache_tokens": 64, "block_tokens": 4, "token_budget": 16, "max_running": 4, **changes})  # type: ignore[arg-type]


def says(job: Job) -> int:
    """The next id: as a model's, a function of all before it."""
    return (sum(job.ids) * 31 + len(job.ids)) % 50


def step(scheduler: Scheduler) -> Plan:
    plan = scheduler.schedule()
    scheduler.postprocess(plan, [says(part.job) for part in plan.parts if part.samples])
    return plan


def job(length: int, max_tokens: int = 4, first: int = 0, **changes: int) -> Job:
    return Job(prompt=[first + i for i in range(length)], max_tokens=max_tokens, **changes)  # type: ignore[arg-type]


def finished(scheduler: Scheduler, *jobs: Job) -> list[list[int]]:
    scheduler.submit(jobs)
    while any(j.finish is None for j in jobs):
        step(scheduler)
    return [j.ids for j in jobs]


def check_plan(scheduler: Scheduler, plan: Plan) -> None:
    cfg = scheduler.cfg
    assert sum(part.end - part.start for part in plan.parts) <= cfg.token_budget
    assert len(plan.parts) == len({id(part.job) for part in plan.parts}) <= cfg.max_running
    for part in plan.parts:
        job = part.job
        assert job in scheduler.running
        assert job.num_computed == part.start < part.end <= len(job.ids)
        assert len(job.blocks) * cfg.block_tokens >= part.end
        assert part.samples == (part.end == len(job.ids) and job.num_made < job.max_tokens)
    planned = {id(part.job) for part in plan.parts}
    assert all(id(j) in planned for j in scheduler.running if j.is_decoding)  # each gets its next token
    if scheduler.running:  # the first of all is in the step, whatever else is
        assert id(min([*scheduler.running, *scheduler.waiting])) in planned


def check_state(scheduler: Scheduler, alive: set[Job]) -> None:
    assert set(scheduler.running) | set(scheduler.waiting) == alive
    assert len(scheduler.running) + len(scheduler.waiting) == len(alive)
    assert scheduler.running == sorted(scheduler.running)
    assert all(not job.blocks and job.num_computed == 0 for job in scheduler.waiting)
    blocks = scheduler.blocks
    counts = Counter(block for job in scheduler.running for block in job.blocks)
    assert [counts[block] for block in range(blocks.num_blocks)] == blocks._holders
    assert blocks.available == blocks.num_blocks - len(counts)
    for block, sharers in counts.items():  # only full blocks are shared, by sequences that have all of it alike
        if sharers > 1:
            places = {
                (tuple(j.ids[: (j.blocks.index(block) + 1) * 4]), j.salt)
                for j in scheduler.running
                if block in j.blocks
            }
            assert len(places) == 1
            assert all(
                j.num_computed >= (j.blocks.index(block) + 1) * 4 for j in scheduler.running if block in j.blocks
            )


def test_10000_random_operations_keep_every_promise_and_all_sequences_end() -> None:
    operations, preemptions = 0, 0
    for seed in range(25):
        chance = random.Random(seed)
        cfg = config(
            cache_tokens=chance.choice((32, 48, 96)),
            token_budget=chance.choice((4, 7, 16)),
            max_running=chance.choice((1, 3, 4)),
            priority_steps=chance.choice((0, 10, 40)),
            max_waiting=30,
            prefix_cache=chance.random() < 0.7,
        )
        scheduler, alive, everyone = Scheduler(cfg), set[Job](), []
        for _ in range(400):
            operations += 1
            draw = chance.random()
            if draw < 0.25:
                length = chance.randint(1, 24)
                new = job(
                    length,
                    chance.randint(0, 32 - length),
                    chance.choice((0, 0, 9)),
                    priority=chance.choice((0, 0, 1, 3)),
                )
                new.salt = chance.choice(("", "", "other"))
                try:
                    scheduler.submit([new])
                    alive.add(new)
                    everyone.append(new)
                except QueueFull:
                    assert len(scheduler.waiting) >= 30  # more where some were put back
            elif draw < 0.28 and alive:
                gone = chance.choice(sorted(alive))
                scheduler.finish(gone, "cancelled")
                alive.remove(gone)
            else:
                plan = scheduler.schedule()
                assert plan.parts or not alive
                check_plan(scheduler, plan)
                scheduler.postprocess(plan, [says(part.job) for part in plan.parts if part.samples])
                alive -= {job for job in alive if job.finish is not None}
            check_state(scheduler, alive)
        for _ in range(2000):
            if not alive:
                break
            step(scheduler)
            alive -= {job for job in alive if job.finish is not None}
        assert scheduler.is_idle
        check_state(scheduler, set())
        preemptions += sum(job.num_preemptions for job in everyone)
        for done in everyone:
            assert done.num_made == done.max_tokens or done.finish == "cancelled"
            again = Job(prompt=done.prompt, max_tokens=0)  # whatever happened on the way, the same ids were made
            for id in done.ids[len(done.prompt) :]:
                assert id == says(again)
                again.ids.append(id)
    assert operations == 10_000
    assert preemptions > 100


def test_a_long_prompt_goes_in_chunks_while_others_get_a_token_in_every_step() -> None:
    scheduler = Scheduler(config(cache_tokens=256))
    talking, long = job(3, 40), job(100, 1)
    scheduler.submit([talking])
    step(scheduler)
    scheduler.submit([long])
    chunks = []
    while long.finish is None:
        before = talking.num_made
        plan = step(scheduler)
        assert talking.num_made == before + 1
        chunks += [part.end - part.start for part in plan.parts if part.job is long]
    assert chunks == [15] * 6 + [10]


def test_of_equal_priority_the_earlier_one_starts_first_and_an_urgent_one_passes() -> None:
    scheduler = Scheduler(config(max_running=1))
    jobs = [job(2, 3, priority=1) for _ in range(3)]
    scheduler.submit(jobs)
    step(scheduler)
    urgent = job(2, 3, priority=0)
    scheduler.submit([urgent])
    done: list[Job] = []
    while len(done) < 4:
        step(scheduler)
        done += [j for j in (*jobs, urgent) if j.finish and j not in done]
    assert done == [urgent, *jobs]
    assert jobs[0].num_preemptions == 1


def test_under_a_stream_of_urgent_ones_the_others_have_their_turn() -> None:
    scheduler = Scheduler(config(max_running=1, priority_steps=20))
    patient = job(2, 2, priority=2)
    scheduler.submit([patient])
    steps = 0
    while patient.finish is None:
        scheduler.submit([job(2, 2)])
        step(scheduler)
        steps += 1
    assert 40 <= steps <= 90  # 2 levels are 40 steps; then those that came before


def test_preempted_sequences_come_back_and_end_with_the_same_ids() -> None:
    roomy, tight = Scheduler(config(cache_tokens=400)), Scheduler(config(cache_tokens=32, prefix_cache=False))
    wanted = finished(roomy, *(job(6, 20, first) for first in (0, 5, 9)))
    jobs = [job(6, 20, first) for first in (0, 5, 9)]
    assert finished(tight, *jobs) == wanted
    assert sum(j.num_preemptions for j in jobs) > 0
    assert jobs[0].num_preemptions == 0  # the first one never waits for those behind it


def test_prompts_of_one_tenant_that_begin_alike_share_blocks_and_those_of_two_do_not() -> None:
    scheduler = Scheduler(config(cache_tokens=200))
    finished(scheduler, job(18, 1))
    same, longer, other = job(18, 1), job(40, 1), job(18, 1)
    other.salt = "other"
    scheduler.submit([same, longer, other])
    plan = scheduler.schedule()
    assert {id(part.job): part.start for part in plan.parts} == {id(same): 16, id(longer): 16}  # no budget for `other`
    scheduler.postprocess(plan, [0])
    [part] = [part for part in scheduler.schedule().parts if part.job is other]
    assert part.start == 0


def test_a_prompt_that_is_known_as_a_whole_still_has_its_last_token_computed() -> None:
    scheduler = Scheduler(config())
    assert finished(scheduler, job(16, 3)) == finished(scheduler, job(16, 3))
    scheduler.submit([job(16, 3)])
    [part] = scheduler.schedule().parts
    assert (part.start, part.end, part.samples) == (12, 16, True)


def test_the_full_queue_and_what_can_never_run_are_refused_with_the_fix() -> None:
    scheduler = Scheduler(config(max_waiting=3))
    scheduler.submit([job(2), job(2)])
    with pytest.raises(QueueFull, match=r"2 sequences wait already, of at most max_waiting=3; try again later") as full:
        scheduler.submit([job(2), job(2)])
    assert isinstance(full.value, Failure)
    assert len(scheduler.waiting) == 2  # all or none
    with pytest.raises(
        InputError, match=r"cache has 64 tokens; the prompt has 60 and 5 new ones .* raise cache_tokens"
    ):
        scheduler.submit([job(60, 5)])
    with pytest.raises(InputError, match="no token"):
        scheduler.submit([job(0)])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block_tokens": 24}, "block_tokens=24 must be at least 2 and divide 64"),
        ({"cache_tokens": 3}, "cache_tokens=3 must be at least block_tokens=4"),
        ({"max_running": 0}, "max_running=0 must be at least 1"),
        ({"max_waiting": 0}, "max_waiting=0 must be at least 1"),
        ({"token_budget": 3}, "token_budget=3 must be at least max_running=4"),
        ({"priority_steps": -1}, "priority_steps=-1 must not be negative"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, int], says: str) -> None:
    with pytest.raises(InputError, match=f"^{says}"):
        config(**changes)


def test_nobody_is_let_in_who_would_be_thrown_out_again_or_get_no_token() -> None:
    scheduler = Scheduler(config(cache_tokens=32, prefix_cache=False))
    first, second = job(14, 14), job(14, 4)  # four blocks each: all eight, and the next steps need more
    scheduler.submit([first, second])
    while first.finish is None or second.finish is None:
        step(scheduler)
    assert first.num_preemptions == second.num_preemptions == 0
    scheduler = Scheduler(config(cache_tokens=256))
    long, behind = job(40, 1), job(5, 1)
    scheduler.submit([long, behind])
    step(scheduler)
    assert scheduler.running == [long]  # its chunks are all that a step holds
    assert not behind.blocks
