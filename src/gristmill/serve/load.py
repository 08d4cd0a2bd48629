"""The model that is served: the one place where it is loaded."""

from dataclasses import dataclass
from pathlib import Path

import torch

from gristmill.hub.folder import open_model
from gristmill.hub.importing import chat_template
from gristmill.inference import Engine, EngineConfig, find_model, load_engine
from gristmill.inference.settings import Published, published_sampling
from gristmill.tokenizer import Tokenizer
from gristmill.tokenizer.layout import IM_START


@dataclass(frozen=True, kw_only=True)
class Served:
    """no_chat: why it holds no conversations; None when it does. published: its own settings for generation."""

    engine: Engine
    tokenizer: Tokenizer
    published: Published
    no_chat: str | None = None

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.engine.scheduler.context

    @property
    def experts(self) -> dict[str, int] | None:
        """How many there are; None of a dense model."""
        cfg = self.engine.model.cfg
        if cfg.ffn != "moe":
            return None
        return {"layers": cfg.n_layers, "experts": cfg.moe_num_experts, "per_token": cfg.moe_top_k}

    @property
    def vocab_size(self) -> int:
        return self.engine.model.wte.num_embeddings


def load(
    path: Path, cfg: EngineConfig | None = None, dtype: str | None = None, memory_bytes: int | None = None
) -> Served:
    """Load a model to serve; see `load_engine` for the arguments.

    Raises InputError when `path` holds no model, Failure when the model is damaged.
    """
    folder = find_model(path)
    engine = load_engine(folder, cfg, None if dtype is None else getattr(torch, dtype), memory_bytes)
    assert engine.tokenizer is not None
    its_tokenizer = open_model(folder).tokenizer
    return Served(
        engine=engine,
        tokenizer=engine.tokenizer,
        published=published_sampling(folder),
        no_chat=why_no_chat(chat_template(its_tokenizer) if its_tokenizer else None),
    )


def why_no_chat(template: str | None) -> str | None:
    if template is None:
        return "this model has no chat template: it continues texts; use /v1/completions"
    if IM_START not in template:
        return "this model's chat template is not ChatML, the one that is known here; use /v1/completions"
    return None
