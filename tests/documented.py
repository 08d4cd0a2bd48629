"""The commands and examples of the README and of docs/, read from the pages as a reader copies them."""

import re
import shlex
from pathlib import Path
from typing import Any

import typer

from gristmill.cli import app

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md") if page.name != "LOG.md")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages; "" is a block without a language."""
    return [text for language, text in FENCE.findall(text_of(page)) if language in languages]


def commands(page: str) -> list[list[str]]:
    """Each `gristmill` command in the fenced blocks of a page: its words without `gristmill`, in the page's order."""
    lines = [line for text in blocks(page, "", "bash") for line in text.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := arguments(line))]


def arguments(line: str) -> list[str]:
    """The words after `gristmill` or `-m gristmill.cli` in a shell line; empty when the line starts neither."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # half of a quotation that continues on the next line
        return []
    for name in ("gristmill", "gristmill.cli"):
        if name in words and (name == "gristmill.cli" or words[0] in ("gristmill", "torchrun")):
            rest = words[words.index(name) + 1 :]
            end = next((number for number, word in enumerate(rest) if word in ("|", ">", "&", ";")), len(rest))
            return rest[:end]
    return []


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command of the CLI that `words` start, and the words that are left for it.

    Raises LookupError when there is no such verb.
    """
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        if words and words[0] in command.commands:
            command, words = command.commands[words[0]], words[1:]
        elif command.name == "shards":
            command = command.commands["build"]
        else:
            raise LookupError(f"no verb {words[:1]}")
    return command, words


def parse(words: list[str]) -> None:
    """Parse a command line as the CLI does, without running it.

    Raises LookupError or click's UsageError when the CLI would not take it.
    """
    command, rest = find_command(words)
    command.make_context(command.name, list(rest))


def options(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
