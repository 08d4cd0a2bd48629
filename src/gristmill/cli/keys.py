"""Verbs for the endpoint's keys: create, list and revoke them, and show their usage."""

from contextlib import closing
from typing import Annotated, Literal

import typer

from gristmill.cli.options import DatabaseOpt

app = typer.Typer(
    no_args_is_help=True,
    help="Keys of the endpoint: make them, with limits; see what each has used.\n\n"
    "A server that runs knows of a new or revoked key at once. Give `--database` the same value as `gristmill serve`.",
)


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of a person or a program; usage is told by it.")],
    input_tokens_per_minute: Annotated[int | None, typer.Option(help="Of prompts. [default: no limit]")] = None,
    output_tokens_per_minute: Annotated[
        int | None, typer.Option(help="A request takes its max_tokens; what it does not use comes back. [as above]")
    ] = None,
    requests_per_hour: Annotated[int | None, typer.Option(help="[default: no limit]")] = None,
    parallel_requests: Annotated[int | None, typer.Option(help="At once. [default: no limit]")] = None,
    scope: Annotated[
        Literal["user", "operator"],
        typer.Option(help="operator may also read /metrics and /v1/load, the figures of all keys together."),
    ] = "user",
    database: DatabaseOpt = None,
) -> None:
    """Make a key and print it, as the last word. It is shown this once: only its hash is kept.

    All limits hold at once. Clients send it as `Authorization: Bearer KEY`; OpenAI's take it as `OPENAI_API_KEY`.
    """
    from gristmill.serve.database import Database
    from gristmill.serve.keys import create as create_key
    from gristmill.serve.limits import Limits

    limits = Limits(
        input_tokens_per_minute=input_tokens_per_minute,
        output_tokens_per_minute=output_tokens_per_minute,
        requests_per_hour=requests_per_hour,
        parallel_requests=parallel_requests,
    )
    with closing(Database(database)) as found:
        key = create_key(found, name, limits, scope == "operator")
    print(f"{name}: {limits}. Keep the key; it is not shown again:\n{key}")


@app.command("list")
def list_keys(database: DatabaseOpt = None) -> None:
    """All keys with their limits, revoked ones too. What is shown of a key opens nothing."""
    from gristmill.serve.database import Database
    from gristmill.serve.keys import all_keys, keys_text

    if (found := Database.existing(database)) is None:
        print("\n".join(keys_text([])))
        return
    with closing(found):
        print("\n".join(keys_text(all_keys(found))))


@app.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As given to `keys create`.")],
    database: DatabaseOpt = None,
) -> None:
    """End a key, from the next request on. What it has used stays in `keys usage`; its name is free again."""
    from gristmill.serve.database import Database
    from gristmill.serve.keys import no_such_key
    from gristmill.serve.keys import revoke as revoke_key

    if (found := Database.existing(database)) is None:
        raise no_such_key(name)
    with closing(found):
        print(f"revoked {name}, {revoke_key(found, name).label}")


@app.command("usage")
def usage(
    as_csv: Annotated[bool, typer.Option("--csv", help="As comma-separated values, for a spreadsheet.")] = False,
    database: DatabaseOpt = None,
) -> None:
    """Requests, tokens and cost by day (UTC), key and model. Costs are by the prices that `serve` had at the time."""
    from gristmill.serve.database import Database
    from gristmill.serve.usage import usage_csv, usage_text, used

    lines = []
    if (found := Database.existing(database)) is not None:
        with closing(found):
            lines = used(found)
    print(usage_csv(lines) if as_csv else "\n".join(usage_text(lines)) + "\n", end="")
