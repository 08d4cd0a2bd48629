"""Checkpoints: `step-00001200/`, an artifact of safetensors and JSON that holds all that training needs to go on.

    model.safetensors      fp32 masters            model.json   the model's shape
    optimizer.safetensors  the optimizer by name   state.json   step, and the settings that decide rounding
    tokenizer/             so that a checkpoint is usable alone

and, of a training that went on from a published model, that one's papers and generation settings.

The files hold no clock and no path: the same training gives the same bytes.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from gristmill.artifact import MANIFEST, Artifact, Built, canonical, commit, load, prepare, verify
from gristmill.errors import Failure
from gristmill.hub.checkpoint import CONFIG, TOKENIZER
from gristmill.hub.folder import DOCUMENTS, GENERATION
from gristmill.hub.tensors import in_memory, save_tensors, write_weights
from gristmill.model import ModelConfig

OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Identity:
    """What a checkpoint's manifest says of where it comes from; the same for all checkpoints of one training."""

    key: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Artifact]


@dataclass(frozen=True)
class State:
    """`compute`: device, dtype, threads, kernels. They decide how sums are rounded: enforced when training goes on."""

    step: int
    compute: dict[str, Any]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    state: State,
    model_cfg: ModelConfig,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    tokenizer: Path,
    start: Path | None,
    identity: Identity,
    metrics: Mapping[str, Any],
) -> Artifact:
    path = prepare(checkpoint_path(folder, state.step))
    write_weights(path, in_memory(model))
    (path / CONFIG).write_bytes(canonical(asdict(model_cfg)))
    save_tensors(path / OPTIMIZER, optimizer)
    (path / "state.json").write_bytes(canonical(asdict(state)))
    shutil.copytree(tokenizer, path / TOKENIZER, ignore=shutil.ignore_patterns(MANIFEST))
    if start and (start / DOCUMENTS).is_dir():
        shutil.copytree(start / DOCUMENTS, path / DOCUMENTS)
    if start and (start / GENERATION).is_file():
        shutil.copyfile(start / GENERATION, path / GENERATION)
    return commit(
        path,
        kind="checkpoint",
        key=identity.key,
        config=identity.config,
        inputs=identity.inputs,
        built=Built(metrics=dict(metrics)),
    )


def read_state(checkpoint: Path) -> State:
    return State(**json.loads((checkpoint / "state.json").read_text()))


def read_optimizer(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / OPTIMIZER)


def latest_checkpoint(folder: Path, key: str) -> tuple[Artifact | None, list[str]]:
    """The newest checkpoint under this key whose every byte is right, and what is wrong with newer ones."""
    damage: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        if not (path / MANIFEST).exists():
            continue  # saving it was interrupted
        try:
            artifact, problems = load(path), verify(path).problems
        except Failure as failure:
            damage.append(str(failure))
            continue
        if problems:
            damage += problems
        elif artifact.key == key:
            return artifact, damage
    return None, damage


def discard_unusable(folder: Path, step: int) -> None:
    """Remove what training cannot go on from: checkpoints beyond `step`, which are damaged, and half-written ones."""
    for path in sorted(folder.glob("step-*")):
        if path > checkpoint_path(folder, step) or not (path / MANIFEST).exists():
            _remove(path)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`."""
    for path in sorted(folder.glob("step-*"))[:-keep]:
        _remove(path)


def _remove(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)  # first, so that a half-removed checkpoint does not count
    shutil.rmtree(path)
