"""Which blocks of the key/value cache are whose. Pure: it knows numbers of blocks, not what is in them.

The cache is cut into blocks of some tokens each; a sequence has a list of them, its block table (PagedAttention, Kwon
et al., 2023, arXiv:2309.06180). A block that is full of known tokens is published under a hash of all tokens up to its
end, and other sequences that begin alike share it. When nobody has it any more it stays published, and the one that
was left longest ago is the first to be used for something else.
"""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence


def chained(previous: bytes | None, ids: Sequence[int], salt: str) -> bytes:
    """The name of a full block: of its ids, those of all blocks before it, and of whose they are.

    salt: a tenant. Of another one's blocks nothing can be learned, also not from how soon an answer comes. The hash is
    a cryptographic one: who could find two texts of one name could read the answer to another's.
    """
    if previous is None:
        previous = hashlib.sha256(salt.encode()).digest()
    return hashlib.sha256(previous + array("q", ids).tobytes()).digest()


class Blocks:
    """Every block is in one of three states: free (empty), idle (published, nobody's), or held by someone."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the one left longest ago first
        self._holders = [0] * num_blocks
        self._names: dict[int, bytes] = {}
        self._published: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        return len(self._free) + len(self._idle)

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The published blocks of the longest beginning of `names`."""
        found = []
        for name in names:
            if name not in self._published:
                break
            found.append(self._published[name])
        return found

    def would_leave(self, shared: Sequence[int], fresh: int) -> int:
        """How many blocks `take` would leave for others; negative where it takes none."""
        return self.available - sum(block in self._idle for block in shared) - fresh

    def take(self, shared: Sequence[int], fresh: int) -> list[int] | None:
        """Hold the blocks that `find` gave, and so many more that are empty; None, and no change, where too few are."""
        if self.would_leave(shared, fresh) < 0:
            return None
        for block in shared:
            self._idle.pop(block, None)
            self._holders[block] += 1
        return [*shared, *(self._fresh() for _ in range(fresh))]

    def _fresh(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._published[self._names.pop(block)]
        self._holders[block] = 1
        return block

    def publish(self, block: int, name: bytes) -> None:
        """The block is full, and will not be written again. Where another has the name already, it stays unknown."""
        assert self._holders[block] > 0
        if name not in self._published and block not in self._names:
            self._published[name] = block
            self._names[block] = name

    def forget(self) -> None:
        """Unpublish all blocks: what they hold is out of date."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._names.clear()
        self._published.clear()

    def give_back(self, blocks: Sequence[int]) -> None:
        """The last one becomes idle first: without its beginning the rest of a text is of no use to anyone."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0
            if self._holders[block] == 0:
                if block in self._names:
                    self._idle[block] = None
                else:
                    self._free.append(block)
