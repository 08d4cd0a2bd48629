"""Stop strings and characters over the borders of tokens. The tokenizer here: a token is one byte or a few."""

from collections.abc import Iterator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gristmill.inference.answer import Answer
from gristmill.inference.requests import Token
from gristmill.tokenizer.tokenizer import StreamDecoder

alphabet = st.sampled_from(["a", "b", "é", "ab", "ba ", "\N{WATERMELON}"])


class Pieces:
    """Stands for a tokenizer: id i is the i-th piece of bytes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(self.pieces[id] for id in ids)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    borders = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[start:end] for start, end in pairwise(borders)]


def pour(pieces: list[bytes], stop: tuple[str, ...]) -> Iterator[tuple[str, list[Token], bool]]:
    answer = Answer(StreamDecoder(Pieces(pieces)), stop)  # type: ignore[arg-type]
    for id in range(len(pieces)):
        yield *answer.feed(Token(id)), answer.is_stopped
        if answer.is_stopped:
            return
    yield *answer.end(), answer.is_stopped


@given(
    st.lists(alphabet).map("".join), st.lists(st.integers(0, 99)), st.lists(alphabet.map(lambda x: x * 2), max_size=3)
)
def test_the_text_ends_before_the_first_stop_string_and_no_part_of_one_is_ever_out(
    text: str, borders: list[int], stops: list[str]
) -> None:
    pieces = cut(text.encode(), borders)
    # The reference knows the whole text after each token: it stops at the first after which a stop string is there.
    seen, wanted, stopped = b"", text, False
    for piece in pieces:
        seen += piece
        places = [at for stop in stops if (at := seen.decode(errors="ignore").find(stop)) >= 0]
        if places:
            wanted, stopped = seen.decode(errors="ignore")[: min(places)], True
            break
    given_text, tokens = "", []
    for more, its, is_stopped in pour(pieces, tuple(stops)):
        given_text += more
        tokens += its
        assert wanted.startswith(given_text)
        length = len(b"".join(pieces[token.id] for token in tokens))
        assert is_stopped or length <= len(given_text.encode())  # no token before its text
        assert is_stopped <= stopped
    assert given_text == wanted
    assert is_stopped == stopped
    assert [token.id for token in tokens] == list(range(len(tokens)))
    assert b"".join(pieces[: len(tokens)]) == (seen if stopped else text.encode())  # all that were made, which cover it


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    told = [text for text, _, _ in pour([b"x", b"a", b"b", b"a", b"c", b"a"], ("abc", "zz"))]
    assert told == ["x", "", "", "ab", "ac", "", "a"]


def test_the_token_in_which_a_stop_string_begins_comes_with_its_text() -> None:
    for stop in ("lo", "lo wor", "o"):
        told = list(pour([b"hel", b"lo", b" wo", b"rld", b"!"] if stop != "o" else [b"he", b"llo", b"!"], (stop,)))
        text, tokens = "".join(text for text, _, _ in told), [token.id for _, its, _ in told for token in its]
        assert (text, told[-1][2]) == ("hel" if stop != "o" else "hell", True)
        assert tokens == {"lo": [0, 1], "lo wor": [0, 1, 2, 3], "o": [0, 1]}[stop]


def test_a_stop_string_within_a_character_that_is_not_whole_yet_releases_its_tokens_too() -> None:
    mill = "\N{WATERMELON}".encode()
    told = list(pour([b"ab", b"c" + mill[:2], mill[2:]], ("c",)))
    assert [("".join(t for t, _, _ in told)), [token.id for _, its, _ in told for token in its]] == ["ab", [0, 1]]


def test_without_a_tokenizer_tokens_go_out_at_once() -> None:
    answer = Answer(None, ())
    assert answer.feed(Token(5)) == ("", [Token(5)])
    assert answer.end() == ("", [])
