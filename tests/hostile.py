"""Random and hostile command lines for every verb, option and recipe key, found in the commands and the schema."""

import dataclasses
import os
import shlex
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from hypothesis import strategies as st

from gristmill.cli import app
from gristmill.recipe import schema

# ---- values --------------------------------------------------------------------------------------------

NUMBERS = (
    "0", "-0", "-1", "1", "2", "3", "7", "8", "64", "100", "nan", "-nan", "inf", "-inf", ".nan", ".inf", "1e-9",
    "1e-320", "1e308", "1e999", "-1e308", "0.5", "-0.5", "1.5", "1" + "0" * 30, "-1" + "0" * 30, "9" * 5000,
    "9223372036854775807", "9223372036854775808", "2147483648", "4294967296", "18446744073709551616", "1_000", "0x10",
    "0100", "1:30", "٣", "½", "1e3", "+5", " 5", "5 ", "--1", "1,000", "0b1", "1e", "True", "null",
)  # fmt: skip
TEXTS = (
    "", " ", "\t", "\n", "a\nb", "\r", "\x01", "\x1b[31mred\x1b[0m", "\x7f", "\x85", "\u2028", "\udcff", "\udcc3x",
    "é", "世界", "🌾", "e\u0301", "\u202e", "[/]", "[bold]", "[red", "{", "{}", "%s", "%20", "%", "$HOME", "~",
    "~nobody-here", "?", "*", "[", "**", "-", "--", "-x", "--help", "'", '"', "\\", "a b", "a" * 300, "x" * 100_000,
    "null", "true", "NaN", "none", "CON", "<|endoftext|>", "<|im_start|>", "0", "1", "latest", "main", "quickstart",
    "dbrx-132b", "gpt4", "MIT", "MIT AND", "(MIT OR", "MIT OR GPL-3.0", "GB", "1GiB", "-1GiB", "nanGiB", "1e400GB",
    "0B", "12T", "1e30T", "shard=2", "shard=0", "shard=nan,context=-1", "expert=10000000000", "shard=2,shard=2",
    "a100-80", "cpu", "zstd:19", "zstd:99", "gz:", "gz:-1",
)  # fmt: skip
PATHS = (
    "run", "run/", "./run", "run/.", "export", "quantized", "model.gguf", "notes", "notes/note-00.md", "tiny.yaml",
    "new", "new/deep/er", "new.gguf", "a?b%20c", "a#b&c", "q'uo\"te", "new\nline", "\udcff-bytes", "ünïcode",
    "n" * 300, "n/" * 2500 + "n", "missing", "missing.yaml", "empty", "empty.txt", "empty.yaml", "deep.yaml",
    "bomb.yaml", "list.yaml", "binary.yaml", "self.yaml", "tags.yaml", "keys.yaml", "date.yaml", "folder.yaml",
    "file.txt", "file.txt/below", "unreadable", "unreadable.txt", "unreadable.yaml", "readonly", "readonly/new",
    "dangling", "loop", "null", "full", "/dev/null/x", "/proc/self/mem", "/proc/self/nothing", ".", "", " ", "~",
    "~/x", "~nobody-here/x", "*.txt", "**/*.md", "[", "notes/*.md", "rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst",
    "rows.parquet", "cut.parquet", "numbers.parquet", "schema.json", "deep.json", "bad-config", "odd-config",
    "bad-tokenizer", "old.sqlite", "-", "-x",
)  # fmt: skip
URLS = (
    "http://127.0.0.1:9/x", "https://127.0.0.1:9", "http://", "http://[", "http://[::1", "http://127.0.0.1:99999",
    "http://\x01", "file:///", "file://", "file:missing", "file://host/x", "s3://", "s3://bucket/key", "gs://bucket",
    "az://x", "memory://x", "ftp://127.0.0.1:9/x", "://", "::", "a://b::c://d", "zip://x::file://y",
    "github://o:r@/x", "local://x", "data:,x", "sqlite://", "sqlite:///", "sqlite:///new.db",
    "sqlite:///missing/new.db", "sqlite:///file.txt", "sqlite:///empty", "sqlite:///new.db?mode=ro&uri=true",
    "sqlite:///file:x?mode=ro&uri=true", "sqlite:///x.db?timeout=abc", "sqlite+pysqlcipher://x",
    "postgresql://127.0.0.1:9/x", "postgresql+psycopg://127.0.0.1:9/x", "mysql://127.0.0.1/x", "oracle://x",
    "mssql+pyodbc://x", "databricks", "databricks://x", "http://user:pw@127.0.0.1:9", "127.0.0.1", "127.0.0.1:0",
    "0.0.0.0", "::1", "::", "localhost", "host.invalid", "256.1.1.1", "127.1", "fe80::1%lo", "a" * 64 + ".invalid",
    "org/name", "org/name/more", "../x", "org/..",
)  # fmt: skip
YAML = (
    "[]", "[1]", "[[]]", "{}", "{a: 1}", "{0.0: 1}", "{0.0: [3, 1]}", "{0.0: nan}", "{.nan: 1}",
    "{0.0: 1, 0.5: .inf}", "{0.0: [1, 2, 3]}", "{1: 2}", "{? {a: b} : c}", "{? [a] : c}", "[a, 1, null]", "[MIT]",
    "[stdlib]", "[gristmill, no-such]", "null", "~", "true", "no", "2001-01-01", "2001-99-99", "12:30:45", "0o17",
    "!!binary aGk=", "!!python/object:os.system x", "!!set {a}", "!!timestamp x", "!!int x", "!!float x", "&a [*a]",
    "&a {b: *a}", "*a", "<<: x", "{<<: [1]}", "'", '"', "\"\\ud800\"", "\"\\0\"", "\"\\x1b\"", "|\n a", "- a",
    "a: b: c", "@", "`", "%", "\t", "[" * 3000, "{a: " * 3000, "- " * 3000, "...", "---", "# x", "bfloat16",
    "float32", "muon", "adamw", "bias", "micro_batch", "dense", "rms_norm", "full", "selective", "roll_back", "stop",
    "go_on", "cosine", "start", "gpt4", "zstd", "gz", "br", "bz2:1", "snappy",
)  # fmt: skip

integers = st.one_of(st.sampled_from(NUMBERS), st.integers(-3, 200).map(str), st.integers().map(str))
sizes = st.one_of(
    st.integers(0, 9).map(str), st.sampled_from(("16", "32", "64", "128", "256", "384", "1000", "100000"))
)
shares = st.one_of(st.floats(0, 1).map(str), st.sampled_from(("0", "0.1", "0.5", "0.9", "1", "2", "10")))
floats = st.one_of(st.sampled_from(NUMBERS), st.floats().map(str), st.floats(0, 2).map(str))
# A command line cannot hold NUL; a byte that is not UTF-8 reaches Python as a lone surrogate.
texts = st.one_of(
    st.sampled_from(TEXTS), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40),
    st.binary(max_size=12).map(lambda data: os.fsdecode(data.replace(b"\0", b""))),
)  # fmt: skip
paths = st.sampled_from(PATHS)
urls = st.sampled_from(URLS)
anything = st.one_of(integers, floats, texts, paths, urls, st.sampled_from(YAML))


@st.composite
def of_type(draw: st.DrawFn, hint: Any) -> str:
    """Text that a user could give for a value of this type: right, almost right, or far off."""
    options = [hint]
    while any(typing.get_origin(option) in (typing.Union, types.UnionType, list) for option in options):
        options = [part for option in options for part in (typing.get_args(option) or (option,))]
    option = draw(st.sampled_from([option for option in options if option is not type(None)]))
    kind = draw(st.integers(0, 9))
    if kind == 9:
        return draw(anything)
    if typing.get_origin(option) is typing.Literal:
        return str(draw(st.sampled_from(typing.get_args(option))))
    if option is bool:
        return draw(st.sampled_from(("true", "false")))
    if option is int:
        return draw(sizes if kind < 5 else integers)
    if option is float:
        return draw(shares if kind < 5 else floats)
    if option is str:
        return draw(st.one_of(texts, paths, urls))
    return draw(paths if option is Path else st.sampled_from(YAML))


# ---- what there is to be given -------------------------------------------------------------------------


def commands(command: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every verb that takes no other verb, as its words and its command."""
    command = command or typer.main.get_command(app)
    if not hasattr(command, "commands"):
        yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*words, name))


def recipe_keys(cls: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a recipe and its type, and the sections, to be replaced whole."""
    for name, hint in typing.get_type_hints(cls).items():
        yield f"{path}{name}", hint
        if dataclasses.is_dataclass(hint):
            yield from recipe_keys(hint, f"{path}{name}.")
        elif typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            yield f"{path}{name}.notes", dict
            yield from recipe_keys(typing.get_args(hint)[1], f"{path}{name}.notes.")


COMMANDS = dict(commands())
KEYS = tuple(recipe_keys(schema()))
# A value that lets the verb get to its work. A parameter that is new has none until it is entered here: only the rest.
GOOD: dict[str | tuple[str, str], tuple[str, ...]] = {
    "recipe": ("tiny.yaml",), "name": ("tiny.yaml", "quickstart", "dbrx-9b"), "model": ("run", "export"),
    "path": ("run",), "src": ("export", "run"), "out": ("new",), "set": ("train.seed=1",), "prompt": ("kam",),
    "repository": ("org/name",), "gpus": ("8",), "step": ("0",), "max_tokens": ("5",), "port": ("0",),
    "dtype": ("bfloat16", "q8_0"), "format": ("dbrx", "gguf"),
    "documents": ("rows.jsonl",), "database": ("new.sqlite",), "json_schema": ("schema.json",),
    ("keys", "name"): ("ada",), ("run", "out"): ("run", "new"), ("corpus", "out"): ("run", "new"),
    ("tokenizer", "out"): ("run", "new"), ("shards", "out"): ("run", "new"), ("train", "out"): ("run", "new"),
}  # fmt: skip


@st.composite
def overrides(draw: st.DrawFn) -> str:
    key, hint = draw(st.sampled_from(KEYS))
    if draw(st.integers(0, 30)) == 0:
        return draw(texts)
    if draw(st.integers(0, 30)) == 0:
        key += draw(st.sampled_from([".", ".x", ".x.y", "..", ".0", " ", ".notes.path", "[0]"]))
    return f"{key}={draw(of_type(hint))}"


@dataclass(frozen=True)
class Sample:
    """One command line and the circumstances that it is run in."""

    words: tuple[str, ...]
    environment: dict[str, str | None]
    stdout: str
    umask: int

    def __repr__(self) -> str:
        words = " ".join(shlex.quote(word) if len(word) < 500 else f"{word[:50]!r}*{len(word)}" for word in self.words)
        return f"gristmill {words!a} with {self.environment}, stdout={self.stdout}, umask={self.umask:o}"


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    verb = draw(st.sampled_from(sorted(COMMANDS)))
    parameters = {p.name: p for p in COMMANDS[verb].params if p.name != "help"}
    chosen = {name for name, parameter in parameters.items() if parameter.required or not draw(st.integers(0, 5))}
    if "set" in parameters and draw(st.integers(0, 9)):
        chosen.add("set")
    odd = "set" if "set" in chosen else draw(st.sampled_from(sorted(chosen or {""})))  # the others are mostly right
    options: list[str] = []
    arguments: list[str] = []
    for name in sorted(chosen, key=list(parameters).index):
        parameter = parameters[name]
        flag = parameter.opts[0]
        if parameter.param_type_name == "argument":
            arguments.append(draw(value_of(verb[0], parameter, name == odd)))
        elif parameter.is_flag:
            options.append(flag)
        else:
            for _ in range(draw(st.sampled_from((1, 1, 1, 2))) if parameter.multiple else 1):
                value = draw(value_of(verb[0], parameter, name == odd))
                options += [f"{flag}={value}"] if draw(st.booleans()) else [flag, value]
    dashes = ["--"] if arguments and draw(st.integers(0, 9)) else []
    extra = [] if draw(st.integers(0, 40)) else [draw(texts)]
    words = (*verb, *options, *dashes, *arguments, *extra)
    return Sample(words, draw(environments()), draw(st.sampled_from(STDOUT)), draw(st.sampled_from(UMASKS)))


@st.composite
def value_of(draw: st.DrawFn, verb: str, parameter: Any, odd: bool) -> str:
    good = GOOD.get((verb, parameter.name), GOOD.get(parameter.name))
    if good and not odd and draw(st.integers(0, 19)):
        return draw(st.sampled_from(good))
    if parameter.metavar == "a.b=c":
        return draw(overrides())
    return draw(of_type(parameter.type_descriptor.annotation))


STDOUT = ("file", "file", "file", "ascii", "latin", "closed", "pipe", "full")
UMASKS = (0o022, 0o022, 0o077, 0o000, 0o777)


@st.composite
def environments(draw: st.DrawFn) -> dict[str, str | None]:
    """What differs from a plain environment; None removes the variable."""
    choices: dict[str, tuple[str | None, ...]] = {
        "HOME": (None, "", "missing", "/dev/null", "/proc", "file.txt", "readonly", "unreadable", "\udcff"),
        "LC_ALL": ("C", "POSIX", "C.UTF-8", "xx_XX", ""),
        "TERM": (None, "dumb", "xterm", "", "\udcff"),
        "COLUMNS": ("1", "0", "-5", "x", "100000", "20"),
        "NO_COLOR": ("", "1"),
        "FORCE_COLOR": ("", "1"),
        "TZ": ("", "Nowhere/None", ":"),
        "GRISTMILL_DATABASE": ("", "new.sqlite", "empty", "unreadable/x", "http://", "sqlite://"),
        "GRISTMILL_CACHE": ("", "file.txt", "readonly", "~nobody-here"),
        "XDG_STATE_HOME": ("", "file.txt", "relative", "readonly"),
        "XDG_CACHE_HOME": ("", "file.txt", "relative", "readonly"),
        "MLFLOW_TRACKING_URI": ("", "file.txt", "http://127.0.0.1:9", "sqlite://", "x://", "databricks"),
        "HF_TOKEN": ("", "x", "\n", "é"),
        "HF_ENDPOINT": ("", "x", "http://127.0.0.1:9", "ftp://x", "http://[", "\udcff"),
        "TMPDIR": ("", "missing", "file.txt", "readonly"),
        "WORLD_SIZE": ("", "0", "x", "-1"),
        "RANK": ("x", "1"),
        "OMP_NUM_THREADS": ("0", "x", "-1", "9999999"),
        "CXX": ("", "none"),
    }
    names = draw(st.lists(st.sampled_from(sorted(choices)), max_size=2, unique=True))
    return {name: draw(st.sampled_from(choices[name])) for name in names}
