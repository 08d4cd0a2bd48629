"""The allocator under random operations, beside a model of it that keeps every block's owner in plain sets."""

import random

from gristmill.inference.blocks import Blocks, chained


def check(blocks: Blocks, held: list[list[int]]) -> None:
    """No leak, no overlap but of published blocks, and names that lead to what they name."""
    holders = [0] * blocks.num_blocks
    for table in held:
        assert len(set(table)) == len(table)
        for block in table:
            holders[block] += 1
    assert blocks._holders == holders
    free, idle = set(blocks._free), set(blocks._idle)
    assert len(free) == len(blocks._free)
    assert not free & idle
    assert free | idle == {block for block, count in enumerate(holders) if count == 0}
    assert idle <= set(blocks._names)
    assert not free & set(blocks._names)
    assert {name: block for block, name in blocks._names.items()} == blocks._published
    assert all(holders[block] == 1 or block in blocks._names for table in held for block in table)


def test_10000_random_operations_lose_no_block_and_give_none_twice() -> None:
    operations = 0
    for seed in range(25):
        chance = random.Random(seed)
        blocks, held = Blocks(chance.choice((1, 7, 40))), []
        tables: list[list[bytes | None]] = []  # the names of what each holder's blocks have, None where not full yet
        texts = [[chained(None, [text], "")] for text in range(4)]
        for names in texts:
            for number in range(5):
                names.append(chained(names[-1], [number], ""))
        for _ in range(400):
            operations += 1
            if held and chance.random() < 0.4:
                number = chance.randrange(len(held))
                tables.pop(number)
                blocks.give_back(held.pop(number))
            elif held and chance.random() < 0.3:
                number = chance.randrange(len(held))
                names = tables[number]
                if None in names:
                    at = names.index(None)
                    text = (
                        chance.choice(texts) if at == 0 else next((t for t in texts if t[at - 1] == names[at - 1]), [])
                    )
                    if at < len(text):
                        blocks.publish(held[number][at], text[at])
                        names[at] = text[at]
            else:
                wanted = chance.choice(texts)[: chance.randrange(6)]
                shared, fresh, before = blocks.find(wanted), chance.randrange(6), blocks.available
                left = blocks.would_leave(shared, fresh)
                taken = blocks.take(shared, fresh)
                assert (taken is None) == (left < 0)
                assert blocks.available == (before if taken is None else left)
                if taken is not None:
                    assert len(taken) == len(shared) + fresh
                    held.append(taken)
                    tables.append([*wanted[: len(shared)], *[None] * fresh])
            check(blocks, held)
        for table in held:
            blocks.give_back(table)
        check(blocks, [])
        assert blocks.available == blocks.num_blocks
    assert operations == 10_000


def test_what_was_left_longest_ago_is_used_first_and_a_texts_end_before_its_beginning() -> None:
    blocks, names = Blocks(4), [chained(None, [i], "") for i in range(4)]
    first, second = blocks.take((), 2), blocks.take((), 2)
    assert first is not None
    assert second is not None
    for table, its in ((first, names[:2]), (second, names[2:])):
        for block, name in zip(table, its, strict=True):
            blocks.publish(block, name)
    blocks.give_back(second)
    blocks.give_back(first)
    for name in (names[3], names[2], names[1], names[0]):
        assert blocks.find([name])
        blocks.take((), 1)
        assert not blocks.find([name])
    assert blocks.take((), 1) is None


def test_a_name_depends_on_the_tenant_the_ids_and_all_that_came_before() -> None:
    start = chained(None, [1, 2], "a")
    others = {
        chained(None, [1, 2], "b"),
        chained(None, [2, 1], "a"),
        chained(start, [1, 2], "a"),
        chained(None, [1], "a"),
    }
    assert len({start, *others}) == 5
    assert chained(None, [1, 2], "a") == start
