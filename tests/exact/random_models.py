"""Random small models of the two published layouts: a pure function from a layout and a seed."""

import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gristmill.hub import in_memory, write_published
from gristmill.model import ModelConfig, Transformer, init_weights

Layout: TypeAlias = Literal["dbrx", "qwen3_moe"]
LAYOUTS: tuple[Layout, ...] = ("dbrx", "qwen3_moe")
LONGEST = 150  # tokens of a document: beyond one tile of 128 queries of our attention
NEW_TOKENS = 64
COUNT = int(os.environ.get("GRISTMILL_EXACT", "8"))  # models of each layout


@dataclass(frozen=True)
class Case:
    """`lengths`: the documents of a batch, in tokens."""

    layout: Layout
    seed: int
    cfg: ModelConfig
    lengths: tuple[int, ...]

    def tokens(self, draw: int = 0) -> list[list[int]]:
        chance = random.Random(f"{self.layout} {self.seed} tokens {draw}")
        assert self.cfg.vocab_size is not None
        return [[chance.randrange(self.cfg.vocab_size) for _ in range(length)] for length in self.lengths]

    def model(self) -> Transformer:
        """Weights so large that every part of the model matters to the logits, the norms' scales included."""
        torch.manual_seed(self.seed)
        model = init_weights(Transformer(self.cfg), self.seed)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        return model

    def write(self, folder: Path, model: Transformer, dtype: torch.dtype | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_published(folder, self.cfg, in_memory(model.state_dict()), None, dtype=dtype)


def draw(layout: Layout, seed: int, *, longest: int = LONGEST) -> Case:
    chance = random.Random(f"{layout} {seed}")
    heads = chance.choice((1, 2, 3, 4, 6, 8))
    head_size = chance.choice([size for size in (2, 4, 6, 8, 16, 32) if 16 <= heads * size <= 96])
    experts = chance.choice((1, 2, 3, 4, 7, 8, 16, 16))
    cfg = ModelConfig(
        d_model=heads * head_size,
        n_layers=chance.randint(1, 3),
        n_heads=heads,
        kv_n_heads=chance.choice([kv for kv in range(1, heads + 1) if heads % kv == 0]),
        max_seq_len=longest + NEW_TOKENS,
        vocab_size=chance.choice((40, 97, 256, 300)),
        rope_theta=chance.choice((10000.0, 500000.0, 10 ** chance.uniform(2, 6))),
        clip_qkv=chance.choice((0.25, 1.0, 3.0, 8.0, None)),
        ffn_hidden_size=chance.choice((1, 24, 33, 64, 64)),
        moe_num_experts=experts,
        moe_top_k=chance.randint(1, experts),
        moe_normalize_expert_weights=chance.choice((None, 1.0, 2.0)),
        initializer_range=0.2,
    )
    if layout == "qwen3_moe":
        cfg = replace(
            cfg,
            d_model=chance.choice((16, 25, 48, 64, 96)),
            head_size=head_size,
            clip_qkv=None,
            norm="rms_norm",
            norm_eps=chance.choice((1e-6, 1e-5, 1e-2)),
            qk_norm=True,
            tie_word_embeddings=chance.random() < 0.5,
            moe_normalize_expert_weights=chance.choice((None, 1.0)),
        )
        if cfg.head_dim * heads == cfg.d_model:
            cfg = replace(cfg, head_size=None)  # the one spelling of a usual head size
    lengths = [chance.randint(2, longest), *(chance.choice((1, 2, chance.randint(3, longest))) for _ in range(3))]
    return Case(layout, seed, cfg, tuple(lengths[: chance.randint(1, 4)]))


# ---- our forward passes over a ragged batch ------------------------------------------------------------


def packed_row(documents: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, positions, document ids), each [1, S]: all documents in one row, as training packs them."""
    tokens = torch.tensor([[token for document in documents for token in document]])
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    ids = torch.cat([torch.full((len(document),), number) for number, document in enumerate(documents)])[None]
    return tokens, positions, ids


def padded_rows(documents: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(tokens, mask of the real ones), each [B, S]: a document a row, padded on the right with token 0."""
    longest = max(map(len, documents))
    tokens = torch.tensor([[*document, *[0] * (longest - len(document))] for document in documents])
    mask = torch.tensor([[1] * len(document) + [0] * (longest - len(document)) for document in documents])
    return tokens, mask
