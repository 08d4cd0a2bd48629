"""The README and docs/ name only verbs, options, recipe keys, files and make targets that exist."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
from documented import INLINE, PAGES, ROOT, arguments, commands, find_command, options, parse, text_of

from gristmill.recipe import schema

KEY = re.compile(r"(corpus|tokenizer|shards|model|train|evaluate|export)(\.[a-z_0-9]+)+")
SOURCES = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "src").rglob("*.py"))  # messages name commands too


@pytest.mark.parametrize("page", PAGES)
def test_every_documented_command_is_one_that_the_cli_takes(page: str) -> None:
    for words in commands(page):
        parse(words)


def test_a_command_that_the_cli_would_refuse_is_noticed() -> None:
    for line in (
        "gristmill grind mine",
        "gristmill run mine --sett a=1",
        "gristmill plan mine",
        "gristmill keys make a",
    ):
        with pytest.raises(Exception, match=r"no verb|No such option|Missing parameter"):
            parse(arguments(line))


def test_every_verb_and_option_named_in_a_sentence_exists() -> None:
    for code in (code for page in (*PAGES, *SOURCES) for code in INLINE.findall(text_of(page))):
        words = re.sub(r"[\[\]()|]", " ", code).split()
        if len(words) < 2 or words[0] != "gristmill" or not words[1].islower() or not words[1].isalpha():
            continue
        command, rest = find_command(words[1:])
        unknown = {word.split("=")[0] for word in rest if word.startswith("--")} - options(command) - {"--help"}
        assert not unknown, code


def fields(cls: type, prefix: str = "") -> typing.Iterator[str]:
    """Each key of a configuration class and of the classes in it, with dots between."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield prefix + field.name
        for part in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(part):
                yield from fields(typing.cast(type, part), f"{prefix}{field.name}.")


@pytest.mark.parametrize("page", PAGES)
def test_every_recipe_key_that_a_page_names_exists(page: str) -> None:
    known = set(fields(schema()))
    assert {"train.checkpoint.copy_to", "shards.remote", "evaluate.temperature"} <= known
    for code in INLINE.findall(text_of(page)):
        if (found := KEY.match(code)) and Path(code).suffix not in (".py", ".json"):
            assert found[0] in known, code


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_make_target_that_a_page_names_exists(page: str) -> None:
    text = text_of(page)
    for path in re.findall(r"\b((?:benchmarks|tests|docs|src)/[\w/.-]+\.(?:py|md|json|png))", text):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, target


@pytest.mark.parametrize("page", PAGES)
def test_every_link_between_the_pages_leads_somewhere(page: str) -> None:
    for path, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", text_of(page)):
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), path
        titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
