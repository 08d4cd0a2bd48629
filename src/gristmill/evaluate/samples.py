"""Completions of held-out prompts, to be read by people; for Python, also the share of functions that parse.

Nothing that a model wrote is ever executed: `ast.parse` reads it, no more.
"""

import ast
import io
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gristmill.evaluate.config import EvaluateConfig
from gristmill.evaluate.documents import Document, rank
from gristmill.evaluate.scorer import Scorer

if TYPE_CHECKING:
    from gristmill.tokenizer import Tokenizer

PARSE_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)  # what `ast.parse` raises on strange text


@dataclass(frozen=True)
class Prompt:
    source: str
    prompt: str
    truth: str
    is_function: bool = False
    is_documented: bool = False


def sample(
    documents: Sequence[Document],
    scorer: Scorer,
    tokenizer: "Tokenizer",
    cfg: EvaluateConfig,
    advance: Callable[[float], None] = lambda num_prompts: None,
) -> dict[str, Any]:
    """`samples` for the report, and `parse_share` when the documents hold Python functions."""
    prompts = choose(documents, tokenizer, cfg)
    greedy = _complete(prompts, scorer, tokenizer, cfg, temperature=0.0)
    advance(len(prompts))
    sampled = _complete(prompts, scorer, tokenizer, cfg, temperature=cfg.temperature)
    advance(len(prompts))
    shown: dict[str, int] = {}
    samples = []
    for prompt, best, random in zip(prompts, greedy, sampled, strict=True):
        shown[prompt.source] = shown.get(prompt.source, 0) + 1
        if shown[prompt.source] <= cfg.samples:
            fields = {"source": prompt.source, "prompt": prompt.prompt, "truth": prompt.truth}
            samples.append(fields | {"greedy": best, "sampled": random})
    figures: dict[str, Any] = {"samples": samples}
    functions = [i for i, prompt in enumerate(prompts) if prompt.is_function]
    if functions:
        figures["parse_share"] = {
            name: sum(parses(prompts[i].prompt, texts[i]) for i in functions) / len(functions)
            for name, texts in (("greedy", greedy), ("sampled", sampled))
        } | {"functions": len(functions)}
    return figures


def choose(documents: Sequence[Document], tokenizer: "Tokenizer", cfg: EvaluateConfig) -> list[Prompt]:
    """Prompts of every source, documents in the order of their hashes: one function a module, else a text's start.

    Functions with a docstring come first: it says what is wanted. No two prompts are alike.
    """
    prompts = []
    for source in sorted({document.source for document in documents}):
        drawn = sorted((d for d in documents if d.source == source), key=lambda d: rank(d.id))
        found = [_function(document, tokenizer, cfg.prompt_tokens) for document in drawn]
        functions = {function.prompt: function for function in found if function}
        if functions:
            prompts += sorted(functions.values(), key=lambda f: not f.is_documented)[: cfg.functions]
        else:
            starts = [_start(document, tokenizer, cfg) for document in drawn]
            if tokenizer.start_id is None:  # nothing would come before the first token
                starts = [start for start in starts if start.prompt]
            prompts += list({start.prompt: start for start in starts if start.truth}.values())[: cfg.samples]
    return prompts


def _complete(
    prompts: Sequence[Prompt], scorer: Scorer, tokenizer: "Tokenizer", cfg: EvaluateConfig, *, temperature: float
) -> list[str]:
    # A prompt that was cut inside a character has more tokens as text than it was cut to.
    ids = [tokenizer.encode_prompt(prompt.prompt)[: cfg.prompt_tokens + 1] for prompt in prompts]
    made = scorer.generate(
        ids,
        max_tokens=cfg.sample_tokens,
        stop_ids=frozenset({tokenizer.eot_id}),
        temperature=temperature,
        top_p=cfg.top_p,
        seed=cfg.seed,
    )
    completions = []
    for prompt, new in zip(prompts, made, strict=True):
        text = tokenizer.decode(new)
        completions.append(cut_function(text, ended=len(new) < cfg.sample_tokens) if prompt.is_function else text)
    return completions


def _start(document: Document, tokenizer: "Tokenizer", cfg: EvaluateConfig) -> Prompt:
    ids = tokenizer.encode(document.text[: 16 * (cfg.prompt_tokens + cfg.sample_tokens)])
    # a prompt takes at most half of a short document, so that something is left to compare with
    end = min(cfg.prompt_tokens, len(ids) // 2)
    truth = tokenizer.decode(ids[end : end + cfg.sample_tokens])
    return Prompt(document.source, tokenizer.decode(ids[:end]), truth)


# ---- Python functions ----------------------------------------------------------------------------------


def _function(document: Document, tokenizer: "Tokenizer", max_tokens: int) -> Prompt | None:
    """One function of a module, preferably with a docstring, whose head fits in `max_tokens`."""
    fitting = [
        (not documented, rank(document.id + head), head, body)
        for documented, head, body in _functions(document.text)
        if len(tokenizer.encode(head)) <= max_tokens
    ]
    if not fitting:
        return None
    undocumented, _, head, body = min(fitting)
    return Prompt(document.source, head, body, is_function=True, is_documented=not undocumented)


def _functions(text: str) -> Iterator[tuple[bool, str, str]]:
    """(has a docstring, signature and docstring, rest) of each function and method, moved to the left margin.

    The head ends with a newline, where a tokenizer that keeps words whole would also cut.
    """
    tree = parse(text)
    lines = lines_of(text)
    for node in ast.walk(tree) if tree else ():
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        documented = ast.get_docstring(node, clean=False) is not None
        rest = node.body[documented:]
        first = min((d.lineno for d in getattr(rest[0], "decorator_list", [])), default=rest[0].lineno) if rest else 0
        if first <= node.lineno or first <= (node.body[0].end_lineno or 0) * documented or node.end_lineno is None:
            continue  # nothing but a docstring, or all on one line
        whole = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        if whole.startswith(("def ", "async def ")) and parse(whole):
            head = "".join(lines_of(whole)[: first - node.lineno])
            yield documented, head, whole[len(head) :]


def cut_function(text: str, *, ended: bool) -> str:
    """A completion up to where the function ends: the first line at the margin, or else, unless the model `ended`
    it, the last whole line."""
    lines = lines_of(text)
    for number, line in enumerate(lines):
        if line.strip() and not line.lstrip("\f")[0].isspace():  # Python ignores a form feed there
            return "".join(lines[:number])
    return "".join(lines if ended else lines[:-1])


def parses(head: str, body: str) -> bool:
    """Whether head and body are one Python function that says something beyond its docstring."""
    tree = parse(head + body)
    if tree is None or len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return len(tree.body[0].body) > (ast.get_docstring(tree.body[0], clean=False) is not None)


def lines_of(text: str) -> list[str]:
    """Lines with their ends, as Python counts them: a form feed or U+2028 ends none, unlike in `str.splitlines`."""
    return io.StringIO(text, newline="").readlines()


def parse(text: str) -> ast.Module | None:
    """The syntax tree, or None where the text is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in strings are somebody else's concern
        try:
            return ast.parse(text)
        except PARSE_ERRORS:
            return None
