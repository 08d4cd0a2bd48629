"""Whatever a user gives to an option or a recipe key, and wherever: an exit code that is documented, and one line."""

import gzip
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import contained
import hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forked import gristmill
from hypothesis import HealthCheck, Phase, given, settings
from texts import TINY, write_texts

from gristmill import cli
from gristmill.errors import one_line
from gristmill.pipeline import run
from gristmill.recipe import load_recipe

STRESS = settings.get_current_profile_name() == "stress"
SECONDS = float("inf") if STRESS else 25.0  # for each user; what is left of the samples is not run then
LETTERS = "abcdefghijklmnopqrstuvwxyz"
numbers = itertools.count()


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder with a finished run, its recipe, and files of many kinds, in a place that a plain user can reach."""
    top = Path(tempfile.mkdtemp(prefix="options-"))
    top.chmod(0o755)
    folder = top / "home"
    folder.mkdir()
    before = Path.cwd()
    os.chdir(folder)
    try:
        _fill()
    finally:
        os.chdir(before)
    yield folder
    shutil.rmtree(top)


def _fill() -> None:
    """Write the files into the current folder."""
    for name, seed in (("notes", 1), ("verse", 2)):
        write_texts(Path(name), seed)
    recipe = TINY.format(notes="notes", verse="verse")
    Path("tiny.yaml").write_text(recipe)
    made = run(load_recipe("tiny.yaml"), Path("run"))
    shutil.copytree(next(made.glob("export/*")), "export")
    for folder in ("home", "empty"):
        Path(folder).mkdir()
    for words in (("quantize", "run", "quantized", "--group", "32"), ("export", "run", "model.gguf")):
        done = gristmill(*words, timeout_s=600)
        assert done.returncode == 0, done.stderr
    texts = {
        "empty.txt": "", "empty.yaml": "", "file.txt": "some text\n", "deep.yaml": "[" * 20_000, "list.yaml": "[1, 2]",
        "bomb.yaml": "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise(LETTERS)),
        "self.yaml": "base: self.yaml\n", "tags.yaml": "!!python/object:os.system x", 
        "keys.yaml": "{[1]: 2, {a: 1}: 3}",
        "date.yaml": "train: {steps: 2001-01-01}\n2001-01-01: x\n", "rows.jsonl": '{"text": "one row of text"}\n' * 20,
        "schema.json": '{"type": "object"}', "deep.json": "[" * 50_000,
    }  # fmt: skip
    for name, text in texts.items():
        Path(name).write_text(text)
    Path("folder.yaml").mkdir()
    Path("binary.yaml").write_bytes(bytes(range(256)))
    rows = Path("rows.jsonl").read_bytes()
    Path("rows.jsonl.gz").write_bytes(gzip.compress(rows)[:-9])
    Path("rows.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + rows)
    pq.write_table(pa.table({"text": ["some text"] * 9}), "rows.parquet")
    pq.write_table(pa.table({"text": [1, 2, None]}), "numbers.parquet")
    Path("cut.parquet").write_bytes(Path("rows.parquet").read_bytes()[:-20])
    for name, file, text in (
        ("bad-config", "config.json", "[" * 5000),
        ("odd-config", "config.json", '{"model_type": "dbrx", "d_model": "x", "attn_config": [], "vocab_size": -1}'),
        ("bad-tokenizer", "tokenizer.json", "{}"),
    ):
        shutil.copytree("export", name)
        Path(name, file).write_text(text)
    Path("old.sqlite").write_bytes(b"SQLite format 3\0" + bytes(4096))


def end(home: Path, *words: str, user: str = "caller", stdout: str = "file", **environment: str) -> contained.Ending:
    """How a command line ends."""
    sample = hostile.Sample(words, dict(environment), stdout, 0o022)
    return contained.attempt(sample, home, home.with_name(f"at-{next(numbers)}"), user)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("recipe",), "gristmill recipe: missing argument 'RECIPE'"),
        (("recipe", "quickstart", "--sett", "a=1"), "gristmill recipe: no such option: --sett"),
        (("shards", "show", "run", "--step", "x"), "gristmill shards show: invalid value for '--step': "),
        (("nonsense",), "gristmill: no such command 'nonsense'"),
        (("recipe", "two\nlines\x1b[31m"), "no recipe named"),
        (
            ("plan", "quickstart", "--gpus", "8", "--optimizer", "sgd"),
            "invalid value for '--optimizer': 'sgd' is not one of",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_problem(
    home: Path, words: tuple[str, ...], problem: str
) -> None:
    ended = end(home, *words)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, b"", 1)
    assert ended.err.startswith("error: ")
    assert problem in ended.err


@pytest.mark.parametrize(
    ("stdout", "reason"),
    [("closed", "error: standard output is closed"), ("full", "error: No space left on device"), ("pipe", "")],
)
def test_output_that_cannot_be_written_ends_with_1_and_its_reason(home: Path, stdout: str, reason: str) -> None:
    ended = end(home, "recipe", "tiny.yaml", stdout=stdout)
    assert ended.code == 1
    assert ended.err.startswith(reason)
    assert ended.err.count("\n") == bool(reason)


def test_a_verb_that_prints_nothing_needs_no_output(home: Path) -> None:
    assert end(home, "corpus", "tiny.yaml", "--out", "run", stdout="closed").code == 0


@pytest.mark.parametrize(("stdout", "shown"), [("ascii", rb"gr\xfc\u4e16"), ("file", "grü世".encode())])
def test_characters_that_the_output_does_not_have_are_escaped(home: Path, stdout: str, shown: bytes) -> None:
    ended = end(home, "recipe", "tiny.yaml", "--set", "tokenizer.kind=gpt4", "--set", "tokenizer.vocab_size=null",
                "--set", "tokenizer.table=grü世", stdout=stdout)  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    assert shown in ended.out


def test_memory_that_torch_cannot_allocate_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exits.exit_code(lambda: torch.empty(1 << 50)) == 1
    assert capsys.readouterr().err.startswith("error: not enough memory")


def test_an_argument_that_is_not_utf8_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exits.exit_code(lambda: "\udcff".encode()) == 2
    assert "error: '\\udcff' holds bytes that are not UTF-8" in capsys.readouterr().err


def test_an_error_of_ours_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="ours"):
        cli.exits.exit_code(lambda: (_ for _ in ()).throw(RuntimeError("ours")))


def test_messages_of_several_lines_become_one() -> None:
    assert one_line("a: b\n  c:\n\td\x1b[1m\n") == "a: b; c: d\\x1b[1m"
    assert one_line("") == ""
    assert len(one_line("x" * 1_000_000)) < 2100


@pytest.mark.parametrize("value", ["x", "0", "-1", "1e3", "9" * 30])
def test_a_number_of_processes_that_is_none_is_named(home: Path, value: str) -> None:
    ended = end(home, "corpus", "tiny.yaml", "--out", "run", WORLD_SIZE=value)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert f"WORLD_SIZE='{value}' must be an integer" in ended.err


@pytest.mark.timeout(0 if STRESS else 120)
@pytest.mark.parametrize("user", ["caller", "plain"])
def test_hostile_options_and_keys_end_with_a_documented_code_and_one_line(user: str, home: Path) -> None:
    if user == "plain" and os.getuid() != 0:
        pytest.skip("only root can become another user; the caller is a plain user already")
    until = time.monotonic() + SECONDS

    @settings(
        max_examples=2000 if STRESS else 60,
        derandomize=not STRESS,
        phases=[Phase.generate],  # a sample is a process: to shrink one would take minutes
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(hostile.samples())
    def check(sample: hostile.Sample) -> None:
        if time.monotonic() > until:
            return
        ended = contained.attempt(sample, home, home.with_name(f"at-{next(numbers)}"), user)
        if ended.code == contained.NO_PYTHON:
            pytest.skip("this Python is installed where only root can read it, and no mount namespace can show it")
        complaint = ended.complaint(sample.words[0])
        assert complaint is None, f"{complaint}: {sample} as {user}\n{ended.err[-3000:]}{ended.stack}"

    check()
