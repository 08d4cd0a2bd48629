"""llguidance, which this file alone imports, on first use: grammars are compiled, after a trial in another process.

Its limits bound a step, but not every compile: a `multipleOf` of eight digits takes minutes, a long chain of `$ref`
overflows the stack. So a grammar that is new is compiled in a helper process with limits of time, memory and stack,
which is killed when it passes one; only what came through there is compiled where others are served.

The helper is this file as a script, so that it starts without torch: nothing else of the package is imported here.
"""

import atexit
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    Matcher = LLMatcher
    Vocabulary = LLTokenizer

COMPILE_S = 1.0  # of a processor
COMPILE_BYTES = 128 << 20
COMPILE_STACK = 2 << 20  # any thread of the server has more
WAIT_S = 60.0  # for an answer of the helper, on however busy a machine
TRIED_TOKENS = 64  # of an answer, after the compile: what a first step cannot do is refused before anyone waits for it
# One space, or a new line and its indent; without a bound a model may go on with blanks for ever.
JSON_BLANK = " |\\n {0,32}"


class Words:
    """What llguidance asks of a tokenizer, whose texts it does not encode: it lets the model choose the tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], end: int) -> None:
        self.tokens, self.eos_token_id, self.special_token_ids = list(tokens), end, [end]

    def __call__(self, text: str) -> list[int]:
        raise AssertionError("nothing is encoded with no_forcing")


def vocabulary(tokens: Sequence[bytes], end: int) -> "Vocabulary":
    """tokens: what each id adds to the text; empty for those that must never be drawn. end: the id that says so."""
    from llguidance import LLTokenizer

    pieces = [*tokens[:end], b"end", *tokens[end + 1 :]]  # a special one: no text has it
    return LLTokenizer(Words(pieces, end), n_vocab=len(pieces), eos_token=[end])  # type: ignore[arg-type]


def of_json_schema(schema: str) -> str:
    """A grammar's text. schema: JSON of an object without `x-guidance`."""
    settings = {"whitespace_pattern": JSON_BLANK}
    return _headed("start: %json " + json.dumps({**json.loads(schema), "x-guidance": settings}))


def of_regex(pattern: str) -> str:
    from llguidance import regex_to_lark

    return _headed(f"start: /{regex_to_lark(pattern, 'dws')}/")


def _headed(grammar: str) -> str:
    return '%llguidance {"no_forcing": true}\n' + grammar  # forcing long texts is work that no limit counts


def compiled(words: "Vocabulary", grammar: str) -> "Matcher":
    """At the beginning of its text; `is_error` says whether it can be used."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_items_in_row=2000,
        max_lexer_states=20_000,  # of 1 to 2 kB
        max_grammar_size=100_000,
        precompute_large_lexemes=False,  # compiling is to cost the same for any tokenizer
        verbose_errors=False,
    )
    return LLMatcher(words, grammar, log_level=0, limits=limits)


def said(matcher: "Matcher") -> str:
    """Why it cannot go on, in a line; empty where it can."""
    lines = [line.strip() for line in matcher.get_error().splitlines() if line.strip() and line[0] != "<"]
    if lines[:1] == ["NoExtensionBias"]:
        return "no text has this form"
    line = next((line for line in lines if line.startswith("error: ")), "".join(lines[:1]))
    line = re.sub(r"^(error: |at \d+\(\d+\): failed to compile JSON schema: )", "", line)
    return line[:200] or ("it failed" if matcher.is_error() else "")


class Helper:
    """The process in which grammars are tried, one after another. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def problem(self, grammar: str) -> str:
        """Why it is not to be compiled here; empty when it may be."""
        with self._lock:
            for _ in range(2):  # a helper that is gone already, whoever ended it, says nothing of this grammar
                process = self._process = self._process or self._started()
                try:
                    return self._asked(process, grammar)
                except BrokenPipeError:
                    self.close()
            return "the process that tries grammars does not start"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", __file__]
        process = subprocess.Popen(
            command,
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # or a thread's reserve would count as used
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self._line(process)  # it has started: what comes from now on is a grammar's fault
        return process

    def _asked(self, process: "subprocess.Popen[bytes]", grammar: str) -> str:
        assert process.stdin is not None
        process.stdin.write(json.dumps(grammar).encode() + b"\n")
        if line := self._line(process):
            return str(json.loads(line))
        self.close()
        return f"it takes more than {COMPILE_S:g} s, {COMPILE_BYTES >> 20} MiB or the stack to compile"

    def _line(self, process: "subprocess.Popen[bytes]") -> bytes:
        """Empty when it ended or does not answer."""
        assert process.stdout is not None
        line = b""
        while not line.endswith(b"\n") and select.select([process.stdout], [], [], WAIT_S)[0]:
            if not (more := os.read(process.stdout.fileno(), 65536)):
                return b""
            line += more
        return line if line.endswith(b"\n") else b""


@cache
def helper() -> Helper:
    return Helper()


def _serve() -> None:
    """Answers each grammar, a line of JSON, with a line: what is wrong with it. A signal ends it at a limit."""
    from llguidance import LLTokenizer

    words, page = LLTokenizer("byte"), os.sysconf("SC_PAGE_SIZE")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(COMPILE_STACK)
    print('""', flush=True)
    for line in sys.stdin:
        answer: list[str] = []
        signal.setitimer(signal.ITIMER_PROF, COMPILE_S)
        if os.path.exists("/proc/self/statm"):
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * page
            resource.setrlimit(resource.RLIMIT_AS, (used + COMPILE_BYTES, resource.RLIM_INFINITY))
        thread = threading.Thread(target=_try, args=(words, json.loads(line), answer))
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer[0]), flush=True)


def _try(words: Any, grammar: str, answer: list[str]) -> None:
    """Compiles it, and takes one way through its first bytes."""
    matcher = compiled(words, grammar)
    for step in range(TRIED_TOKENS):
        mask = matcher.compute_bitmask() if not matcher.is_error() else b""
        if matcher.is_error() or matcher.is_stopped():
            break
        allowed = [id for id in range(33, 127) if mask[id // 8] >> id % 8 & 1]
        allowed = allowed or [id for id in range(256) if mask[id // 8] >> id % 8 & 1]
        if not allowed:
            break  # the end alone
        matcher.consume_token(allowed[step % len(allowed)])
    answer.append(said(matcher))


if __name__ == "__main__":
    _serve()
