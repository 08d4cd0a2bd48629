"""Text to ids with GPT-4's table: differences from tiktoken (none), and megabytes a second on one core.

    python benchmarks/tokenizer.py [MEGABYTES]

The text is what this machine has: installed packages' sources and documents, JSON, messages translated into some
hundred languages, and generated Unicode of all planes. No file comes twice. tiktoken's own cl100k_base, ours and
`tokenizers` encode the same new texts in turn; medians are printed and written to tokenizer.json beside this file. A
core's seconds are the thread's own, so that other work on the machine disturbs less.
"""

import gettext
import hashlib
import json
import operator
import os
import random
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import tiktoken
from transformers import AutoTokenizer

from gristmill.tokenizer import Tokenizer, write_gpt4
from gristmill.tokenizer.gpt4 import ADDRESS, IN_PACKAGE, PACKAGE
from gristmill.tokenizer.layout import GPT4_SPECIAL_IDS
from gristmill.train.machine import describe_machine

ROUNDS = 9
ROUND_BYTES = 4 << 20
LARGEST_FILE = 4 << 20
ROOTS = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "/usr/share", "/usr/lib", "/usr/include")
# What each kind may have of the whole; what a kind lacks, code fills up.
SHARES = {"messages": 0.25, "documents": 0.15, "json": 0.1, "unicode": 0.15, "code": 1.0}
KINDS = {
    "documents": {".md", ".rst", ".txt", ".html", ".xml", ""},
    "json": {".json", ".yaml", ".yml", ".toml"},
    "code": {".py", ".pyi", ".h", ".hpp", ".c", ".js", ".ts", ".css", ".pm", ".pl", ".vim", ".sh"},
    "messages": {".mo"},
}
PLANES = [*range(4), 14, 15, 16]


def files() -> Iterator[Path]:
    seen = set()
    for root in ROOTS:
        for folder, _, names in os.walk(root):
            for name in sorted(names):
                real = os.path.realpath(os.path.join(folder, name))
                if real not in seen and os.path.isfile(real) and os.path.getsize(real) <= LARGEST_FILE:
                    seen.add(real)
                    yield Path(real)


def read(file: Path, kind: str) -> str | None:
    try:
        if kind != "messages":
            content = file.read_bytes()
            return None if b"\0" in content else content.decode()
        with file.open("rb") as handle:
            catalog = gettext.GNUTranslations(handle)._catalog  # type: ignore[attr-defined]
        return "\n".join(text for text in catalog.values() if isinstance(text, str))
    except (OSError, ValueError, LookupError, AttributeError):
        return None


def generated(seed: int = 1) -> Iterator[str]:
    """Texts of a script or two each: characters of random blocks, with blanks, digits and marks among them."""
    chance = random.Random(seed)
    while True:
        pieces = []
        for _ in range(chance.randrange(1, 60)):
            start = (chance.choice(PLANES) << 16) + chance.randrange(0x10000 - 128)
            points = (start + chance.randrange(128) for _ in range(chance.randrange(1, 60)))
            pieces.append("".join(chr(c) for c in points if not 0xD800 <= c < 0xE000))
            pieces.append(
                chance.choice([" ", "  ", "\n", " \n\t", "'s", "'\u017f", "1234", "\u3000", "\u0301", ".", ""])
            )
        yield "".join(pieces)


def gather(budget: int) -> dict[str, list[str]]:
    kind_of = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes}
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for file in files():
        if kind := kind_of.get(file.suffix):
            found[kind].append(file)
    texts: dict[str, list[str]] = {}
    seen: set[bytes] = set()
    left = budget
    for kind, share in SHARES.items():
        wanted, texts[kind] = min(left, int(share * budget)), []
        random.Random(0).shuffle(found.get(kind, []))
        source = generated() if kind == "unicode" else (read(file, kind) for file in found[kind])
        for text in source:
            if wanted <= 0:
                break
            key = hashlib.sha256(text.encode()).digest() if text else b""
            if text and key not in seen:
                seen.add(key)
                texts[kind].append(text)
                wanted -= len(text.encode())
                left -= len(text.encode())
    return texts


def released(folder: Path) -> tiktoken.Encoding:
    """tiktoken's own, from the package's copy of the table put where a download would lie."""
    shutil.copy(
        str(metadata.distribution(PACKAGE).locate_file(IN_PACKAGE)), folder / hashlib.sha1(ADDRESS.encode()).hexdigest()
    )
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    return tiktoken.get_encoding("cl100k_base")


def differences(texts: list[str], ours: Tokenizer, reference: tiktoken.Encoding, auto: Any) -> dict[str, int]:
    """Texts whose ids differ. AutoTokenizer reads special tokens' names as control tokens: such texts it skips."""
    counts = {"texts": 0, "ids": 0, "from_tiktoken": 0, "from_auto_tokenizer": 0, "not_given_to_auto_tokenizer": 0}
    remaining = iter(texts)
    while chunk := list(islice(remaining, 200)):
        ids = ours.encode_batch(chunk)
        counts["texts"] += len(chunk)
        counts["ids"] += sum(map(len, ids))
        counts["from_tiktoken"] += sum(map(operator.ne, ids, reference.encode_ordinary_batch(chunk)))
        plain = [i for i, text in enumerate(chunk) if not any(name in text for name in GPT4_SPECIAL_IDS)]
        counts["not_given_to_auto_tokenizer"] += len(chunk) - len(plain)
        theirs = auto([chunk[i] for i in plain], return_attention_mask=False)["input_ids"] if plain else []
        counts["from_auto_tokenizer"] += sum(ids[i] != other for i, other in zip(plain, theirs, strict=True))
    return counts


def speeds(texts: list[str], ways: dict[str, Callable[[str], Any]]) -> dict[str, list[float]]:
    """MB per second of one thread, a figure a round: each round has new texts, which all ways encode in turn."""
    random.Random(2).shuffle(texts)
    remaining = iter(texts)
    round_bytes = min(ROUND_BYTES, sum(map(len, texts)) // ROUNDS)
    figures: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS):
        chosen, size = [], 0
        while size < round_bytes and (text := next(remaining, None)) is not None:
            chosen.append(text)
            size += len(text.encode())
        first = number % len(ways)
        for way in [*ways][first:] + [*ways][:first]:
            started = time.thread_time()
            for text in chosen:
                ways[way](text)
            figures[way].append(size / (time.thread_time() - started) / 1e6)
    return figures


def main(megabytes: str = "100") -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each; `differences` needs no speed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_gpt4(folder)
        ours, reference, auto = Tokenizer.load(folder), released(folder), AutoTokenizer.from_pretrained(folder)
    by_kind = gather(int(float(megabytes) * 1e6))
    texts = [text for kind in by_kind.values() for text in kind]
    megabytes_of = {kind: round(sum(len(text.encode()) for text in each) / 1e6, 1) for kind, each in by_kind.items()}
    load = os.getloadavg()[0]
    library = auto.backend_tokenizer
    figures = speeds(
        texts,
        {
            "gristmill": ours.encode,
            "tiktoken": reference.encode_ordinary,
            "tokenizers": lambda text: library.encode_batch_fast([text], add_special_tokens=False)[0].ids,
        },
    )
    started = time.perf_counter()
    ours.encode_batch(texts)
    all_cores = sum(megabytes_of.values()) / (time.perf_counter() - started)
    ratios = [a / b for a, b in zip(figures["gristmill"], figures["tiktoken"], strict=True)]
    result = {
        "machine": describe_machine(),
        "load_at_start_and_end": [round(load, 1), round(os.getloadavg()[0], 1)],
        "versions": {name: metadata.version(name) for name in ("tiktoken", "tokenizers", "transformers")},
        "megabytes": megabytes_of,
        "differences": differences(texts, ours, reference, auto),
        "mb_per_core_second": {way: round(statistics.median(each), 2) for way, each in figures.items()},
        "mb_per_core_second_rounds": {way: [round(x, 2) for x in each] for way, each in figures.items()},
        "times_tiktoken": round(statistics.median(ratios), 2),
        "mb_per_second_batch": round(all_cores, 1),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['machine']['cpu']}, load {load:.1f}; {megabytes_of} MB")
    print(f"differences: {result['differences']}")
    for way, figure in result["mb_per_core_second"].items():
        print(f"{way:<10} {figure:>6.1f} MB/s on a core")
    print(f"{result['times_tiktoken']} times tiktoken; a batch on all cores {all_cores:.1f} MB/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
