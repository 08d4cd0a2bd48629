"""How shards are cut."""

from dataclasses import dataclass

from gristmill.streaming.compression import parse


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Sizes of what training reads.

    block_tokens: ids in a sample; every sequence length that divides it can be trained without resharding.
    size_limit: bytes of a shard file before compression.
    compression: "zstd" takes about half the space; training then unpacks shards into temporary files. Also gz, bz2, br
    and snappy; a level after a colon ("zstd:19").
    """

    block_tokens: int = 32_768
    size_limit: int = 64 << 20
    compression: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.block_tokens < 1 << 28:
            raise ValueError(f"block_tokens={self.block_tokens} must be at least 1 and less than 2**28")
        if not 1 << 10 <= self.size_limit < 1 << 32:
            raise ValueError(f"size_limit={self.size_limit} must be from 1,024 to 2**32 - 1 bytes (offsets are uint32)")
        if self.compression is not None:
            parse(self.compression)
