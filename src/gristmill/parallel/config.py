"""How a training lies over its processes."""

from dataclasses import dataclass

from gristmill.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Three sizes. How often all of it is repeated, with other sequences, follows from the number of processes.

    `shard`: ranks over which each weight, its gradient and its moments are split (FSDP; with repeats, HSDP). 1 leaves
    them whole on every rank, null takes all ranks that `context` leaves.
    `context`: ranks that share a sequence, each with a part of its positions.
    `expert`: neighbours among the shard x context ranks that hold different experts and send each other tokens.
    """

    shard: int | None = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for name in ("shard", "context", "expert"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclass(frozen=True)
class Layout:
    """A ParallelConfig on a number of processes. Ranks count through context first, then shard, then replicate."""

    replicate: int
    shard: int
    context: int
    expert: int

    @property
    def world_size(self) -> int:
        return self.replicate * self.shard * self.context

    @property
    def split(self) -> int:
        """Ranks over which a weight outside of the experts is split."""
        return self.shard * self.context

    @property
    def expert_split(self) -> int:
        """Ranks over which an expert's weights are split."""
        return self.split // self.expert

    @property
    def data(self) -> int:
        """Ranks, or groups of context ranks, with sequences of their own."""
        return self.replicate * self.shard


def lay_out(cfg: ParallelConfig, world_size: int) -> Layout:
    """Raises ValueError when the sizes do not fit the number of processes or each other."""
    if world_size % cfg.context:
        raise ValueError(f"context={cfg.context} must divide the {world_size} processes")
    shard = world_size // cfg.context if cfg.shard is None else cfg.shard
    if world_size % (shard * cfg.context):
        raise ValueError(
            f"shard={shard} x context={cfg.context} = {shard * cfg.context} must divide the {world_size} processes"
        )
    if shard * cfg.context % cfg.expert:
        raise ValueError(f"expert={cfg.expert} must divide shard={shard} x context={cfg.context}")
    return Layout(world_size // (shard * cfg.context), shard, cfg.context, cfg.expert)


def misfit(cfg: ModelConfig, layout: Layout) -> str | None:
    """Why a model cannot be split so; None when it can."""
    if cfg.ffn == "dense" and layout.expert > 1:
        return f"expert={layout.expert}: model.ffn=dense has no experts; set expert to 1"
    if cfg.moe_num_experts % layout.expert:
        return f"expert={layout.expert} must divide moe_num_experts={cfg.moe_num_experts}"
    if cfg.ffn == "moe" and cfg.ffn_hidden_size % layout.expert_split:
        return (
            f"ffn_hidden_size={cfg.ffn_hidden_size} must be a multiple of the {layout.expert_split} ranks that an "
            "expert is split over (shard x context / expert); change shard or expert"
        )
    return None
