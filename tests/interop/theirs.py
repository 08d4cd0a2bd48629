"""MosaicML Streaming's side of the tests, run by .interop/bin/python with `stub` on its path.

    theirs.py write OUT           a directory of shards for each compression, with every hash: OUT/plain, OUT/gz-0 ...
    theirs.py read FOLDER ...     compares every value and hash in directories of shards with rows.py
    theirs.py merge FOLDER
    theirs.py fixtures OUT        what lies in tests/streaming/fixtures/mosaicml-compressed, for the ordinary suite

Exits with 1 and says what is wrong where something is.
"""

import json
import sys
from pathlib import Path

from rows import COLUMNS, COMPRESSIONS, FEW_COLUMNS, SIZE_LIMIT, differences, folder_name, rows
from streaming import MDSWriter, StreamingDataset
from streaming.base.hashing import get_hash, get_hashes
from streaming.base.util import merge_index

FIXTURES = ("br", "bz2", "gz", "snappy", "zstd:7")


def write(out: Path, columns: dict[str, str], compression: str | None, hashes: list[str]) -> None:
    with MDSWriter(
        out=str(out), columns=columns, compression=compression, hashes=hashes, size_limit=SIZE_LIMIT
    ) as writer:
        for row in rows():
            writer.write({name: row[name] for name in columns})


def read(folder: Path) -> None:
    shards = json.loads((folder / "index.json").read_text())["shards"]
    # Unpacks shards beside the packed files, and checks their first hash.
    dataset = StreamingDataset(
        local=str(folder), batch_size=1, keep_zip=True, validate_hash=min(shards[0]["hashes"], default=None)
    )
    expected = rows()
    assert len(dataset) in (len(expected), 2 * len(expected), 3 * len(expected)), f"{folder} has {len(dataset)} samples"
    for i in range(len(dataset)):
        wrong = differences(dataset[i], expected[i % len(expected)])
        assert not wrong, f"{folder}, sample {i}: {wrong} differ"
    for info in [shard[part] for shard in shards for part in ("raw_data", "zip_data") if shard[part]]:
        data = (folder / info["basename"]).read_bytes()
        for name, value in info["hashes"].items():
            assert get_hash(name, data) == value, f"{folder}, {info['basename']}: {name} differs"


def main(verb: str, *folders: str) -> None:
    paths = [Path(name) for name in folders]
    match verb:
        case "write":
            for compression in COMPRESSIONS:
                write(paths[0] / folder_name(compression), COLUMNS, compression, sorted(get_hashes()))
        case "read":
            for path in paths:
                read(path)
        case "merge":
            merge_index(folders[0])
        case "fixtures":
            for compression in FIXTURES:
                write(paths[0] / folder_name(compression), FEW_COLUMNS, compression, ["sha1"])


if __name__ == "__main__":
    main(*sys.argv[1:])
