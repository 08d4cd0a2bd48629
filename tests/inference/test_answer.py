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
        assert length <= len(given_text.encode())  # no token before its text
        assert is_stopped <= stopped
    assert given_text == wanted
    assert is_stopped == stopped
    if not stopped:
        assert [token.id for token in tokens] == list(range(len(pieces)))


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    told = [text for text, _, _ in pour([b"x", b"a", b"b", b"a", b"c", b"a"], ("abc", "zz"))]
    assert told == ["x", "", "", "ab", "ac", "", "a"]


def test_without_a_tokenizer_tokens_go_out_at_once() -> None:
    answer = Answer(None, ())
    assert answer.feed(Token(5)) == ("", [Token(5)])
    assert answer.end() == ("", [])
