"""From the engine's pieces to the bodies of answers, whole or in chunks, in the shapes of OpenAI's two APIs.

The builders make plain dictionaries, which is quick; the models at the end are their documentation, which tests hold
them to.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from gristmill.inference import Piece, Request, Token
from gristmill.inference.scheduler import Complete
from gristmill.tokenizer import StreamDecoder, Tokenizer

Json = dict[str, Any]


class Shape:
    """One request's answers. Subclasses say how a piece looks as a chunk, and pieces together as a whole."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, tokenizer: Tokenizer, request: Request) -> None:
        self.tokenizer, self.skip_control = tokenizer, request.skip_control
        self.has_logprobs, self.has_experts = request.logprobs is not None, request.experts
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def chunk(self, choices: Sequence[Json], usage: Json | None, tells_usage: bool) -> Json:
        told = {"usage": usage} if tells_usage else {}
        return {**self.head, "object": self.chunk_object, "choices": choices, **told}

    def whole(self, choices: Sequence[Json], usage: Json) -> Json:
        return {**self.head, "object": self.whole_object, "choices": choices, "usage": usage}

    def deltas(self, index: int, piece: Piece) -> list[Json]:
        """A piece as choices, each of a chunk of its own."""
        raise NotImplementedError

    def choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        """All of an answer's pieces as a choice of a whole."""
        raise NotImplementedError

    def token_text(self, id: int) -> str:
        """A token as text. Bytes that are not a whole character are written as OpenAI does: "bytes:\\xe4\\xb8"."""
        return token_text(self.tokenizer, id)

    def experts(self, tokens: Sequence[Token]) -> Json:
        """To be joined to a choice: nothing where nobody asked."""
        if not self.has_experts:
            return {}
        told = [
            {
                "token": self.token_text(token.id),
                "ids": [[id for id, _ in layer] for layer in token.experts],
                "weights": [[weight for _, weight in layer] for layer in token.experts],
            }
            for token in tokens
        ]
        return {"experts": told}


class Completion(Shape):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, request: Request) -> None:
        super().__init__(model, tokenizer, request)
        self._places: dict[int, Place] = {}

    def deltas(self, index: int, piece: Piece) -> list[Json]:
        return [self.choice(index, [piece])]

    def choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        text = "".join(piece.text for piece in pieces)
        place = self._places.setdefault(index, Place(self.tokenizer.stream_decoder(self.skip_control)))
        tokens = [token for piece in pieces for token in piece.tokens]
        logprobs = self._logprobs(tokens, place) if self.has_logprobs else None
        told = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": pieces[-1].finish}
        return told | self.experts(tokens)

    def _logprobs(self, tokens: Sequence[Token], place: "Place") -> Json:
        told: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            told["tokens"].append(self.token_text(token.id))
            told["token_logprobs"].append(token.logprob)
            told["text_offset"].append(place.pass_by(token.id))
            if token.logprob is None:
                told["top_logprobs"].append(None)  # nothing comes before a text's first token
            else:
                top = {self.token_text(id): logprob for id, logprob in reversed(token.top)}  # of one text: the likelier
                told["top_logprobs"].append(dict(reversed(top.items())) | {self.token_text(token.id): token.logprob})
        return told


class Place:
    """Counts the characters of an answer's text before each of its tokens. decoder: as that of the text."""

    def __init__(self, decoder: StreamDecoder) -> None:
        self._decoder, self._offset = decoder, 0

    def pass_by(self, id: int) -> int:
        """Return the offset of the next token.

        U+FFFD stands for an unfinished character of earlier tokens: it is emitted with this token but precedes it.
        """
        offset, was_whole = self._offset, self._decoder.is_whole
        text = self._decoder.feed(id)
        self._offset += len(text)
        return offset + (not was_whole and text.startswith("\N{REPLACEMENT CHARACTER}"))


class Chat(Shape):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Tokenizer, request: Request) -> None:
        super().__init__(model, tokenizer, request)
        self._control = tokenizer.control_ids if request.skip_control else frozenset()
        self._begun: set[int] = set()

    def deltas(self, index: int, piece: Piece) -> list[Json]:
        made = []
        if index not in self._begun:
            self._begun.add(index)
            made.append(_delta(index, {"role": "assistant", "content": "", "refusal": None}))
        if piece.text or (piece.tokens and (self.has_logprobs or self.has_experts)):
            made.append(
                _delta(index, {"content": piece.text}, self._logprobs(piece.tokens)) | self.experts(piece.tokens)
            )
        if piece.finish:
            made.append(_delta(index, {}, finish=piece.finish))
        return made

    def choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        tokens = [token for piece in pieces for token in piece.tokens]
        told = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(tokens),
            "finish_reason": pieces[-1].finish,
        }
        return told | self.experts(tokens)

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self.has_logprobs:
            return None
        content = [
            self._one(token.id, token.logprob) | {"top_logprobs": [self._one(*top) for top in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _one(self, id: int, logprob: float | None) -> Json:
        piece = None if id in self._control else list(self.tokenizer.decode_bytes([id]))
        return {"token": self.token_text(id), "logprob": logprob, "bytes": piece}


def token_text(tokenizer: Tokenizer, id: int) -> str:
    piece = tokenizer.decode_bytes([id])
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _delta(index: int, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class PromptDetails(BaseModel):
    cached_tokens: int = Field(description="Of the prompt's, those that were in the cache when the request came.")


class Usage(BaseModel):
    """`completion_tokens`: all that were made, the one that ended an answer and those of a stop string included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TokenExperts(BaseModel):
    """Of the pass that predicted this token; empty for a prompt's first token, which nothing predicts."""

    token: str
    ids: list[list[int]] = Field(description="Of each layer its experts, the heaviest first.")
    weights: list[list[float]] = Field(description="What each counted for.")


class CompletionLogprobs(BaseModel):
    """An entry for each token: those of an echoed prompt, then all that were made, as many as `completion_tokens`.

    Also of the token that ended the answer and those of a stop text, whose offsets are at or after the text's end.
    Joined, the tokens begin with the text, control tokens left out; "bytes:\\xe4\\xb8" is a part of a character.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    index: int
    finish_reason: Complete | None
    experts: list[TokenExperts] | None = Field(None, description="Only with return_experts: of each token.")


class Answered(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage | None = None


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None


class CompletionAnswer(Answered):
    """With `stream`: the same as chunks, `data: …` each, then `data: [DONE]`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatToken(BaseModel):
    token: str = Field(description='The text; "bytes:\\xe4\\xb8" for bytes that are not a whole character.')
    logprob: float
    bytes: list[int] | None = Field(description="null: a control token, which adds nothing to the text.")


class ChatTokenWithTop(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    """An entry for each token that was made, also for the one that ended the answer and those of a stop text."""

    content: list[ChatTokenWithTop]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Complete


class ChatAnswer(Answered):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class ChatChunkChoice(Choice):
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class ChatChunk(Answered):
    """With `stream`: `data: …` each, then `data: [DONE]`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="Tokens that a prompt and its answer may have together.")
    chat: bool = Field(description="Whether it holds conversations; else it continues texts alone.")
    experts: "Mixture | None" = Field(description="Of a mixture; null for a dense model.")
    operator: bool = Field(description="Whether this key may read /metrics and /v1/load.")


class Mixture(BaseModel):
    layers: int
    experts: int = Field(description="Of each layer.")
    per_token: int


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    prompt: str


class Status(BaseModel):
    status: Literal["ok"]


class UsageLine(BaseModel):
    day: str = Field(description="Such as 2026-01-31, UTC.")
    model: str
    requests: int
    input_tokens: int
    output_tokens: int
    cost: str = Field(description="A decimal number, exact, by the prices that the server had at the time.")


class OwnUsage(BaseModel):
    object: Literal["list"]
    data: list[UsageLine]


class LoadFigures(BaseModel):
    """How busy the server is: sequences, blocks of the cache, tokens made a second over the last seconds."""

    running: int
    waiting: int
    blocks: int
    blocks_in_use: int
    tokens_per_s: float
    prompt_tokens: int = Field(description="Since the start, as all below.")
    cached_tokens: int = Field(description="Of the prompts, found in the cache.")
    generation_tokens: int
