"""How shards are cut, and where they are read from when they lie elsewhere."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from gristmill.home import expand, home
from gristmill.stage import OPERATIONAL
from gristmill.streaming.compression import parse

# Bytes of shards kept on a node: 25 billion tokens in two bytes each, several times the shards that are open at once
# (8 of 64 MB for each source), and little beside the disk of a machine that trains.
CACHE_BYTES = 50_000_000_000


@dataclass(frozen=True, kw_only=True)
class Remote:
    """Shards that lie on an object store, and the node's cache of them.

    url: of a directory with one MDS directory per source, as fsspec spells it: s3://bucket/run/shards/1a2b3c4d.
    cache: directory that all processes of a node share; None is `default_cache()`. cache_bytes: it stays below.
    """

    url: str
    cache: str | None = None
    cache_bytes: int = CACHE_BYTES

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.password or parts.query or parts.fragment:
            raise ValueError(
                "remote must hold no password and nothing after '?' or '#', since recipes are kept: give credentials "
                "in the environment, where fsspec's packages look for them"
            )
        if not self.url.startswith(f"{parts.scheme}://") or not parts.scheme or "::" in self.url:
            raise ValueError(f"remote={self.url!r} must be a URL such as s3://bucket/shards or file:///mnt/shards")
        if self.cache_bytes < 1:
            raise ValueError(f"cache_bytes={self.cache_bytes} must be at least 1")

    @property
    def directory(self) -> Path:
        return expand(self.cache) if self.cache else default_cache()


def default_cache() -> Path:
    """$GRISTMILL_CACHE/shards, or else `gristmill/shards` in the user's cache directory."""
    if ours := os.environ.get("GRISTMILL_CACHE"):
        return expand(ours) / "shards"
    return Path(os.environ.get("XDG_CACHE_HOME") or home("GRISTMILL_CACHE") / ".cache") / "gristmill" / "shards"


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Sizes of what training reads, or where it lies already.

    block_tokens: ids in a sample; every sequence length that divides it can be trained without resharding.
    size_limit: bytes of a shard file before compression.
    compression: "zstd" takes about half the space; training then unpacks shards into temporary files. Also gz, bz2, br
    and snappy; a level after a colon ("zstd:19").
    remote: URL of a shards artifact made from the same corpus and tokenizer; it is read from there, through a cache
    (see `Remote`), and nothing is tokenized here.
    """

    block_tokens: int = 32_768
    size_limit: int = 64 << 20
    compression: str | None = None
    remote: str | None = field(default=None, metadata=OPERATIONAL)  # what lies there enters the key, not where
    cache: str | None = field(default=None, metadata=OPERATIONAL)
    cache_bytes: int = field(default=CACHE_BYTES, metadata=OPERATIONAL)

    def __post_init__(self) -> None:
        if not 1 <= self.block_tokens < 1 << 28:
            raise ValueError(f"block_tokens={self.block_tokens} must be at least 1 and less than 2**28")
        if not 1 << 10 <= self.size_limit < 1 << 32:
            raise ValueError(f"size_limit={self.size_limit} must be from 1,024 to 2**32 - 1 bytes (offsets are uint32)")
        if self.compression is not None:
            parse(self.compression)
        self.source()  # raises ValueError

    def source(self) -> Remote | None:
        """Where the shard files lie, if not beside their index."""
        return Remote(url=self.remote, cache=self.cache, cache_bytes=self.cache_bytes) if self.remote else None
