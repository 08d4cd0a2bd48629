"""Which rows of tokens are scored together, and what they have in common is computed once. Pure: no tensors."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Share(NamedTuple):
    """Row number `number`. Its first `begin` tokens, which fill blocks, are those of the row before it in its batch.
    `blocks` hold all of its tokens."""

    number: int
    begin: int
    blocks: list[int]


def batches(
    rows: Sequence[Sequence[int]], shareable: Sequence[bool], budget_tokens: int, block_tokens: int
) -> Iterator[list[Share]]:
    """All rows, in the order of their tokens, so that those that begin alike follow one another; in batches of about
    `budget_tokens` to compute. A row of a batch's first blocks is number 0. What is not shareable begins anew.
    """
    batch: list[Share] = []
    computed = used = 0
    order = sorted(range(len(rows)), key=lambda number: (not shareable[number], list(rows[number])))
    for number in order:
        row = rows[number]
        if batch and computed + len(row) > budget_tokens:
            yield batch
            batch, computed, used = [], 0, 0
        begin, blocks = 0, []
        if batch and shareable[number] and shareable[batch[-1].number]:
            # The last common token predicts another one here: it is not of the common part.
            begin = max(0, common(rows[batch[-1].number], row) - 1) // block_tokens * block_tokens
            blocks = batch[-1].blocks[: begin // block_tokens]
        new = -(-(len(row) - begin) // block_tokens)
        batch.append(Share(number, begin, [*blocks, *range(used, used + new)]))
        computed, used = computed + len(row) - begin, used + new
    if batch:
        yield batch


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
