"""Finds what is current in a run folder: by the names that the run wrote, never by a file's time.

    manifest.json              of a finished run: names the artifact of every stage
    .state/stages.json         of a run at work or interrupted: stage -> its folder, as far as the last call came
    train/KEY/latest           names the newest checkpoint of a training
    train/KEY/step-00001200/   a checkpoint

A copy, a restored backup and a changed clock keep these names. Where they are absent, a stage with one artifact is
unambiguous, and the steps in the names of one training's checkpoints have an order. Anything else is an error that
lists the candidates.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from gristmill.artifact import MANIFEST, STATE, Artifact, load, load_ours, write_atomically
from gristmill.errors import Failure, InputError

LATEST = "latest"
TOKENIZER = "tokenizer"  # the folder in a checkpoint that makes it usable without its run
STAGES_FILE = "stages.json"
NAMED = 6  # candidates that an error lists


def record_stage(run: Path, name: str, folder: Path, order: Sequence[str]) -> None:
    """Make `folder` the current one of a stage. A change drops the stages after it: they were made from another."""
    known, path = recorded_stages(run), folder.relative_to(run).as_posix()
    if known.get(name) != path:
        before = order[: order.index(name)]
        kept = {stage: known[stage] for stage in before if stage in known} | {name: path}
        write_atomically(run / STATE / STAGES_FILE, json.dumps(kept, indent=2).encode())


def recorded_stages(run: Path) -> dict[str, str]:
    """Stage -> its folder below `run`; empty where no call recorded any."""
    file = run / STATE / STAGES_FILE
    try:
        parsed = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict) or not all(isinstance(path, str) for path in parsed.values()):
        raise Failure(f"{file} is damaged; remove it, then run the recipe again, or name an artifact instead of {run}")
    return parsed


def find_stages(run: Path, order: Sequence[str]) -> dict[str, Path]:
    """Stage -> its current artifact, of a run that is not finished.

    Raises InputError where a stage has several artifacts and nothing names one.
    """
    recorded, found = recorded_stages(run), {}
    for name in order:
        if recorded:
            folders = [run / recorded[name]] if name in recorded else []
        else:
            folders = [path for path in sorted((run / name).glob("*")) if _is_committed(path) or _steps(path)]
        if len(folders) > 1:
            raise InputError(f"{run}: nothing says which {name} is current; {_listed(folders)}; run the recipe again")
        if folders and (path := find_latest(folders[0]) if name == "train" else folders[0]):
            found[name] = path
    return found


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that `path` stands for: a run folder, a training's folder, or an artifact made from a checkpoint.

    None where there is none. Raises InputError where there are several and nothing names one, Failure where the one
    that is named is missing or damaged.
    """
    made = load_ours(path)
    if made and (trained := made.manifest["inputs"].get("train")):
        named = Path(os.path.normpath(path / trained["path"]))
        if not _is_committed(named):
            raise Failure(f"{path / MANIFEST} names {named}, which is missing; copy the whole run folder")
        return named
    trainings = [folder for folder in sorted(path.glob("train/*")) if _steps(folder)]
    if not trainings:
        return find_latest(path)
    current = recorded_stages(path).get("train")
    chosen = path / current if current else trainings[0]
    if chosen not in trainings or (current is None and len(trainings) > 1):
        several = f"it has {len(trainings)} trainings and nothing says which is current"
        why = f"its current training, {current}, has no checkpoint yet" if current else several
        raise InputError(f"{path}: {why}; {_listed(trainings)}")
    return find_latest(chosen)


def find_latest(training: Path) -> Path | None:
    """The newest checkpoint of a training's folder: the one that `latest` names, else the one of the highest step.

    None where there is none. Raises Failure where it is missing or damaged.
    """
    steps, file = _steps(training), training / LATEST
    if not steps:
        return None
    chosen = steps[-1]
    if os.path.lexists(file):
        name = file.read_bytes().decode(errors="replace").strip() if file.is_file() else ""
        chosen = training / name
        if chosen not in steps:
            raise Failure(f"{file} names {name!r}, which is not a checkpoint there; {_listed(steps)}")
    try:
        load(chosen)
    except Failure as damage:
        raise Failure(f"{damage}; {_listed([step for step in steps if step != chosen])}") from None
    return chosen


def find_ancestor(made: Artifact, kind: str) -> Artifact | None:
    """The nearest artifact of a kind that `made` descends from, if it is still in its place with the same content."""
    level = [(made.path, made.manifest)]
    while level:
        above = []
        for base, manifest in level:
            for _, entry in sorted(manifest["inputs"].items()):
                place = Path(os.path.normpath(base / entry["path"]))
                if entry["kind"] == kind:
                    found = load_ours(place)
                    return found if found and found.content == entry["content"] else None
                above.append((place, entry))
        level = above
    return None


def step_folders(training: Path) -> list[Path]:
    """Those of checkpoints, ascending; a folder that a user put there under another name is the user's."""
    return sorted(path for path in training.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def _steps(training: Path) -> list[Path]:
    return [path for path in step_folders(training) if _is_committed(path)]


def _is_committed(path: Path) -> bool:
    return (path / MANIFEST).exists()


def _listed(paths: Iterable[Path]) -> str:
    names = [str(path) for path in paths]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"name one of: {', '.join(names[:NAMED])}{more}" if names else "there is no other"
