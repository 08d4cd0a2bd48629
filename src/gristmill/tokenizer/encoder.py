"""The quick way from text to ids: tiktoken's encoder, for those tokenizer.json files whose ids it provably gives.

`tokenizers` merges first the pair whose merge was learned first, tiktoken the pair whose union has the lowest id. The
two agree when every merge made a new token, ids in order, and every token, written out in bytes, merges back to itself
in that one way: inside a piece, what lies between two final borders goes through the same steps as it would alone, so a
pair that makes a known token is always the pair that the merge names.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tiktoken
import tokenizers
from tokenizers import models

from gristmill.cpus import usable_cpus
from gristmill.tokenizer.gpt4 import is_table
from gristmill.tokenizer.layout import BLANKS, LINES_AND_WORDS, SPLIT_PATTERN

# SPLIT_PATTERN with a group around what needs no looking ahead. tiktoken's engine hands such a group to a linear
# automaton as a whole, and only blanks take its slow way: twice as fast as with the pattern that tiktoken ships.
GROUPED_PATTERN = f"(?:{LINES_AND_WORDS})|{BLANKS}"
PLAIN = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")  # all must be off
GROUP_CHARS = 1 << 18  # a thread's helping: much less costs more to hand out than to encode
# tiktoken's regular expression engine keeps its way through a run of blanks, and gives up at a million of them.
LONG_BLANK = 100_000


def quick_encoding(description: Mapping[str, Any], ranks: dict[bytes, int]) -> tiktoken.Encoding | None:
    """tiktoken's encoder with the ids of this parsed tokenizer.json (its model without added tokens), or None.

    None means that they could differ: another split, a normalizer, merges in another order. GPT-4's own ranks need
    no look at the merges: there tiktoken says what the ids are.
    """
    model = description["model"]
    if description.get("normalizer") or any(model.get(name) for name in PLAIN):
        return None
    if not _splits_as_ours(description.get("pre_tokenizer")):
        return None
    if not is_table(ranks) and not _lowest_id_first(model):
        return None
    return tiktoken.Encoding("gristmill", pat_str=GROUPED_PATTERN, mergeable_ranks=ranks, special_tokens={})


def has_long_blank(text: str) -> bool:
    """Whether a run of blanks in it could be too long for tiktoken; costs next to nothing."""
    starts = range(0, len(text) - LONG_BLANK + 1, LONG_BLANK)
    return any(text[start : start + LONG_BLANK].isspace() for start in starts)


def over_threads(
    encode: Callable[[Sequence[str]], list[list[int]]], texts: Sequence[str], threads: int | None = None
) -> list[list[int]]:
    """`encode` of all texts, in groups on `threads` threads (default: the cores that this process may use).

    Threads suffice: tiktoken works outside of the interpreter's lock. torch's threads are others.
    """
    threads = threads or usable_cpus()
    groups: list[list[str]] = [[]]
    chars = 0
    for text in texts:
        groups[-1].append(text)
        chars += len(text)
        if chars >= GROUP_CHARS:
            groups.append([])
            chars = 0
    if threads == 1 or len(groups) == 1:
        return encode(texts)
    with ThreadPoolExecutor(min(threads, len(groups)), "encode") as pool:
        return [ids for group in pool.map(encode, groups) for ids in group]


def _splits_as_ours(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether it splits by our pattern, spells the pieces in bytes, and does nothing else."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return False
    split, spell = steps
    return (
        split["pattern"] == {"Regex": SPLIT_PATTERN}
        # The second form says the same: keep what matches (the pattern matches everything), drop what is between.
        and (split["behavior"], split["invert"]) in (("Isolated", False), ("Removed", True))
        and (spell.get("add_prefix_space"), spell.get("use_regex")) == (False, False)
    )


def _lowest_id_first(model: Mapping[str, Any]) -> bool:
    """Whether these merges come to the same as merging what has the lowest id (see the top of this file)."""
    vocab = model["vocab"]
    split = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])  # two spellings
    merges = [(left, right) for left, right in split]
    made = [vocab.get(left + right, -1) for left, right in merges]
    if (
        sum(len(token) == 1 for token in vocab) != 256
        or len(vocab) != 256 + len(merges)
        or made != sorted({*made} - {-1})
        or any(part not in vocab for merge in merges for part in merge)
    ):
        return False
    alone = tokenizers.Tokenizer(models.BPE(vocab, merges)).encode_batch_fast(list(vocab), add_special_tokens=False)
    return all(encoding.ids == [id] for encoding, id in zip(alone, vocab.values(), strict=True))
