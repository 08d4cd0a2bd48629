"""`gristmill shards show`: the documents of one global batch, as the training read or will read them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gristmill import artifact
from gristmill.errors import InputError
from gristmill.inference.load import find_model
from gristmill.streaming import Batches, Remote, Stage
from gristmill.tokenizer import Tokenizer

EXCERPT = 64  # characters of a document that a line shows


def batch_text(path: Path, step: int, full: bool = False) -> Iterator[str]:
    """Lines: the step's sequences in their order, and the documents in each; `full` gives their whole text.

    path: a run folder with a checkpoint, or a checkpoint. Raises InputError where there is none or it has no such step.
    """
    checkpoint = artifact.load(find_model(path))
    if checkpoint.kind != "checkpoint":
        raise InputError(f"{checkpoint.path} is a {checkpoint.kind}; give a run folder, or a checkpoint of a training")
    train: dict[str, Any] = checkpoint.manifest["config"]["train"]
    curriculum = [Stage(**stage) for stage in checkpoint.manifest["config"]["curriculum"]]
    shards, tokenizer = (input_of(checkpoint, name) for name in ("shards", "tokenizer"))
    steps, length = train["steps"], train["seq_len"]
    url = artifact.load(shards).metrics.get("remote")
    remote = Remote(url=url) if url else None
    batches = Batches(shards, length, train["batch_tokens"] // length, steps, curriculum, train["seed"], remote)
    if not 0 <= step < steps:
        raise InputError(f"--step {step} must be from 0 to {steps - 1}")
    return lines(batches, Tokenizer.load(tokenizer), step, steps, length, full)


def input_of(checkpoint: artifact.Artifact, name: str) -> Path:
    folder = (checkpoint.path / checkpoint.manifest["inputs"][name]["path"]).resolve()
    if not folder.is_dir():
        raise InputError(f"{checkpoint.path} was trained with {folder}, which is not there any more")
    return folder


def lines(batches: Batches, tokenizer: Tokenizer, step: int, steps: int, length: int, full: bool) -> Iterator[str]:
    batch = batches.batch(step)
    _, windows = batches.samples(step)
    stage = batches.curriculum_stage(step)
    yield f"step {step:,} of {steps:,}: {len(windows)} sequences of {length:,} tokens, stage {stage} of the curriculum"
    for row, (source, window) in enumerate(zip(batch.sources.tolist(), windows.tolist(), strict=True)):
        name = batches.source_names[source]
        yield f"\nsequence {row}: {name}, window {window:,} of {batches.num_windows[source]:,}"
        ids, numbers = batch.tokens[row], batch.document_ids[row]
        for number in range(int(numbers[-1]) + 1):
            its = ids[numbers == number]
            begins = its[0] == tokenizer.eot_id
            text = tokenizer.decode(its[1 if begins else 0 :].tolist())
            shown = text if full else excerpt(text)
            yield f"  {np.count_nonzero(numbers == number):>5} tokens {' ' if begins else '…'} {shown}"


def excerpt(text: str) -> str:
    """One line: control characters as Python writes them."""
    short = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:EXCERPT])
    return short + ("…" if len(text) > EXCERPT else "")
