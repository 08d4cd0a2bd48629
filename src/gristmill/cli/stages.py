"""Verbs that run a recipe, whole or up to one stage, and the one that prints the documents of a training step."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gristmill.cli.options import OutOpt, RecipeArg, SetOpt


def _run(name: str, out: Path | None, overrides: list[str] | None, until: Any) -> None:
    from gristmill.pipeline import run as run_recipe
    from gristmill.recipe import load_recipe

    run_recipe(load_recipe(name, overrides or ()), out, until)


def run(recipe: RecipeArg, out: OutOpt = None, set: SetOpt = None) -> None:
    """Run all stages of a recipe, then write the report.

    What stands is not run again; after Ctrl-C the same command goes on where it was.
    """
    _run(recipe, out, set, None)


def corpus(recipe: RecipeArg, out: OutOpt = None, set: SetOpt = None) -> None:
    """Run a recipe up to its corpus: documents cleaned, deduplicated, licensed and split."""
    _run(recipe, out, set, "corpus")


def tokenizer(recipe: RecipeArg, out: OutOpt = None, set: SetOpt = None) -> None:
    """Run a recipe up to its tokenizer."""
    _run(recipe, out, set, "tokenizer")


def train(recipe: RecipeArg, out: OutOpt = None, set: SetOpt = None) -> None:
    """Run a recipe up to its trained model."""
    _run(recipe, out, set, "train")


class ShardsGroup(TyperGroup):
    """Accepts `shards RECIPE` for `shards build RECIPE`, like the verbs of other stages."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["build", *args]
        return super().parse_args(ctx, args)


shards = typer.Typer(
    cls=ShardsGroup, no_args_is_help=True, help="Build token shards (`shards RECIPE`), or look at them."
)


@shards.command()
def build(recipe: RecipeArg, out: OutOpt = None, set: SetOpt = None) -> None:
    """Run a recipe up to its token shards; `build` may be left out."""
    _run(recipe, out, set, "shards")


@shards.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run folder with a checkpoint, or a checkpoint.")],
    step: Annotated[int, typer.Option(min=0, help="The global step, from 0.")],
    full: Annotated[bool, typer.Option("--full", help="Print whole texts, not their beginnings.")] = False,
    remote: Annotated[str | None, typer.Option(help="Where remote shards lie now, if they have moved.")] = None,
    cache: Annotated[str | None, typer.Option(help="For remote shards  [default: the one that training used]")] = None,
) -> None:
    """Print the documents of a global step: what it trained on, whatever machines it ran on."""
    from gristmill.report.batch import batch_text

    for line in batch_text(path, step, full, remote, cache):
        print(line)
