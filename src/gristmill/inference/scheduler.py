"""Which tokens of which sequences go through the model next. Pure: no tensors, no clock.

    plan = scheduler.schedule()
    ...                                       # the model makes the next id of each part that `samples`
    scheduler.postprocess(plan, ids)

Sequences join and leave between any two steps (continuous batching, Orca, Yu et al., 2022), and a long prompt goes in
chunks beside the decoding of others (Sarathi-Serve, Agrawal et al., 2024, arXiv:2403.02310).

All sequences stand in one fixed order: by the step of their arrival, moved back by `priority_steps` for each level of
priority (0 is the first). In any step those in front get blocks before those behind, whose blocks are taken when there
are too few. So the first one always advances, and as only so many can ever arrive before another, each is the first
at last: nobody starves, and nobody is thrown out for ever.
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from gristmill.errors import Failure, InputError
from gristmill.inference.blocks import Blocks, chained
from gristmill.inference.errors import SettingError

CACHE_TOKENS = 32768  # the usual capacity of the key/value cache
Complete = Literal["stop", "length"]
Finish = Complete | Literal["cancelled", "error"]


class QueueFull(Failure):
    """Too many requests wait; the same one may be accepted a little later."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """cache_tokens: capacity of the key/value cache, of all sequences together, in blocks of `block_tokens`; None is
    CACHE_TOKENS, or with a memory bound as many as fit. token_budget: the most tokens of one step, prompts and new
    tokens together. max_running: the most sequences in one step. max_waiting: the most that may wait for it.
    priority_steps: how many steps later a request of one level more urgent may arrive and still go first.
    prefix_cache: whether prompts that begin alike share what was computed."""

    cache_tokens: int | None = None
    block_tokens: int = 16
    token_budget: int = 512
    max_running: int = 64
    max_waiting: int = 1024
    priority_steps: int = 256
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        if self.block_tokens < 2 or 64 % self.block_tokens:
            raise InputError(f"block_tokens={self.block_tokens} must be at least 2 and divide 64; 16 is usual")
        if self.cache_tokens is not None and self.cache_tokens < self.block_tokens:
            raise InputError(f"cache_tokens={self.cache_tokens} must be at least block_tokens={self.block_tokens}")
        for name in ("max_running", "max_waiting"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.priority_steps < 0:
            raise InputError(f"priority_steps={self.priority_steps} must not be negative; 0 is one queue for all")
        if self.token_budget < self.max_running:
            raise InputError(
                f"token_budget={self.token_budget} must be at least max_running={self.max_running}, so that each "
                "running sequence gets its next token in each step; raise the one or lower the other"
            )

    @property
    def num_blocks(self) -> int:
        return (CACHE_TOKENS if self.cache_tokens is None else self.cache_tokens) // self.block_tokens


@dataclass(eq=False, kw_only=True)
class Job:
    """One sequence on its way. `ids`: the prompt and what was made; the keys and values of the first `num_computed` of
    them are in `blocks`. `reuse`: whether published blocks may stand for its prompt."""

    prompt: Sequence[int]
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    salt: str = ""
    reuse: bool = True
    finish: Finish | None = None
    order: tuple[int, int] = (0, 0)
    num_computed: int = 0
    num_preemptions: int = 0
    ids: list[int] = field(init=False)
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of the full blocks of `ids`, as far as they were asked for

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)

    @property
    def num_made(self) -> int:
        return len(self.ids) - len(self.prompt)

    @property
    def pending(self) -> int:
        return len(self.ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        return self.pending == 1 and self.num_computed > 0

    def __lt__(self, other: "Job") -> bool:
        return self.order < other.order


@dataclass(frozen=True)
class Part:
    """Tokens `job.ids[start:end]` of this step; `samples`: the last of them asks for the next id."""

    job: Job
    start: int
    end: int
    samples: bool


@dataclass(frozen=True)
class Plan:
    parts: tuple[Part, ...]


class Scheduler:
    """max_seq_len: the model's; None has no bound but the cache."""

    def __init__(self, cfg: EngineConfig, max_seq_len: int | None = None) -> None:
        self.cfg = cfg
        self.max_seq_len = math.inf if max_seq_len is None else max_seq_len
        self.blocks = Blocks(cfg.num_blocks)
        self.running: list[Job] = []  # in order
        self.waiting: list[Job] = []  # a heap
        self._step = 0
        self._numbers = itertools.count()

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    @property
    def context(self) -> int:
        """The most tokens of one sequence, prompt and answer together."""
        return int(min(self.max_seq_len, self.cfg.num_blocks * self.cfg.block_tokens))

    def new_tokens(self, num_prompt: int, max_tokens: int | None) -> int:
        """Return the largest number of new tokens: `max_tokens`, or all that fit when it is None.

        Raises SettingError for an empty prompt and for one that does not fit. No other code checks lengths.
        """
        if not num_prompt:
            raise SettingError(
                "prompt", "the prompt has no token, and the tokenizer adds no start token; give some text"
            )
        least = 1 if max_tokens is None else max_tokens
        if num_prompt + least > self.context or num_prompt >= self.max_seq_len:
            has_model_bound = self.context == self.max_seq_len
            raise SettingError(
                "prompt",
                f"the {'context is' if has_model_bound else 'cache has'} {self.context} tokens; the prompt has "
                f"{num_prompt}{f' and {max_tokens} new ones are asked for' if max_tokens else ''}: shorten the prompt"
                f"{' or lower max_tokens' if max_tokens else ''}{'' if has_model_bound else ', or raise cache_tokens'}",
                code="context_length_exceeded",
            )
        return self.context - num_prompt if max_tokens is None else max_tokens

    def cached_tokens(self, job: Job) -> int:
        """Return how many tokens of the beginning of its prompt are in the cache now."""
        return len(self._shared(job)) * self.cfg.block_tokens

    @property
    def has_room(self) -> bool:
        """Whether the next step could begin one more sequence, as far as sequences and tokens go. When the blocks do
        not suffice, less than one step's prompts wait for them."""
        return (
            len(self.running) + len(self.waiting) < self.cfg.max_running
            and sum(job.pending for job in self.waiting) < self.cfg.token_budget
        )

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of them or none; any number when nothing waits. Raises QueueFull, and InputError for one that could never
        run."""
        for job in jobs:
            self.new_tokens(len(job.prompt), job.max_tokens)
        if self.waiting and len(self.waiting) + len(jobs) > self.cfg.max_waiting:
            raise QueueFull(
                f"{len(self.waiting)} sequences wait already, of at most max_waiting={self.cfg.max_waiting}; "
                "try again later, or raise it"
            )
        for job in jobs:
            job.order = (self._step + job.priority * self.cfg.priority_steps, next(self._numbers))
            heapq.heappush(self.waiting, job)

    def finish(self, job: Job, reason: Finish) -> None:
        """Ends a sequence where it stands: a stop string was found, or nobody wants it any more."""
        if job.finish is not None:
            return
        job.finish = reason
        if job in self.running:
            self.running.remove(job)
            self.blocks.give_back(job.blocks)
            job.blocks = []
        else:
            self.waiting.remove(job)
            heapq.heapify(self.waiting)

    def recompute(self) -> None:
        """Discard all keys and values. Running sequences wait at their place and are computed again."""
        for job in list(self.running):
            self._preempt(job)
        self.blocks.forget()

    def schedule(self) -> Plan:
        """The next step; no parts when there is nothing to do. Each plan must be given to `postprocess`."""
        self._step += 1
        self._grow()
        self._admit()
        budget, parts = self.cfg.token_budget, []
        for job in [*(j for j in self.running if j.is_decoding), *(j for j in self.running if not j.is_decoding)]:
            end = min(len(job.ids), job.num_computed + budget)
            if end > job.num_computed:
                samples = end == len(job.ids) and job.num_made < job.max_tokens
                parts.append(Part(job, job.num_computed, end, samples))
                budget -= end - job.num_computed
        return Plan(tuple(parts))

    def postprocess(self, plan: Plan, sampled: Sequence[int]) -> None:
        """The plan was run. sampled: an id for each part that asked for one. Ended sequences have their `finish`."""
        ids = iter(sampled)
        for part in plan.parts:
            job, id = part.job, next(ids) if part.samples else None
            if job.finish is not None:
                continue
            job.num_computed = part.end
            if self.cfg.prefix_cache:
                for number in range(part.start // self.cfg.block_tokens, part.end // self.cfg.block_tokens):
                    self.blocks.publish(job.blocks[number], self._name(job, number))
            if id is not None:
                job.ids.append(id)
                if id in job.stop_ids:
                    self.finish(job, "stop")
            if job.finish is None and part.end >= len(job.prompt) and job.num_made == job.max_tokens:
                self.finish(job, "length")

    def _grow(self) -> None:
        """A block for every decoding sequence whose last one is full, at the cost of those behind it."""
        for job in list(self.running):
            while job in self.running and len(job.blocks) < self._num_blocks(job):
                if (taken := self.blocks.take((), 1)) is not None:
                    job.blocks += taken
                else:
                    self._preempt(self.running[-1])  # perhaps itself

    def _admit(self) -> None:
        """From the waiting, in order, those for whose prompts there is room; it may be made by those behind them."""
        while self.waiting:
            job = self.waiting[0]
            behind = [other for other in self.running if job < other]
            ahead = sum(o.pending for o in self.running if o < job or o.is_decoding)
            if len(self.running) - len(behind) >= self.cfg.max_running or ahead >= self.cfg.token_budget:
                return
            reserve = len(self.running) - len(behind)  # or those in front would take its blocks in the next steps
            if self._available(job) + sum(len(other.blocks) for other in behind) < reserve:
                return
            while len(self.running) >= self.cfg.max_running or self._available(job) < reserve:
                if not behind:
                    return
                self._preempt(behind.pop())
            heapq.heappop(self.waiting)
            shared = self._shared(job)
            taken = self.blocks.take(shared, self._num_blocks(job) - len(shared))
            assert taken is not None
            job.blocks, job.num_computed = taken, len(shared) * self.cfg.block_tokens
            self.running.append(job)
            self.running.sort()

    def _preempt(self, job: Job) -> None:
        """Back to the queue, at its old place. What it had is computed again, as far as it is not still published."""
        self.running.remove(job)
        self.blocks.give_back(job.blocks)
        job.blocks, job.num_computed = [], 0
        job.num_preemptions += 1
        heapq.heappush(self.waiting, job)

    def _num_blocks(self, job: Job) -> int:
        return -(-len(job.ids) // self.cfg.block_tokens)

    def _available(self, job: Job) -> int:
        """Blocks that would be left if this one got all that it needs now; negative when there are too few."""
        shared = self._shared(job)
        return self.blocks.would_leave(shared, self._num_blocks(job) - len(shared))

    def _shared(self, job: Job) -> list[int]:
        """Published blocks of its beginning; not of its last token, whose pass through the model makes the next."""
        if not (self.cfg.prefix_cache and job.reuse):
            return []
        return self.blocks.find(self._names(job, (len(job.ids) - 1) // self.cfg.block_tokens))

    def _names(self, job: Job, count: int) -> list[bytes]:
        if count:
            self._name(job, count - 1)
        return job.names[:count]

    def _name(self, job: Job, number: int) -> bytes:
        size = self.cfg.block_tokens
        while len(job.names) <= number:
            start = len(job.names) * size
            previous = job.names[-1] if job.names else None
            job.names.append(chained(previous, job.ids[start : start + size], job.salt))
        return job.names[number]
