"""Verbs that describe a recipe or a model before anything runs: recipe, count and plan."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from gristmill.cli.options import RecipeArg, SetOpt


def recipe(name: RecipeArg, set: SetOpt = None) -> None:
    """Print a recipe with every key resolved, as YAML that `run` takes."""
    from gristmill.recipe import load_recipe, to_yaml

    print(to_yaml(load_recipe(name, set or ())), end="")


def count(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe or shape, a .yaml file, or a model.")],
    set: SetOpt = None,
) -> None:
    """Parameters, operations and bytes of a model, part by part."""
    from gristmill.hub.folder import open_model
    from gristmill.inference import find_model
    from gristmill.recipe import load_shape
    from gristmill.report.shape import shape_text

    if Path(name).is_dir() and not set:
        model = open_model(find_model(Path(name)))
        print(shape_text(Path(name).resolve().name, model.cfg, model.cfg.max_seq_len, model.stored_bytes))
    else:
        shape = load_shape(name, set or ())
        print(shape_text(shape.name, shape.model, shape.context))


def known_optimizer(name: str | None) -> str | None:
    """Check an optimizer's name against the table, which imports torch and is therefore read as late as possible."""
    if name is not None:
        from gristmill.train.optim import OPTIMIZERS

        if name not in OPTIMIZERS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, OPTIMIZERS))}.")
    return name


def plan(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe or shape, or a .yaml file.")],
    gpus: Annotated[int, typer.Option(help="How many, up to 100,000; with --gpu cpu, processes.")],
    gpu: Annotated[str, typer.Option(help="a100-80, h100, h200, b200, or cpu: this machine's, measured.")] = "h100",
    mesh: Annotated[
        str | None, typer.Option(metavar="shard=N,context=N,expert=N", help="train.parallel. [default: the fastest]")
    ] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sequence. [default: the recipe's]")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Of a step. [default: the recipe's, else 4,194,304 or 4,096 a GPU]")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Sequences. [default: the most that fit]")] = None,
    recompute: Annotated[
        Literal["none", "selective", "full"] | None, typer.Option(help="[default: the fastest that fits]")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(callback=known_optimizer, help="train.optimizer.name. [default: the recipe's, else adamw]"),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="To train on: 300B, 12T. [default: the recipe's, else 12T]")
    ] = None,
    expert_load: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|RUN",
            help="With expert parallelism: tokens of the busiest GPU's experts over the mean, as a number or from a "
            "run folder's figures. [default: from runs/NAME, else 2 for one or two experts a GPU, less for more]",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same figures as one JSON object.")] = False,
    set: SetOpt = None,
) -> None:
    """Compute the memory, traffic and time of a training before you pay for it, and what to change.

    Prints its assumptions and its errors in the past. Exits with 1 when nothing fits.
    """
    from gristmill.recipe import load_shape
    from gristmill.report.plan import DEFAULT_TOKENS, check_split, figures, parse_tokens, plan_text, planned

    shape = load_shape(name, set or ())
    train = shape.train
    found = planned(
        shape.model, train, gpus, gpu, mesh, seq, batch_tokens, micro_batch, recompute, optimizer, expert_load,
        run=Path("runs") / shape.name,
    )  # fmt: skip
    total = float(train.steps * train.batch_tokens) if train else DEFAULT_TOKENS
    said = figures(shape.name, found, total if tokens is None else parse_tokens(tokens))
    check_split(said, found)
    print(json.dumps(said, indent=2) if as_json else plan_text(said))
    if not said["fits"]:
        raise typer.Exit(1)
