"""Text to ids and back, for every room that holds a tokenizer directory. Text can never become a control token."""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers

from gristmill.errors import Failure, InputError
from gristmill.tokenizer.layout import EOT, IM_END, IM_START, PAD, ROLES, byte_of_symbol

NO_TEXT = "\N{REPLACEMENT CHARACTER}".encode()  # an id that no token has: a model may have spare rows


class Tokenizer:
    """A byte-level BPE of the Hugging Face form (`tokenizer.json`).

    `encode` gives the ids that `AutoTokenizer` gives, except where text contains the name of a special token:
    that stays text here. Special ids are put into sequences by code alone (`eot_id`, `chat`).
    """

    def __init__(self, description: str) -> None:
        """`description`: the text of a tokenizer.json. Raises ValueError, KeyError or TypeError if it is not one."""
        parsed = json.loads(description)
        special = {token["content"]: int(token["id"]) for token in parsed["added_tokens"]}
        # Without its added tokens the encoder has no way at all to produce them from text.
        try:
            self._bpe = tokenizers.Tokenizer.from_str(json.dumps(parsed | {"added_tokens": []}))
        except Exception as problem:  # the library has no narrower one
            raise ValueError(str(problem)) from None
        symbols = byte_of_symbol()
        pieces = {
            i: bytes(symbols[c] for c in token) for token, i in parsed["model"]["vocab"].items() if token not in special
        }
        pieces |= {i: token.encode() for token, i in special.items()}
        self.vocab_size = max(pieces) + 1
        self._bytes = [pieces.get(i, NO_TEXT) for i in range(self.vocab_size)]
        self.eot_id = special[EOT]
        self.pad_id = special[PAD]
        self.im_start_id = special[IM_START]
        self.im_end_id = special[IM_END]

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer directory.

        Raises InputError when there is none at `path`, Failure when it cannot be understood.
        """
        file = path / "tokenizer.json"
        try:
            return cls(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path} is not a tokenizer: it has no tokenizer.json") from None
        except (ValueError, KeyError, TypeError) as problem:
            raise Failure(f"{file} is not a byte-level BPE with DBRX's special tokens: {problem!r}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is added, nothing in it is a control token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores.

        Raises InputError for a `str` that is not Unicode text: one with half of a surrogate pair.
        """
        try:
            return [encoding.ids for encoding in self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:  # what the library says of a string without a UTF-8 form
            raise InputError("text has a lone surrogate (U+D800 to U+DFFF), which no UTF-8 text can hold") from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for: for an encoded text exactly its UTF-8.

        A special token gives its name; an id above the vocabulary gives U+FFFD.
        """
        return b"".join(map(self._piece, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """`decode_bytes` as text; bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def stream_decoder(self) -> "StreamDecoder":
        """For text that arrives id by id."""
        return StreamDecoder(self)

    def chat(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool = False) -> list[int]:
        """Ids of a conversation in ChatML, as `apply_chat_template` gives them for contents without special tokens.

        messages: {"role": "system" | "user" | "assistant", "content": text} in order.
        generation_prompt: end with the opening of the assistant's next turn.
        Contents are data: whatever they contain, only this function writes control tokens.
        """
        newline = self.encode("\n")
        ids: list[int] = []
        for index, message in enumerate(messages):
            header, content = _checked(index, message)
            ids += newline if index else []
            ids += [self.im_start_id, *self.encode(f"{header}\n{content}"), self.im_end_id]
        if generation_prompt:
            ids += [*newline, self.im_start_id, *self.encode("assistant\n")]
        return ids

    def _piece(self, id: int) -> bytes:
        if id < 0:
            raise ValueError(f"token id {id} is negative")
        return self._bytes[id] if id < self.vocab_size else NO_TEXT


class StreamDecoder:
    """Turns ids into text one at a time; a character comes out when its last byte is there.

    The pieces joined, with `flush` at the end, equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The text completed by this id; often empty in the middle of a character."""
        return self._utf8.decode(self._tokenizer.decode_bytes([id]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


def _checked(index: int, message: Mapping[str, str]) -> tuple[str, str]:
    if set(message) != {"role", "content"} or not isinstance(message["content"], str):
        raise InputError(f"messages[{index}] must have a role and a text content, got keys {sorted(message)}")
    if message["role"] not in ROLES:
        raise InputError(f"messages[{index}].role={message['role']!r} must be one of {', '.join(ROLES)}")
    return message["role"], message["content"]
