"""An answer's text as it grows, up to a stop string, no part of which ever comes out; and the tokens of that text."""

from collections import deque
from collections.abc import Sequence

from gristmill.inference.requests import Token
from gristmill.tokenizer.tokenizer import StreamDecoder


class Answer:
    """decoder: None where there is no tokenizer; then there are tokens and no text."""

    def __init__(self, decoder: StreamDecoder | None, stop: Sequence[str]) -> None:
        self.is_stopped = False
        self._decoder, self._stop = decoder, stop
        self._held = ""  # text that may be the beginning of a stop string
        self._given = 0  # characters
        self._unfinished: list[Token] = []  # tokens whose last character is not whole
        self._waiting: deque[tuple[int, Token]] = deque()  # where a token's text ends, and the token

    def feed(self, token: Token) -> tuple[str, list[Token]]:
        """Add a token. Returns the text that can no longer change, and the tokens whose text is out.

        The token that completes a stop string releases all tokens: the one that the stop string begins in is part of
        the text, and each token that was made has its place in the log-probabilities.
        """
        if self._decoder is None:
            return "", [token]
        self._held += self._decoder.feed(token.id)
        self._unfinished.append(token)
        if self._decoder.is_whole:
            self._place()
        return self._give(len(self._held) - self._beginning())

    def end(self) -> tuple[str, list[Token]]:
        """The rest, when no more tokens come."""
        if self._decoder is None or self.is_stopped:
            return "", []
        self._held += self._decoder.flush()
        self._place()
        return self._give(len(self._held))

    def _place(self) -> None:
        self._waiting += ((self._given + len(self._held), token) for token in self._unfinished)
        self._unfinished = []

    def _give(self, length: int) -> tuple[str, list[Token]]:
        """Release the first `length` held characters, or those before the first stop string."""
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        self.is_stopped = bool(found)
        text = self._held[: min(found, default=length)]
        self._held, self._given = self._held[len(text) :], self._given + len(text)
        if self.is_stopped:
            self._place()
        tokens = []
        while self._waiting and (self.is_stopped or self._waiting[0][0] <= self._given):
            tokens.append(self._waiting.popleft()[1])
        return text, tokens

    def _beginning(self) -> int:
        """How many of the last characters a stop string may begin with."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(tuple(t[:n] for t in self._stop))), 0)
