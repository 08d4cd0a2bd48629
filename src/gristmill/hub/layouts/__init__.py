"""Published layouts: one file per layout, and the table of all of them.

To add one, write a file that defines a `PublishedLayout` and add it to `LAYOUTS`. Import and export, quantization, GGUF
files, model cards and the command line's choices read the table.
"""

from gristmill.errors import InputError
from gristmill.hub.layouts.base import PublishedLayout
from gristmill.hub.layouts.dbrx import DBRX
from gristmill.hub.layouts.qwen3_moe import QWEN3_MOE
from gristmill.model import ModelConfig

LAYOUTS: tuple[PublishedLayout, ...] = (DBRX, QWEN3_MOE)

__all__ = ["LAYOUTS", "PublishedLayout", "published_layout", "unsupported"]


def published_layout(cfg: ModelConfig) -> PublishedLayout:
    """Return the first layout that can publish this configuration. Raises InputError when none can."""
    for layout in LAYOUTS:
        if layout.publishes(cfg):
            return layout
    raise unsupported(cfg)


def unsupported(cfg: ModelConfig) -> InputError:
    """Explain which of the configuration's settings no layout combines."""
    if cfg.moe_router_bias:
        return InputError("no published layout has moe_router_bias; train with another train.balance to publish")
    return InputError(
        f"no published layout has norm={cfg.norm}, qk_norm={cfg.qk_norm}, clip_qkv={cfg.clip_qkv}, "
        f"head_size={cfg.head_size}, tie_word_embeddings={cfg.tie_word_embeddings}, norm_eps={cfg.norm_eps} together: "
        + ", ".join(f"{layout.model_type} {layout.requirements}" for layout in LAYOUTS)
    )
