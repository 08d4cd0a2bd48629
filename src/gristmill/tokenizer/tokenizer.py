"""Text to ids and back, for every room that holds a tokenizer directory. Text can never become a control token."""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from gristmill.errors import Failure, InputError
from gristmill.tokenizer.encoder import has_long_blank, over_threads, quick_encoding
from gristmill.tokenizer.layout import (
    DEFAULT_SYSTEM_PROMPT,
    EOT,
    IM_END,
    IM_START,
    PAD,
    ROLES,
    byte_of_symbol,
)
from gristmill.tokenizer.start import find_chat_start_id, find_start_id

MAX_VOCAB_SIZE = 1 << 24  # more is a damaged file
NO_TEXT = "\N{REPLACEMENT CHARACTER}".encode()  # an id that no token has: a model may have spare rows


class Tokenizer:
    """A byte-level BPE of the Hugging Face form (`tokenizer.json`): our own, GPT-4's, or another published one.

    `encode_prompt` gives the ids that `AutoTokenizer` gives for a text, `encode` those that it gives with
    `add_special_tokens=False`, except where the text contains the name of an added token (special or not): that stays
    text here. Only code puts special ids into sequences (`start_id`, `eot_id`, `chat`).
    """

    def __init__(
        self,
        description: str,
        default_system_prompt: str | None = None,
        start_id: int | None = None,
        chat_start_id: int | None = None,
    ) -> None:
        """`description`: the text of a tokenizer.json. `default_system_prompt`: see `chat`. `start_id`: the id before
        each text that is to be continued, `chat_start_id`: the id before each conversation; None if there is none.

        Raises ValueError, KeyError or TypeError if it is not a byte-level BPE with ChatML's tokens. Without `<|pad|>`
        the end of text pads.
        """
        self._description = description
        self.default_system_prompt = default_system_prompt
        self.start_id, self.chat_start_id = start_id, chat_start_id
        parsed, added = _without_added_tokens(description)
        symbols = byte_of_symbol()
        ranks = {bytes(symbols[c] for c in token): id for token, id in parsed["model"]["vocab"].items()}
        pieces = {id: token for token, id in ranks.items()} | {id: name.encode() for name, id in added.items()}
        self.vocab_size = max(*pieces, -1 if start_id is None else start_id) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"an id is {self.vocab_size - 1}")
        self._bytes = [pieces.get(i, NO_TEXT) for i in range(self.vocab_size)]
        self.eot_id = added[EOT]
        self.pad_id = added.get(PAD, self.eot_id)
        self.im_start_id = added[IM_START]
        self.im_end_id = added[IM_END]
        self._quick = quick_encoding(parsed, ranks)
        if self._quick is None:
            _ = self._library  # a description that it cannot read is refused now

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer directory, with the start token and the default system prompt that its settings name.

        Raises InputError when there is none at `path`, Failure when it cannot be understood.
        """
        file, config = path / "tokenizer.json", path / "tokenizer_config.json"
        try:
            settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
            settings = settings if isinstance(settings, dict) else {}
            prompt = _default_system_prompt(settings)
        except ValueError as problem:
            raise Failure(f"{config} is damaged: {problem}") from None
        try:
            description = file.read_text(encoding="utf-8")
            found = (path, json.loads(description), settings)
            return cls(description, prompt, find_start_id(*found), find_chat_start_id(*found))
        except InputError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path} is not a tokenizer: it has no tokenizer.json") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise Failure(f"{file} is not a byte-level BPE with DBRX's special tokens: {problem!r}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is added, nothing in it is a control token."""
        return self._encode([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model is to continue: the start token, if the tokenizer has one, then `encode`."""
        start = [] if self.start_id is None else [self.start_id]
        return start + self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores.

        Raises InputError for a `str` that is not Unicode text: one with half of a surrogate pair.
        """
        return self._encode(texts) if self._quick is None else over_threads(self._encode, texts)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            if self._quick is None:
                return self._encode_by_library(texts)
            for text in texts:
                if not text.isascii():
                    text.encode()  # tiktoken would replace half a surrogate pair in silence
            return [
                self._encode_by_library([text])[0] if has_long_blank(text) else self._quick.encode_ordinary(text)
                for text in texts
            ]
        except (TypeError, UnicodeEncodeError):  # TypeError: what `tokenizers` says of a string without a UTF-8 form
            raise InputError("text has a lone surrogate (U+D800 to U+DFFF), which no UTF-8 text can hold") from None

    def _encode_by_library(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def _library(self) -> tokenizers.Tokenizer:
        """`tokenizers`' own encoder: for every file, and the specification of the quick one."""
        parsed, _ = _without_added_tokens(self._description)
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(parsed))
        except Exception as problem:  # the library has no narrower one
            raise ValueError(str(problem)) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for: for an encoded text exactly its UTF-8.

        A special token gives its name; an id above the vocabulary gives U+FFFD.
        """
        return b"".join(map(self._piece, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """`decode_bytes` as text; bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    @cached_property
    def text_pieces(self) -> list[bytes]:
        """The bytes of each id that text may have; empty for control tokens and for ids that no token has."""
        parsed, _ = _without_added_tokens(self._description)
        ids = set(parsed["model"]["vocab"].values())
        return [piece if id in ids else b"" for id, piece in enumerate(self._bytes)]

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Names and ids of the control tokens: the added tokens that tokenizer.json marks as special."""
        added = json.loads(self._description)["added_tokens"]
        return {token["content"]: int(token["id"]) for token in added if token.get("special")}

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the control tokens, and of the start token, whatever it is marked as."""
        starts = () if self.start_id is None else (self.start_id,)
        return frozenset({*self.control_tokens.values(), self.eot_id, *starts})

    def stream_decoder(self, skip_control: bool = False) -> "StreamDecoder":
        """Decode text that arrives id by id. With skip_control, control tokens add nothing to the text."""
        return StreamDecoder(self, self.control_ids if skip_control else frozenset())

    def chat(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool = False) -> list[int]:
        """Ids of a conversation in ChatML, as `apply_chat_template` gives them for contents without special tokens.

        messages: {"role": "system" | "user" | "assistant", "content": text} in order. Where the first is not a system
        turn, the tokenizer's default system prompt goes before it, if it has one. There is no start token before the
        first turn unless the chat template writes one.
        generation_prompt: end with the opening of the assistant's next turn.
        Contents are data: whatever they contain, only this function writes control tokens.
        """
        turns = [_checked(index, message) for index, message in enumerate(messages)]
        if self.default_system_prompt is not None and (not turns or turns[0][0] != "system"):
            turns.insert(0, ("system", self.default_system_prompt))
        newline = self.encode("\n")
        ids = [] if self.chat_start_id is None else [self.chat_start_id]
        for index, (role, content) in enumerate(turns):
            ids += newline if index else []
            ids += [self.im_start_id, *self.encode(f"{role}\n{content}"), self.im_end_id]
        if generation_prompt:
            ids += [*newline, self.im_start_id, *self.encode("assistant\n")]
        return ids

    def _piece(self, id: int) -> bytes:
        if id < 0:
            raise ValueError(f"token id {id} is negative")
        return self._bytes[id] if id < self.vocab_size else NO_TEXT


class StreamDecoder:
    """Turns ids into text one at a time; a character comes out when its last byte is there.

    The pieces joined, with `flush` at the end, equal `Tokenizer.decode` of all ids except those in `skipped`.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The text completed by this id; often empty in the middle of a character."""
        return "" if id in self._skipped else self._utf8.decode(self._tokenizer.decode_bytes([id]))

    @property
    def is_whole(self) -> bool:
        """Whether no character is unfinished."""
        return not self._utf8.getstate()[0]

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


def _without_added_tokens(description: str) -> tuple[dict[str, Any], dict[str, int]]:
    """A parsed tokenizer.json that has no way at all to make an added token from text; and those tokens' ids."""
    parsed = json.loads(description)
    added = {token["content"]: int(token["id"]) for token in parsed["added_tokens"]}
    vocab = {token: id for token, id in parsed["model"]["vocab"].items() if token not in added}
    model = parsed["model"] | {"vocab": vocab}
    # Limits of length belong to a batch for a model, not to the text: AutoTokenizer ignores these two as well.
    return parsed | {"added_tokens": [], "truncation": None, "padding": None, "model": model}, added


def _default_system_prompt(settings: Mapping[str, Any]) -> str | None:
    prompt = settings.get(DEFAULT_SYSTEM_PROMPT)
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{DEFAULT_SYSTEM_PROMPT} must be a text")
    return prompt


def _checked(index: int, message: Mapping[str, str]) -> tuple[str, str]:
    if set(message) != {"role", "content"} or not isinstance(message["content"], str):
        raise InputError(f"messages[{index}] must have a role and a text content, got keys {sorted(message)}")
    if message["role"] not in ROLES:
        raise InputError(f"messages[{index}].role={message['role']!r} must be one of {', '.join(ROLES)}")
    return message["role"], message["content"]
