"""Plans a training before it runs: `plan` evaluates one choice of settings, `search` finds the fastest that fits.

Memory comes from footprint.py and time from traffic.py; nothing here computes with tensors. No plan has been compared
with a GPU yet; measured.json lists the comparisons with CPU trainings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import isqrt

from gristmill.errors import InputError
from gristmill.model import Recompute
from gristmill.model.counts import train_flops_per_token
from gristmill.parallel.config import Layout, ParallelConfig, lay_out, misfit
from gristmill.plan.footprint import RECOMPUTE, Footprint, Moment, Training, Way, highest, param_bytes
from gristmill.plan.hardware import Hardware
from gristmill.plan.traffic import Clock, Times, Traffic

# Assumed share of a GPU's memory for CUDA's context, NCCL's buffers and fragments in the caching allocator.
RESERVE = 0.08
FREE = 0.1  # share of all memory that a plan leaves unused, because a batch may be less balanced than assumed
# On a CPU: bytes of code and work areas that the first step loads after the imports, and the share of freed blocks that
# glibc keeps although no later block fits into them. Both were measured (benchmarks/plan.py). The share was 10 to 35%
# of the allocated bytes, 78% for the smallest model.
LIBRARIES = 60_000_000
KEPT_FREED = 0.2
MIN_BATCH_TOKENS = 2**22  # of a default batch
MIN_GPU_TOKENS = 4096  # of a default batch, per GPU
MAX_GPUS = 100_000  # torch splits a model over this many in half a minute
MAX_BATCH_TOKENS = 10**12
RUNNERS_UP = 4
MORE_GPUS = (2, 4, 8, 16, 32, 64)
DAY_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings of a training and their cost, for the GPU that needs the most.

    Args:
        reserve: bytes that libraries and the allocator occupy.
        param_bytes: bytes of the fp32 masters that rank 0 stores.
    """

    training: Training
    hardware: Hardware
    way: Way
    moment: Moment
    reserve: int
    param_bytes: int

    @property
    def needed_bytes(self) -> int:
        return self.moment.total + self.reserve

    @property
    def usable_bytes(self) -> int:
        return round(self.hardware.memory_bytes * (1 - FREE))

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.usable_bytes

    @property
    def expert_load(self) -> float:
        """Return the rows of the busiest rank's experts over the mean."""
        return self.clock.of.load

    @cached_property
    def clock(self) -> Clock:
        return Clock(Footprint(self.training, self.way), self.hardware)

    @cached_property
    def times(self) -> Times:
        return self.clock.times()

    @property
    def traffic(self) -> list[Traffic]:
        return self.clock.traffic()

    @property
    def micro_batches(self) -> int:
        return self.clock.of.micro_batches

    @property
    def tokens_per_second(self) -> float:
        return self.training.batch_tokens / self.times.step

    @property
    def mfu(self) -> float:
        """Return the model FLOPs utilization; recomputed operations do not count."""
        flops = train_flops_per_token(self.training.model, self.training.seq_len)
        return self.tokens_per_second * flops / (self.hardware.flops * self.way.layout.world_size)

    def days(self, tokens: float) -> float:
        """Return a lower bound: no failures, no checkpoints, and FSDP's traffic hidden as far as possible."""
        return tokens / (self.tokens_per_second * DAY_S)


@dataclass(frozen=True, kw_only=True)
class Change:
    """Recipe keys to set, and the plan that results."""

    keys: dict[str, int | str]
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The result of a search.

    Args:
        plan: the fastest plan that fits or, if none fits, the one that lacks the least memory.
        others: runners-up on other meshes.
        changes: changes that would make it fit.
        tried: number of plans evaluated.
    """

    plan: Plan
    others: Sequence[Plan]
    changes: Sequence[Change]
    tried: int


def plan(training: Training, hardware: Hardware, way: Way) -> Plan:
    """Evaluate one choice of settings. Raises InputError if the training does not fit the layout."""
    check(training, way.layout, way.micro_batch)
    moment = highest(training, way)
    if hardware.on_gpu:
        reserve = round(hardware.memory_bytes * RESERVE)
    else:
        reserve = LIBRARIES + round((moment.total + LIBRARIES) * KEPT_FREED)
    return Plan(training=training, hardware=hardware, way=way, moment=moment, reserve=reserve,
                param_bytes=param_bytes(training.model, way.layout))  # fmt: skip


def check(training: Training, layout: Layout, micro_batch: int = 1) -> None:
    """Raise InputError if the training does not fit the layout."""
    if problem := problem_of(training, layout, micro_batch):
        raise InputError(problem)


def problem_of(training: Training, layout: Layout, micro_batch: int = 1) -> str | None:
    """Return the rule of parallel/apply.py or of the training loop that a layout breaks; None if it breaks none."""
    cfg, context = training.model, layout.context
    if problem := misfit(cfg, layout):
        return problem
    if context > 1 and training.seq_len % (2 * context):
        return f"seq_len={training.seq_len} must be a multiple of 2 x context={context}"
    if training.batch_tokens % training.seq_len:
        return (
            f"batch_tokens={training.batch_tokens} must be a multiple of seq_len={training.seq_len}; the nearest is "
            f"{max(1, round(training.sequences)) * training.seq_len}"
        )
    if training.sequences % layout.data:
        return (
            f"batch_tokens={training.batch_tokens} is {training.sequences} sequences of {training.seq_len}, which "
            f"{layout.data} groups of GPUs cannot share evenly; change batch_tokens, or raise context"
        )
    if micro_batch < 1 or training.sequences // layout.data % micro_batch:
        return (
            f"micro_batch={micro_batch} must divide the {training.sequences // layout.data} sequences of a GPU's share"
        )
    return None


def default_batch_tokens(gpus: int, seq_len: int) -> int:
    """Return the batch for a shape without a recipe: 4,194,304 tokens or 4,096 per GPU, whichever is more.

    The GPUs, or equal groups of them, can divide its sequences.
    """
    sequences = max(MIN_BATCH_TOKENS, gpus * MIN_GPU_TOKENS) // seq_len
    if sequences >= gpus:
        return -(-sequences // gpus) * gpus * seq_len
    return max(n for n in divisors(gpus) if n <= max(1, sequences)) * seq_len


def search(
    training: Training,
    hardware: Hardware,
    gpus: int,
    mesh: ParallelConfig | None = None,
    micro_batch: int | None = None,
    recompute: Recompute | None = None,
) -> SearchResult:
    """Find the fastest plan that fits on `gpus` GPUs. Settings that are given stay fixed.

    Raises InputError if no mesh is possible.
    """
    least = 1 if micro_batch is None else micro_batch
    if mesh is not None:
        given = _lay_out(mesh, gpus)
        check(training, given, least)
        tried = list(_ways(training, hardware, [given], micro_batch, recompute))
    else:
        layouts = [one for one in _layouts(training, gpus) if problem_of(training, one, least) is None]
        if not layouts:
            raise InputError(f"no mesh of {gpus} GPUs will do: {_why_none(training, gpus, least)}")
        tried = list(_ways(training, hardware, layouts, micro_batch, recompute))
    fitting = sorted((one for one in tried if one.fits), key=lambda one: one.times.step)
    if fitting:
        others: dict[Layout, Plan] = {}
        for one in fitting:
            others.setdefault(one.way.layout, one)
        best, *rest = others.values()
        return SearchResult(plan=best, others=rest[:RUNNERS_UP], changes=(), tried=len(tried))
    nearest = min(tried, key=lambda one: one.needed_bytes)
    free = mesh is None and micro_batch is None and recompute is None
    return SearchResult(plan=nearest, others=(), changes=list(_changes(nearest, free)), tried=len(tried))


def _lay_out(mesh: ParallelConfig, gpus: int) -> Layout:
    try:
        return lay_out(mesh, gpus)
    except ValueError as problem:
        raise InputError(f"--mesh: {problem}") from None


def _layouts(training: Training, gpus: int) -> Iterator[Layout]:
    experts = divisors(training.model.moe_num_experts) if training.model.ffn == "moe" else [1]
    for context in divisors(gpus):
        for shard in divisors(gpus // context):
            for expert in experts:
                if shard * context % expert == 0:
                    yield Layout(gpus // (shard * context), shard, context, expert)


def _why_none(training: Training, gpus: int, micro_batch: int) -> str:
    """Return the first rules that rule out meshes."""
    reasons = dict.fromkeys(problem_of(training, layout, micro_batch) for layout in _layouts(training, gpus))
    return "; or ".join([reason for reason in reasons if reason][:2])


def _ways(
    training: Training,
    hardware: Hardware,
    layouts: Sequence[Layout],
    micro_batch: int | None = None,
    recompute: Recompute | None = None,
) -> Iterator[Plan]:
    """Yield a plan per layout and kind of recomputation, with the largest micro-batch that fits, else the smallest."""
    for layout in layouts:
        sizes = divisors(training.sequences // layout.data) if micro_batch is None else [micro_batch]
        for what in RECOMPUTE if recompute is None else [recompute]:
            best: Plan | None = None
            for size in sizes:  # ascending, as the memory that they need
                way = Way(layout=layout, micro_batch=size, recompute=what, on_gpu=hardware.on_gpu)
                one = plan(training, hardware, way)
                if best is None or one.fits:
                    best = one
                if not one.fits:
                    break
            assert best is not None
            yield best


def _fastest(training: Training, hardware: Hardware, gpus: int) -> Plan | None:
    """Return the fastest plan that fits; None if none does."""
    layouts = [layout for layout in _layouts(training, gpus) if problem_of(training, layout) is None]
    fitting = (one for one in _ways(training, hardware, layouts) if one.fits)
    return min(fitting, key=lambda one: one.times.step, default=None)


# ---- what to change ------------------------------------------------------------------------------------


def _changes(one: Plan, free: bool) -> Iterator[Change]:
    """Yield changes that make a plan fit: one key; else several; else more GPUs and shorter sequences.

    free: the search was free to choose all keys, so that changing them cannot help.
    """
    training, hardware, gpus = one.training, one.hardware, one.way.layout.world_size
    if not free:
        single = [
            then
            for way in _neighbours(one)
            if problem_of(training, way.layout, way.micro_batch) is None
            and (then := plan(training, hardware, way)).fits
        ]
        together = _fastest(training, hardware, gpus)
        for then in single or ([together] if together else []):
            yield Change(keys=_keys(one.way, then.way), plan=then)
        if single or together:
            return
    for times in (times for times in MORE_GPUS if gpus * times <= MAX_GPUS):
        more = replace(training, batch_tokens=_batch_for(training, gpus * times))
        if wide := _fastest(more, hardware, gpus * times):
            batch = {"batch_tokens": more.batch_tokens} if more != training else {}
            yield Change(keys={"gpus": gpus * times, **batch, **_keys(one.way, wide.way)}, plan=wide)
            break
    length = training.seq_len // 2
    while length >= 128:
        brief = replace(training, seq_len=length)
        if then_ := _fastest(brief, hardware, gpus):
            yield Change(keys={"seq_len": length, **_keys(one.way, then_.way)}, plan=then_)
            return
        length //= 2


def _batch_for(training: Training, gpus: int) -> int:
    """Return the training's batch if `gpus` GPUs can divide it, else the default batch."""
    shared = any(problem_of(training, layout) is None for layout in _layouts(training, gpus))
    return training.batch_tokens if shared else default_batch_tokens(gpus, training.seq_len)


def _neighbours(one: Plan) -> Iterator[Way]:
    """Yield settings that differ in one key, the cheapest change first."""
    way, layout, cfg = one.way, one.way.layout, one.training.model
    for size in reversed(divisors(way.micro_batch)[:-1]):
        yield replace(way, micro_batch=size)
    for what in RECOMPUTE[RECOMPUTE.index(way.recompute) + 1 :]:
        yield replace(way, recompute=what)
    for expert in divisors(cfg.moe_num_experts) if cfg.ffn == "moe" else []:
        if expert > layout.expert and layout.split % expert == 0:
            yield replace(way, layout=replace(layout, expert=expert))
    for more in divisors(layout.replicate)[1:]:
        yield replace(way, layout=replace(layout, replicate=layout.replicate // more, shard=layout.shard * more))
        yield replace(way, layout=replace(layout, replicate=layout.replicate // more, context=layout.context * more))


def _keys(old: Way, new: Way) -> dict[str, int | str]:
    """Return the recipe keys that differ, with their new values."""
    pairs: dict[str, tuple[int | str, int | str]] = {
        "train.parallel.shard": (old.layout.shard, new.layout.shard),
        "train.parallel.context": (old.layout.context, new.layout.context),
        "train.parallel.expert": (old.layout.expert, new.layout.expert),
        "train.recompute": (old.recompute, new.recompute),
        "train.micro_batch": (old.micro_batch, new.micro_batch),
    }
    return {key: after for key, (before, after) in pairs.items() if before != after}


@lru_cache(maxsize=4096)
def divisors(number: int) -> list[int]:
    """Return the divisors in ascending order."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]
