"""Joins directories of MDS shards into one data set: an index over all of them, as MosaicML's `merge_index` writes."""

import json
from pathlib import Path
from typing import Any

from gristmill.artifact import write_atomically
from gristmill.errors import InputError
from gristmill.streaming.index import INDEX
from gristmill.streaming.mds import MDSReader


def merge(folder: Path) -> None:
    """Write `folder`/index.json: the shards of all directories below it, in order of their indexes' paths.

    Only indexes are read; shards stay where they are and are named relative to `folder`. A shard that several indexes
    name, as after an earlier merge below `folder`, is taken once.
    Raises InputError where there is nothing to merge, an index cannot be read here or columns differ.
    """
    indexes = sorted((file for file in folder.rglob(INDEX) if file.parent != folder), key=Path.as_posix)
    if not indexes:
        raise InputError(f"{folder} has no directory of shards below it: merge takes the directory above them")
    shards: dict[str, dict[str, Any]] = {}
    columns: dict[str, str] = {}
    for index in indexes:
        MDSReader(index.parent)  # says what is wrong with an index
        for shard in json.loads(index.read_text(encoding="utf-8"))["shards"]:
            found = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
            columns = columns or found
            if found != columns:
                raise InputError(f"{index} has columns {found}, {indexes[0]} {columns}: only equal ones can be merged")
            for part in filter(None, (shard["raw_data"], shard["zip_data"])):
                part["basename"] = (index.parent.relative_to(folder) / part["basename"]).as_posix()
            shards.setdefault(shard["raw_data"]["basename"], shard)
    merged = {"version": 2, "shards": list(shards.values())}  # MosaicML's bytes: these keys are not sorted
    write_atomically(folder / INDEX, json.dumps(merged).encode())
