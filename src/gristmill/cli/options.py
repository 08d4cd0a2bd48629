"""Arguments and options that several verbs share, and the reading of text arguments."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

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


class Verb(TyperCommand):
    """A verb whose help texts may contain `{NAME}`, a list of choices from another room's table.

    Only `--help` imports those rooms.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            text = getattr(parameter, "help", None) or ""
            if "{" in text:
                parameter.help = text.format_map(choices())  # type: ignore[attr-defined]  # arguments and options have it
        super().format_help(ctx, formatter)


def choices() -> dict[str, str]:
    """Return the lists of choices that help texts name."""
    from gristmill.hub.export import PRECISIONS
    from gristmill.hub.layouts import LAYOUTS
    from gristmill.hub.quantized import HEAD_BITS
    from gristmill.kernels.quantized import GROUPS, WIDTHS

    return {
        "layouts": _either(layout.model_type for layout in LAYOUTS),
        "precisions": _either(PRECISIONS),
        "gguf_types": _either(width.gguf for width in WIDTHS),
        "bits": _either(width.bits for width in WIDTHS),
        "head_bits": str(HEAD_BITS),
        "groups": _either(GROUPS),
    }


def _either(names: Iterable[object]) -> str:
    *first, last = map(str, names)
    return f"{', '.join(first)} or {last}" if first else last


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
