"""`gristmill shards show`: the documents of one global batch, as the training read or will read them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gristmill import artifact
from gristmill.errors import Failure, InputError
from gristmill.inference.load import find_model
from gristmill.streaming import Batch, Batches, MixPhase, Remote
from gristmill.tokenizer import Tokenizer
from gristmill.train.checkpoint import read_state
from gristmill.train.log import METRICS, read_metrics

EXCERPT = 64  # characters of a document that a line shows


def batch_text(
    path: Path, step: int, full: bool = False, remote: str | None = None, cache: str | None = None
) -> Iterator[str]:
    """Lines: the step's sequences in their order, and the documents in each; `full` gives their whole text.

    path: a run folder with a checkpoint, or a checkpoint. Shards that lie elsewhere are read from where training read
    them last, through the same cache; `remote` and `cache` say otherwise. Raises InputError where there is no
    checkpoint or it has no such step, Failure when its shards cannot be read.
    """
    checkpoint = artifact.load(find_model(path))
    if checkpoint.kind != "checkpoint":
        raise InputError(f"{checkpoint.path} is a {checkpoint.kind}; give a run folder, or a checkpoint of a training")
    train: dict[str, Any] = checkpoint.manifest["config"]["train"]
    curriculum = [MixPhase(**phase) for phase in checkpoint.manifest["config"]["curriculum"]]
    shards, tokenizer = (input_of(checkpoint, name) for name in ("shards", "tokenizer"))
    steps, length = train["steps"], train["seq_len"]
    source = source_of(checkpoint, shards, remote, cache)
    sequences = train["batch_tokens"] // length
    try:
        batches = Batches(shards, length, sequences, steps, curriculum, train["seed"], source, fetch_ahead=False)
        if not 0 <= step < steps:
            raise InputError(f"--step {step} must be from 0 to {steps - 1}")
        batch = batches.batch(step)
    except Failure as problem:
        raise Failure(f"{problem}; if the shards have moved, say where with --remote URL") from None
    skipped = step in read_state(checkpoint.path).guard.get("skipped", ())
    return lines(batches, batch, Tokenizer.load(tokenizer), step, steps, skipped, full)


def source_of(checkpoint: artifact.Artifact, shards: Path, remote: str | None, cache: str | None) -> Remote | None:
    """Where the shard files are, if not in `shards`."""
    built_from = artifact.load(shards).metrics.get("remote")
    if built_from is None:
        if remote or cache:
            raise InputError(f"the shards are in {shards}: leave --remote and --cache out")
        return None
    records = read_metrics(checkpoint.path.parent / METRICS)
    used = next((record["shards"] for record in reversed(records) if "shards" in record), {"url": built_from})
    given = {name: value for name, value in (("url", remote), ("cache", cache)) if value}
    return Remote(**(used | given))


def input_of(checkpoint: artifact.Artifact, name: str) -> Path:
    folder = (checkpoint.path / checkpoint.manifest["inputs"][name]["path"]).resolve()
    if not folder.is_dir():
        raise InputError(f"{checkpoint.path} was trained with {folder}, which is not there any more")
    return folder


def lines(
    batches: Batches, batch: Batch, tokenizer: Tokenizer, step: int, steps: int, skipped: bool, full: bool
) -> Iterator[str]:
    _, windows = batches.samples(step)
    stage = batches.curriculum_stage(step)
    size = f"{len(windows)} sequences of {batch.tokens.shape[1]:,} tokens"
    yield f"step {step:,} of {steps:,}: {size}, stage {stage} of the curriculum"
    if skipped:
        yield "left out by the guard: nothing was learned from it"
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
