"""How to train. Fields that cannot change the resulting weights carry OPERATIONAL and stay out of the stage's key."""

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Literal
from urllib.parse import urlsplit

from gristmill.model import Recompute
from gristmill.parallel.config import ParallelConfig
from gristmill.parallel.ranks import TIMEOUT_S
from gristmill.stage import OPERATIONAL
from gristmill.train.optim import OPTIMIZERS

MAX_THREADS = 1024  # starting many more can end the process
MAX_TIMEOUT_S = 10_000_000  # about four months


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the weights are updated; train/optim has a class per `name`, which lists the settings that it uses.

    `lr` is the peak rate. Muon's updates are scaled to AdamW's size, so the hidden matrices use `lr` itself. The other
    parameters (embeddings, norms, routers), which AdamW updates, use `embedding_lr_ratio * lr`.
    """

    name: str = "muon"
    lr: float = 2e-3
    embedding_lr_ratio: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"name={self.name!r:.80}: input should be {' or '.join(map(repr, OPTIMIZERS))}")
        for name in ("lr", "embedding_lr_ratio", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to below 1")
        used = {"name", "lr", "clip_norm", *OPTIMIZERS[self.name].options}
        for option in fields(self):
            value, default = getattr(self, option.name), option.default
            if option.name not in used and value != default:
                owners = " and ".join(name for name, rule in OPTIMIZERS.items() if option.name in rule.options)
                raise ValueError(
                    f"{option.name}={value} belongs to {owners} and {self.name} does not use it: set it to {default}"
                )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate during training: linear warm-up, then `wsd` (constant, then linear decay) or `cosine`.

    `warmup` and `decay` are fractions of all steps; `decay` belongs to `wsd`. `final` is the last rate as a fraction of
    the peak rate.
    """

    name: Literal["wsd", "cosine"] = "wsd"
    warmup: float = 0.02
    decay: float = 0.4
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.name == "cosine":
            if self.decay != ScheduleConfig.decay:
                raise ValueError(
                    f"decay={self.decay} belongs to wsd and cosine does not use it: set it to {ScheduleConfig.decay}"
                )
            if not 0 <= self.warmup <= 1:
                raise ValueError(f"warmup={self.warmup} must be from 0 to 1: the fraction of all steps")
        elif not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} must not be negative nor exceed 1 together")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final={self.final} must be from 0 to 1: the share of the peak rate at the end")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """`every`: steps between checkpoints; `evaluate.every` says whether held-out loss is measured at each. `keep`: the
    number of newest checkpoints that stay on disk, in addition to those whose step is a multiple of `keep_every`.

    `on_error`: what a checkpoint that could not be saved does to training. `copy_to`: a URL (s3://..., file://...) to
    copy each checkpoint to, under the training's key, by the same rule.
    """

    every: int = field(default=100, metadata=OPERATIONAL)
    keep: int = field(default=2, metadata=OPERATIONAL)
    keep_every: int | None = field(default=None, metadata=OPERATIONAL)
    on_error: Literal["stop", "go_on"] = field(default="stop", metadata=OPERATIONAL)
    copy_to: str | None = field(default=None, metadata=OPERATIONAL)

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"every={self.every} and keep={self.keep} must be at least 1")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"keep_every={self.keep_every} must be at least 1, or null to keep the newest alone")
        if self.copy_to is not None and not urlsplit(self.copy_to).scheme:
            raise ValueError(f"copy_to={self.copy_to!r} must be a URL, such as s3://bucket/folder or file:///folder")
        if self.copy_to and urlsplit(self.copy_to).password:
            raise ValueError("copy_to must hold no password, since recipes are kept: use the store's own environment")

    def kept(self, steps: Collection[int]) -> set[int]:
        """Of the checkpoints at these steps, those to leave."""
        every = self.keep_every
        return {*sorted(steps)[-self.keep :], *(step for step in steps if every and step % every == 0)}


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What becomes of a step whose loss or gradient is not a number, or a spike: more than `sigmas` standard deviations
    above the mean of the last `window` steps (null: spikes pass).

    policy: `skip` leaves the batch out; `roll_back` goes back to the last checkpoint and leaves it out from there (as
    `skip` where there is none yet); `stop` ends training. After `in_a_row` such steps training stops anyway. All of it
    may change while a training stands: a checkpoint says which steps were left out.
    """

    policy: Literal["skip", "roll_back", "stop"] = field(default="skip", metadata=OPERATIONAL)
    sigmas: float | None = field(default=None, metadata=OPERATIONAL)
    window: int = field(default=128, metadata=OPERATIONAL)
    in_a_row: int = field(default=3, metadata=OPERATIONAL)

    def __post_init__(self) -> None:
        if self.sigmas is not None and not self.sigmas > 0:
            raise ValueError(f"sigmas={self.sigmas} must be positive, or null to let spikes pass")
        if self.window < 8 or self.in_a_row < 1:
            raise ValueError(f"window={self.window} must be at least 8 steps, in_a_row={self.in_a_row} at least 1")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow. `uri` is that of a tracking server (https://...) or a database (sqlite:////folder/mlflow.db); None is
    $MLFLOW_TRACKING_URI, or else SQLite below `.state/`."""

    enabled: bool = field(default=True, metadata=OPERATIONAL)
    uri: str | None = field(default=None, metadata=OPERATIONAL)
    experiment: str = field(default="gristmill", metadata=OPERATIONAL)

    def __post_init__(self) -> None:
        if self.uri and urlsplit(self.uri).password:
            raise ValueError("uri must hold no password, since recipes are kept: set MLFLOW_TRACKING_URI instead")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`batch_tokens` a step = sequences of `seq_len`, run `micro_batch` sequences at a time.

    `dtype` and `threads` None mean: what the machine does best; what was chosen is recorded in the first checkpoint
    and enforced when training goes on; so is `compile`, which has torch compile each block. `recompute` saves memory:
    what the backward pass needs again is not kept but computed again, of a block its experts (`selective`) or all
    (`full`, up to a third slower). `parallel` splits the model over processes. A `micro_batch` that memory has no room
    for is halved, and the batch stays; many processes end for that, and go on so when they are started again.
    `balance` says whose assignments the balancing loss counts: all ranks' in the batch so far (`global`), this rank's
    in the batch so far (`rank`), or the micro-batch's (`micro_batch`, as MegaBlocks). `bias` has no loss: after each
    batch an expert that got more than the mean is `bias_rate` less likely to be chosen, one that got less is more so.
    `workers` threads prepare batches ahead.
    Of several processes, one that does not arrive within `rank_timeout_s` seconds ends the others.
    """

    steps: int
    batch_tokens: int = 16384
    seq_len: int = 512
    micro_batch: int = 16
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] | None = None
    threads: int | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    log_every: int = field(default=10, metadata=OPERATIONAL)
    balance: Literal["global", "rank", "micro_batch", "bias"] = "global"
    bias_rate: float = 0.001
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=OPERATIONAL)
    recompute: Recompute = field(default="none", metadata=OPERATIONAL)
    compile: bool = field(default=False, metadata=OPERATIONAL)
    workers: int = field(default=1, metadata=OPERATIONAL)
    rank_timeout_s: float = field(default=TIMEOUT_S, metadata=OPERATIONAL)

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "micro_batch", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch_tokens < 1 or self.batch_tokens % (self.seq_len * self.micro_batch):
            raise ValueError(
                f"batch_tokens={self.batch_tokens} must be a multiple of seq_len={self.seq_len} x "
                f"micro_batch={self.micro_batch} = {self.seq_len * self.micro_batch}"
            )
        if self.steps * self.batch_tokens >= 2**62:
            raise ValueError(f"steps={self.steps} x batch_tokens={self.batch_tokens} must be below 2**62 tokens")
        if not 0 <= self.workers <= MAX_THREADS:
            raise ValueError(f"workers={self.workers} must be from 0 to {MAX_THREADS}")
        if not 0 < self.rank_timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(
                f"rank_timeout_s={self.rank_timeout_s} must be above 0 and at most {MAX_TIMEOUT_S:,} seconds"
            )
        if self.seq_len % (2 * self.parallel.context) and self.parallel.context > 1:
            raise ValueError(
                f"seq_len={self.seq_len} must be a multiple of 2 x parallel.context={self.parallel.context}: each rank "
                "takes a piece from the front of a sequence and one from its back"
            )
        if not self.bias_rate > 0:
            raise ValueError(f"bias_rate={self.bias_rate} must be positive")
        if self.balance != "bias" and self.bias_rate != TrainConfig.bias_rate:
            raise ValueError(
                f"bias_rate={self.bias_rate} belongs to balance=bias and {self.balance} does not use it: set it to "
                f"{TrainConfig.bias_rate}"
            )
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} must be from 0 to 2**31 - 1")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise ValueError(
                f"threads={self.threads} must be from 1 to {MAX_THREADS}, or null for the machine's own choice"
            )

    @property
    def sequences_per_batch(self) -> int:
        return self.batch_tokens // self.seq_len
