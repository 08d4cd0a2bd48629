"""Claims about the start token, against transformers: what it puts before a text, ours puts before a text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import processors
from transformers import AutoTokenizer

from gristmill import artifact
from gristmill.artifact import Built
from gristmill.errors import Failure, InputError
from gristmill.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from gristmill.tokenizer.layout import hugging_face_config, write_tokenizer
from gristmill.tokenizer.start import upgrade

TEXTS = ("", "grain", " grain\n", "<|endoftext|>", "<|endoftext|>grain", "<|im_start|>user\nGrind!<|im_end|>")


def auto(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@given(text=st.text(max_size=20) | st.sampled_from(TEXTS))
def test_a_trained_tokenizer_puts_one_start_token_before_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.start_id == tokenizer.eot_id
    ids = tokenizer.encode_prompt(text)
    assert ids == [tokenizer.eot_id, *tokenizer.encode(text)]
    assert ids.count(tokenizer.eot_id) == 1  # a name in the text stays text


def test_transformers_adds_the_same_token_and_keeps_it_when_it_saves(tokenizer_dir: Path, tmp_path: Path) -> None:
    ours = Tokenizer.load(tokenizer_dir)
    auto(tokenizer_dir).save_pretrained(tmp_path)
    for folder in (tokenizer_dir, tmp_path):
        theirs = auto(folder)
        for text in ("", "grain", "def mill(grain):\n    return 1"):
            ids = theirs(text)["input_ids"]
            assert ids == ours.encode_prompt(text) == Tokenizer.load(folder).encode_prompt(text)
            assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
            assert theirs.decode(ids, skip_special_tokens=True) == text
            assert theirs(text, truncation=True, max_length=3)["input_ids"] == ids[:3]
        assert theirs(["grain", "a"])["input_ids"] == [ours.encode_prompt("grain"), ours.encode_prompt("a")]


def test_conversations_have_no_start_token(tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    turns = [{"role": "user", "content": "Grind!"}]
    ids = tokenizer.chat(turns, generation_prompt=True)
    assert ids[0] == tokenizer.im_start_id
    assert ids == auto(tokenizer_dir).apply_chat_template(turns, add_generation_prompt=True)["input_ids"]


CHATML = hugging_face_config()["chat_template"]


@pytest.mark.parametrize(
    ("template", "bos", "begins"),
    [
        (CHATML, "<|endoftext|>", False),
        ("{{ bos_token }}" + CHATML, "<|endoftext|>", True),
        ("{{ bos_token }}" + CHATML, {"content": "<|im_end|>", "special": True, "__type": "AddedToken"}, True),
        ("{{ bos_token }}" + CHATML, None, False),
        ("{{ bos_token if bos_token is defined else '' }}" + CHATML, "<|endoftext|>", True),
        ("{# no bos_token #}" + CHATML, "<|endoftext|>", False),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_a_template_that_writes_the_start_token_has_it_before_its_first_turn(
    qwen_dir: Path, tmp_path: Path, template: str, bos: Any, begins: bool, as_file: bool
) -> None:
    shutil.copyfile(qwen_dir / "tokenizer.json", tmp_path / "tokenizer.json")
    config = json.loads((qwen_dir / "tokenizer_config.json").read_text()) | {"bos_token": bos}
    config |= {} if as_file else {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if as_file:
        (tmp_path / "chat_template.jinja").write_text(template)
    ours, turns = Tokenizer.load(tmp_path), [{"role": "user", "content": "Grind!"}]
    ids = ours.chat(turns, generation_prompt=True)
    assert ids == auto(tmp_path).apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert (ids[0] != ours.im_start_id) == begins
    assert ours.encode_prompt("Grind!") == ours.encode("Grind!")  # a text is another matter


def around(before: list[str], after: list[str], ids: dict[str, int]) -> Any:
    single, special = [*before, "$A", *after], [(name, ids[name]) for name in {*before, *after}]
    return processors.TemplateProcessing(single=" ".join(single), pair="$A $B", special_tokens=special)


START, OTHER = "<|im_start|>", "<|endoftext|>"
POST_PROCESSORS: dict[str, Callable[[dict[str, int]], Any]] = {
    "none": lambda ids: None,
    "bytes": lambda ids: processors.ByteLevel(trim_offsets=False),
    "start": lambda ids: around([START], [], ids),
    "bytes, then start": lambda ids: processors.Sequence([processors.ByteLevel(), around([START], [], ids)]),
    "nothing": lambda ids: around([], [], ids),
    "both sides": lambda ids: around([START], [OTHER], ids),
    "end": lambda ids: around([], [OTHER], ids),
    "two": lambda ids: around([START, OTHER], [], ids),
    "roberta": lambda ids: processors.RobertaProcessing((OTHER, ids[OTHER]), (START, ids[START])),
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"bos_token": OTHER},
    {"add_bos_token": True},
    {"add_bos_token": True, "bos_token": None},
    {"add_bos_token": True, "bos_token": OTHER},
    {"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": START, "special": True}},
    {"add_bos_token": False, "bos_token": OTHER},
    {"add_bos_token": None, "bos_token": OTHER},
    {"add_eos_token": False, "bos_token": OTHER},
    {"add_eos_token": True},
    {"add_bos_token": True, "add_eos_token": False, "bos_token": START},
]


@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_a_published_tokenizer_begins_a_text_as_in_transformers(qwen_dir: Path, tmp_path: Path, kind: str) -> None:
    library = LibraryTokenizer.from_file(str(qwen_dir / "tokenizer.json"))
    if post_processor := POST_PROCESSORS[kind](library.get_vocab()):
        library.post_processor = post_processor
    library.save(str(tmp_path / "tokenizer.json"))
    plain = json.loads((qwen_dir / "tokenizer_config.json").read_text())
    for settings in SETTINGS:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(plain | settings))
        theirs = auto(tmp_path)
        before, _, after = (theirs.decode(theirs("grain")["input_ids"])).partition("grain")
        if after or before not in ("", START, OTHER):
            with pytest.raises(
                InputError, match=r"supports one start token and nothing after a text\. Change post_processor"
            ):
                Tokenizer.load(tmp_path)
            continue
        ours = Tokenizer.load(tmp_path)
        assert ours.encode_prompt("grain") == theirs("grain")["input_ids"], settings
        assert ours.encode_prompt("") == theirs("")["input_ids"], settings


def test_a_damaged_post_processor_is_named(qwen_dir: Path, tmp_path: Path) -> None:
    description = json.loads((qwen_dir / "tokenizer.json").read_text())
    for damaged in ({"type": "Stamp"}, [], {"type": "TemplateProcessing"}, {"type": "BertProcessing", "sep": 5}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(description | {"post_processor": damaged}))
        with pytest.raises(Failure, match=r"tokenizer\.json is not a byte-level BPE"):
            Tokenizer.load(tmp_path)


# ---- GPT-4's table, published and trained on -----------------------------------------------------------


def test_the_published_dbrx_tokenizer_adds_nothing(gpt4: Tokenizer, gpt4_auto: Any) -> None:
    assert gpt4.start_id is None
    assert gpt4.encode_prompt("grain") == gpt4_auto("grain")["input_ids"]
    assert gpt4.encode_prompt("") == []


# ---- tokenizers that earlier versions trained ----------------------------------------------------------


@pytest.fixture
def before(tokenizer_dir: Path) -> Callable[[Path], Path]:
    """Writes a tokenizer as an earlier version trained it: its files say that nothing is added."""

    def make(folder: Path, prompt: str | None = None) -> Path:
        folder.mkdir(parents=True)
        description = json.loads((tokenizer_dir / "tokenizer.json").read_text()) | {"post_processor": None}
        write_tokenizer(folder, json.dumps(description, indent=2), prompt)
        assert json.loads((folder / "tokenizer_config.json").read_text())["add_bos_token"] is False
        return folder

    return make


def commit(folder: Path, kind: str, **inputs: artifact.Artifact) -> artifact.Artifact:
    (folder / "file").write_text("")
    return artifact.commit(folder, kind=kind, key="k", config={}, inputs=inputs, built=Built())


def test_a_tokenizer_that_an_earlier_version_trained_has_the_start_token(
    before: Callable[[Path], Path], tmp_path: Path
) -> None:
    trained = commit(before(tmp_path / "run" / "tokenizer" / "01234567"), "tokenizer")
    before(tmp_path / "step" / "tokenizer")
    checkpoint = commit(tmp_path / "step", "checkpoint", tokenizer=trained)
    before(tmp_path / "next" / "tokenizer")
    commit(tmp_path / "next", "checkpoint", start=checkpoint)
    for folder in (trained.path, tmp_path / "step" / "tokenizer", tmp_path / "next" / "tokenizer"):
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.encode_prompt("grain") == [tokenizer.eot_id, *tokenizer.encode("grain")]
        upgrade(folder, before(copy := tmp_path / "copy"))
        assert auto(copy)("grain")["input_ids"] == tokenizer.encode_prompt("grain")
        assert Tokenizer.load(copy).start_id == tokenizer.eot_id
        shutil.rmtree(copy)


def test_published_files_that_add_nothing_are_taken_at_their_word(
    before: Callable[[Path], Path], tmp_path: Path
) -> None:
    """An export of an earlier version, an import of one, and a model that was trained further from there."""
    exported = commit(before(tmp_path / "export"), "export")
    before(tmp_path / "model" / "tokenizer")
    imported = commit(tmp_path / "model", "model", export=exported)
    before(tmp_path / "step" / "tokenizer")
    commit(tmp_path / "step", "checkpoint", start=imported)
    alone = before(tmp_path / "alone" / "tokenizer")
    foreign = before(tmp_path / "site" / "tokenizer")
    (tmp_path / "site" / "manifest.json").write_text('["not", "ours"]')
    for folder in (exported.path, imported.path / "tokenizer", tmp_path / "step" / "tokenizer", alone, foreign):
        assert Tokenizer.load(folder).start_id is None
        files = {file.name: file.read_bytes() for file in alone.iterdir()}
        upgrade(folder, alone)
        assert {file.name: file.read_bytes() for file in alone.iterdir()} == files


def test_training_further_takes_the_start_token_over(
    before: Callable[[Path], Path], corpus: Path, qwen_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    old = before(tmp_path / "old" / "tokenizer")
    commit(tmp_path / "old", "checkpoint")
    for start, has_start in ((old, True), (tokenizer_dir, True), (qwen_dir, False)):
        (out := tmp_path / "out").mkdir()
        build_tokenizer(TokenizerConfig(kind="start"), corpus, out, start)
        assert (Tokenizer.load(out).start_id is not None) == has_start
        assert (auto(out)("a")["input_ids"] == auto(out)("a", add_special_tokens=False)["input_ids"]) != has_start
        shutil.rmtree(out)
