"""The export stage: a checkpoint becomes a Hugging Face `dbrx` directory, checked by opening it with transformers."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gristmill import artifact
from gristmill.artifact import Built
from gristmill.errors import Failure, InputError
from gristmill.hub.agreement import compare, compare_tokenizers
from gristmill.hub.card import model_card
from gristmill.hub.checkpoint import TOKENIZER, read_checkpoint
from gristmill.hub.dbrx import SpecialIds, write_dbrx
from gristmill.hub.tensors import assemble
from gristmill.progress import console
from gristmill.tokenizer import Tokenizer

MAX_CHECKED_TOKENS = 256  # of each held-out sequence


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`license` is the one that you give the model, as the hub spells it; "other" refers to the card's list.

    `checked_sequences` held-out sequences must give the same logits in transformers, `checked_greedy` of them also
    the same greedy continuation.
    """

    name: str = "gristmill-dbrx"
    license: str = "other"
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_shard_bytes: int = 5 * 10**9
    checked_sequences: int = 8
    checked_greedy: int = 4

    def __post_init__(self) -> None:
        for name in ("max_shard_bytes", "checked_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.checked_greedy <= self.checked_sequences:
            raise ValueError(
                f"checked_greedy={self.checked_greedy} must be from 0 to checked_sequences={self.checked_sequences}"
            )


def build_export(cfg: ExportConfig, checkpoint: Path, evaluation: Path, out: Path) -> Built:
    """Write the directory into the empty `out`, then compare it with ours on the evaluation's held-out texts.

    checkpoint: a checkpoint artifact with its `tokenizer/`. evaluation: an evaluation artifact.
    Metrics: export_max_logit_diff, export_max_logit, export_greedy_equal, export_greedy_ties.
    Raises Failure when transformers computes something else.
    """
    dtype: torch.dtype = getattr(torch, cfg.dtype)
    tokenizer = Tokenizer.load(checkpoint / TOKENIZER)
    shutil.copytree(checkpoint / TOKENIZER, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(artifact.MANIFEST))
    shape, tensors = read_checkpoint(checkpoint)
    ids = SpecialIds(eot_id=tokenizer.eot_id, pad_id=tokenizer.pad_id, im_end_id=tokenizer.im_end_id)
    write_dbrx(out, shape, tensors, ids, dtype=dtype, max_shard_bytes=cfg.max_shard_bytes)
    figures = _read_evaluation(evaluation)
    origin = artifact.lineage(checkpoint)
    card = model_card(cfg.name, cfg.license, shape, artifact.load(checkpoint), origin, figures)
    (out / "README.md").write_text(card, encoding="utf-8")

    console.print("  checking the export against transformers")
    texts = [sample["prompt"] + sample["truth"] for sample in figures["samples"]][: cfg.checked_sequences]
    if not texts:
        raise InputError(f"{evaluation} has no samples to check the export on; evaluate with samples of at least 1")
    compare_tokenizers(out, tokenizer, texts)
    limit = min(MAX_CHECKED_TOKENS, shape.max_seq_len)
    sequences = [[tokenizer.eot_id, *tokenizer.encode(text)][:limit] for text in texts]
    ours = assemble(shape, _rounded(read_checkpoint(checkpoint)[1], dtype))
    agreement = compare(out, ours, sequences, cfg.checked_greedy)
    return Built(metrics={f"export_{name}": value for name, value in asdict(agreement).items()})


def _rounded(tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor.to(dtype)


def _read_evaluation(path: Path) -> dict[str, Any]:
    file = path / "evaluation.json"
    try:
        figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is not an evaluation: it has no {file.name}") from None
    except ValueError as problem:
        raise Failure(f"{file} is damaged: {problem}") from None
    return figures
