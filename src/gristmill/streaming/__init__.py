"""Token shards in MosaicML's MDS format, and batches read from them in an order that is a pure function of the step.

Needs numpy, and pyarrow where shards are written. Knows no other room: whoever builds shards passes the tokenizer's
functions in.
"""

from gristmill.streaming.batches import Batch, Batches
from gristmill.streaming.build import build_shards
from gristmill.streaming.config import Remote, ShardsConfig
from gristmill.streaming.mds import MDSReader, MDSWriter
from gristmill.streaming.merge import merge
from gristmill.streaming.order import MixPhase, check_curriculum

__all__ = [
    "Batch",
    "Batches",
    "MDSReader",
    "MDSWriter",
    "MixPhase",
    "Remote",
    "ShardsConfig",
    "build_shards",
    "check_curriculum",
    "merge",
]
