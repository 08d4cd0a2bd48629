"""Answers that keep to a form: JSON of a schema, or text of a regular expression.

At each step the tokens are found after which the answer can still become such a text; no other may be drawn. What a
model would say is asked first and filtered after, so it is free wherever the form is: in its choice of tokens too.

Shapes: V vocabulary of the model.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from gristmill.errors import InputError
from gristmill.inference import llguide
from gristmill.inference.schemas import prepared, subschemas
from gristmill.tokenizer import Tokenizer

MAX_BYTES = 65536  # of a schema as JSON, of a pattern as UTF-8
MAX_DEPTH = 64  # of a schema, in levels of JSON
BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
KEPT = 16  # compiled grammars of an engine; the worst that the limits let through has 50 MB


@dataclass(frozen=True)
class JsonSchema:
    """The answer is JSON that is valid for `schema`, of draft 2020-12 as far as llguidance knows it.

    A keyword that it cannot keep to, such as `not`, `if` or `uniqueItems`, is refused by name, unless it changes
    nothing or is in a branch of anyOf that the answer can do without (schemas.py). Also refused are references to other
    documents, and an exclusive bound of 0 together with one between -1 and 1, which llguidance does not keep.
    Properties come in the schema's order. Between the parts of the JSON is nothing, a space, or a new line with an
    indent of up to 32. A known `format` is kept to, an unknown one is an annotation. Keys that no schema lists may be
    repeated, of which JSON's readers take the last.
    """

    schema: Mapping[str, Any]

    def __post_init__(self) -> None:
        json_text(self.schema)


@dataclass(frozen=True)
class Regex:
    """The whole answer matches `pattern`, in the syntax of Rust's regex crate: no look-around, no back-references.

    `\\d`, `\\w` and `\\s` are of ASCII, `.` is any character but the end of a line.
    """

    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise InputError(f"pattern={self.pattern!r:.80} must be a text")
        try:
            size = len(self.pattern.encode())
        except UnicodeEncodeError:
            raise InputError("pattern has a lone surrogate (U+D800 to U+DFFF), which no UTF-8 text can hold") from None
        if size > MAX_BYTES:
            raise InputError(f"pattern has {size} bytes; at most {MAX_BYTES} are taken; make it shorter")
        if (len(self.pattern) - len(self.pattern.rstrip("\\"))) % 2:  # which llguidance would leave out
            raise InputError("pattern ends with a backslash that escapes nothing; double it, or leave it out")


Grammar = JsonSchema | Regex


def read_schema(file: Path) -> JsonSchema:
    """Raises InputError for a file that is none, or whose schema is beyond the limits."""
    try:
        if file.stat().st_size > 4 * MAX_BYTES:  # which leaves room for indents
            raise InputError(f"{file} has more than {4 * MAX_BYTES} bytes; make the schema smaller")
        return JsonSchema(json.loads(file.read_text(encoding="utf-8")))
    except OSError as problem:
        raise InputError(f"{file} cannot be read: {problem.strerror}; give a JSON schema") from None
    except InputError as problem:
        raise InputError(f"{file}: {problem}") from None
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{file} is not JSON: {problem}") from None


def json_text(schema: Mapping[str, Any]) -> str:
    """A schema within the limits as JSON, in the words that llguidance knows. Raises InputError for another."""
    if not isinstance(schema, Mapping):
        raise InputError(f"schema={schema!r:.80} must be a JSON object")
    text, rule = "", f"at most {MAX_BYTES} are taken; make it smaller"
    try:
        for part in json.JSONEncoder(allow_nan=False).iterencode(dict(schema)):  # ends early where it would not end
            text += part
            if len(text) > MAX_BYTES:
                raise InputError(f"schema has more than {MAX_BYTES} bytes of JSON; {rule}")
    except RecursionError:
        raise InputError(f"schema is deeper than {MAX_DEPTH} levels of JSON; define parts in $defs") from None
    except InputError:
        raise
    except (TypeError, ValueError) as problem:
        raise InputError(f"schema is no JSON ({problem}); give what json.loads would") from None
    plain = json.loads(text)
    if _depth(plain) > MAX_DEPTH:
        raise InputError(f"schema is deeper than {MAX_DEPTH} levels of JSON; define parts in $defs")
    if "x-guidance" in plain:
        raise InputError("schema has x-guidance, which would change what the form is; leave it out")
    objects = list(subschemas(plain))
    for one in objects:
        least, listed = one.get("minProperties"), one.get("required")
        known = len(listed) if isinstance(listed, list) else 0
        if isinstance(least, int | float) and least > max(1, known):
            raise InputError(
                f"minProperties={least} cannot be promised, as keys that `required` does not list may be repeated; "
                "list them there"
            )
    bounds = [(key, one[key]) for one in objects for key in BOUNDS if isinstance(one.get(key), int | float)]
    zero = next((key for key, bound in bounds if key.startswith("exclusive") and bound == 0), None)
    inner = next((bound for _, bound in bounds if 0 < abs(bound) < 1), None)
    if zero and inner:  # parts of an allOf may bound one number together
        raise InputError(
            f"{zero}=0 cannot be promised beside a bound of {inner}, as llguidance would let 0 through; "
            f"write {zero.replace('exclusiveM', 'm')} with the number nearest to 0 that is meant"
        )
    return json.dumps(prepared(plain))


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        level, depth = [below for one in level for below in _below(one)], depth + 1
    return depth


def _below(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


ANY_OBJECT = JsonSchema({"type": "object"})  # `response_format: {"type": "json_object"}`


class Constraint:
    """Where one answer stands in its form: of the ids that it has, and of nothing else, follows what may come."""

    def __init__(self, matcher: "llguide.Matcher", size: int, vocab_size: int, ends: frozenset[int]) -> None:
        self._matcher, self._size, self._ends = matcher, size, sorted(ends)
        self._allowed_V = torch.zeros(vocab_size, dtype=torch.bool)
        self._view_V = self._allowed_V.numpy()  # torch would wake its threads for so little

    def allowed(self) -> Tensor | None:
        """[V] of bool, to be read before the next call: at the end of a text `ends` too, or alone.

        None when finding them takes more than the limits of a step allow.
        """
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            return None
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=self._size, bitorder="little")
        self._view_V[: self._size] = bits.view(np.bool_)
        if self._matcher.is_stopped() or self._matcher.is_accepting():
            self._view_V[self._ends] = True
        return self._allowed_V

    def add(self, id: int) -> None:
        """An id that was allowed, and is none of `ends`."""
        self._matcher.consume_token(id)


_words: "WeakKeyDictionary[Tokenizer, llguide.Vocabulary]" = WeakKeyDictionary()


class Grammars:
    """Those of an engine, compiled: the last KEPT of them are at hand. Any thread may call `compile`."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._compiled: OrderedDict[str, llguide.Matcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> "llguide.Matcher":
        """Takes up to a second of a processor and up to 128 MiB in another process, then as much here.

        A server calls it where the wait holds up nobody else; a request with the same grammar then finds it.
        Raises InputError for what is not a form or exceeds the limits, and without llguidance.
        """
        try:
            match grammar:
                case JsonSchema():
                    what, text = "schema", llguide.of_json_schema(json_text(grammar.schema))
                case Regex():
                    what, text = "pattern", llguide.of_regex(grammar.pattern)
            with self._lock:
                if (found := self._compiled.get(text)) is not None:
                    self._compiled.move_to_end(text)
                    return found
            words = self._vocabulary()
        except ImportError:
            raise InputError("a grammar needs llguidance: `pip install 'gristmill[structured]'`") from None
        if problem := llguide.helper().problem(text):
            raise InputError(f"{what} is refused: {problem}; change or simplify it")
        made = llguide.compiled(words, text)
        made.compute_bitmask()
        if problem := llguide.said(made):
            raise InputError(f"{what} is refused: {problem}; change or simplify it")
        with self._lock:
            self._compiled[text] = made
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return made

    def start(self, grammar: Grammar, stop_ids: frozenset[int]) -> Constraint:
        """For one answer. Where its text may end, the end of text and those of `stop_ids` that no text has may come.

        Raises InputError as `compile`.
        """
        matcher, words = self.compile(grammar).deep_copy(), self.tokenizer.text_pieces
        ends = {id for id in stop_ids if id < len(words) and not words[id]} | {self.tokenizer.eot_id}
        return Constraint(matcher, len(words), self.vocab_size, frozenset(ends))

    def _vocabulary(self) -> "llguide.Vocabulary":
        if (found := _words.get(self.tokenizer)) is None:
            found = _words[self.tokenizer] = llguide.vocabulary(self.tokenizer.text_pieces, self.tokenizer.eot_id)
        return found
