"""Arguments and options that several verbs share, and the reading of text arguments."""

import os
from pathlib import Path
from typing import Annotated

import typer

from gristmill.errors import InputError

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a .yaml file.")]
OutOpt = Annotated[Path | None, typer.Option("--out", help="The run folder. [default: runs/NAME]")]
SetOpt = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", help="Change one key of the recipe; repeat it. The value is YAML."),
]
PathArg = Annotated[Path, typer.Argument(metavar="PATH", help="A run folder or an artifact in it.")]
ModelArg = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run folder, a checkpoint, or a Hugging Face directory.")
]
DatabaseOpt = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|URL",
        help="An SQLite file, or a URL that SQLAlchemy knows, such as postgresql+psycopg://host/name. "
        "[default: $GRISTMILL_DATABASE, else a file in your state folder]",
    ),
]


def utf8_text(name: str, given: str) -> str:
    """Return an argument as text. Python turns bytes that the locale cannot decode into lone surrogates.

    Raises InputError if the argument is not UTF-8.
    """
    try:
        given.encode()
        return given
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(given).decode()
    except UnicodeError:
        raise InputError(f"{name}={given!r:.80} is not UTF-8; convert it to UTF-8") from None
