"""The command line: one module per group of verbs, no logic. Each verb calls a plain function of another room.

Verbs import other rooms inside their bodies, so that `gristmill --help` does not load torch.
"""

import os
import sys
from collections.abc import Callable

import typer

from gristmill.cli import exits, hub, inference, keys, records, sizing, stages
from gristmill.cli.options import Verb
from gristmill.cpus import limit_threads
from gristmill.home import check_endpoint

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Build fine-grained mixture-of-experts language models: raw text in, a trained and measured model out.\n\n"
    "Start with `gristmill run quickstart`.",
)
VERBS: dict[str, Callable[..., None]] = {  # in the order of `gristmill --help`
    "run": stages.run,
    "corpus": stages.corpus,
    "tokenizer": stages.tokenizer,
    "train": stages.train,
    "recipe": sizing.recipe,
    "generate": inference.generate,
    "pull": hub.pull,
    "import": hub.import_,
    "export": hub.export,
    "serve": inference.serve,
    "quantize": hub.quantize,
    "report": records.report,
    "count": sizing.count,
    "plan": sizing.plan,
    "verify": records.verify,
    "lineage": records.lineage,
}
app.add_typer(stages.shards, name="shards")
app.add_typer(keys.app, name="keys")
for name, verb in VERBS.items():
    app.command(name, cls=Verb)(verb)


@app.callback()
def prepare() -> None:
    limit_threads()  # before any verb imports torch
    check_endpoint()  # before any verb imports huggingface_hub


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 bad input, 75 saved on SIGTERM (run again), 130 Ctrl-C."""
    exits.prepare_streams()
    code = exits.exit_code(lambda: app(prog_name="gristmill", standalone_mode=False))
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):  # gloo's threads may wait for a lost rank, then abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
