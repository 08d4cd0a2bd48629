"""Raw documents -> clean, deduplicated, licensed documents, split by group. Start reading at `build.py`."""

from gristmill.corpus.build import build_corpus, fingerprint
from gristmill.corpus.config import CorpusConfig, FilterConfig, NearDuplicateConfig, SourceConfig, SplitConfig

__all__ = [
    "CorpusConfig",
    "FilterConfig",
    "NearDuplicateConfig",
    "SourceConfig",
    "SplitConfig",
    "build_corpus",
    "fingerprint",
]
