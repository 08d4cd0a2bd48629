"""The command line: one subcommand per verb, no logic. Each verb is a plain Python function elsewhere."""

import codecs
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from gristmill.cpus import limit_threads
from gristmill.errors import Failure, InputError, one_line

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Build fine-grained mixture-of-experts language models: raw text in, a trained and measured model out.\n\n"
    "Start with `gristmill run quickstart`.",
)

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


@app.callback()
def prepare() -> None:
    limit_threads()  # before any verb imports torch


def _run(name: str, out: Path | None, overrides: list[str] | None, until: Any) -> None:
    from gristmill.pipeline import run as run_recipe
    from gristmill.recipe import load_recipe

    run_recipe(load_recipe(name, overrides or ()), out, until)


@app.command()
def run(recipe: RecipeArg, out: OutOpt = None, set: SetOpt = None) -> None:
    """Run all stages of a recipe, then write the report.

    What stands is not run again; after Ctrl-C the same command goes on where it was.
    """
    _run(recipe, out, set, None)


@app.command()
def corpus(recipe: RecipeArg, out: OutOpt = None, set: SetOpt = None) -> None:
    """Run a recipe up to its corpus: documents cleaned, deduplicated, licensed and split."""
    _run(recipe, out, set, "corpus")


@app.command()
def tokenizer(recipe: RecipeArg, out: OutOpt = None, set: SetOpt = None) -> None:
    """Run a recipe up to its tokenizer."""
    _run(recipe, out, set, "tokenizer")


class ShardsGroup(TyperGroup):
    """`shards RECIPE` is `shards build RECIPE`, like the other stages."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["build", *args]
        return super().parse_args(ctx, args)


shards = typer.Typer(
    cls=ShardsGroup, no_args_is_help=True, help="Build token shards (`shards RECIPE`), or look at them."
)
app.add_typer(shards, name="shards")


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


@app.command()
def train(recipe: RecipeArg, out: OutOpt = None, set: SetOpt = None) -> None:
    """Run a recipe up to its trained model."""
    _run(recipe, out, set, "train")


@app.command()
def recipe(name: RecipeArg, set: SetOpt = None) -> None:
    """Print a recipe with every key resolved, as YAML that `run` takes."""
    from gristmill.recipe import load_recipe, to_yaml

    print(to_yaml(load_recipe(name, set or ())), end="")


@app.command()
def generate(
    model: ModelArg,
    prompt: Annotated[str, typer.Argument(help="The text to continue; with --chat the user's message to answer.")],
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt as a message in a conversation.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="With --chat: the system prompt.")] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="At most so many new tokens, and no more than the context has room for.")
    ] = 128,
    # `Sampling` has the bounds of the settings that follow, and checks them before the model is loaded.
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. [default: as published with the model, else 0.8]")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Keep the most probable tokens up to this mass, above 0 up to 1. [default: as published, else 0.95]"
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=0, help="Keep so many of the most probable tokens; 0 is all. [default: as published, else 0]"),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Keep tokens this times as probable as the first, from 0 to 1. [default: as published]"),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Values above 1 discourage repeated tokens; from 0.01 to 100. [default: as published, else 1: none]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answer with JSON that is valid for this schema.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="At most so much memory, like 16GiB: what does not fit is read when used."),
    ] = None,
) -> None:
    """Continue a text, or answer it, streaming. The prompt is text only: control tokens in it stay characters."""
    from gristmill.inference import find_model, load_for_answer, parse_bytes, read_schema, stream
    from gristmill.inference.settings import published_sampling

    if system is not None and not chat:
        raise InputError("--system only applies to chat; add --chat")
    prompt, system = _utf8("PROMPT", prompt), system and _utf8("--system", system)
    grammar = read_schema(json_schema) if json_schema is not None else None
    published = published_sampling(find_model(model))
    for setting in published.not_applied:
        print(f"note: the model is published with {setting}, which is not applied", file=sys.stderr)
    sampling = published.sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    asked = messages if chat else prompt
    engine = load_for_answer(model, asked, max_tokens, None if memory is None else parse_bytes(memory))
    answer = stream(engine, asked, sampling, max_tokens, published.stop_ids, grammar)
    sys.stdout.write("" if chat else prompt)
    for text in answer:
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _utf8(name: str, given: str) -> str:
    """Return an argument as text. Python gives lone surrogates for bytes that the locale's encoding does not have."""
    try:
        given.encode()
        return given
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(given).decode()
    except UnicodeError:
        raise InputError(f"{name}={given!r:.80} is not UTF-8; convert it to UTF-8") from None


@app.command()
def pull(
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="A model repository on the Hugging Face hub.")],
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit. [default: main]")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="[default: models/ORG--NAME]")] = None,
) -> None:
    """Fetch a published model: only the files that are needed, nothing that runs; run again, it goes on.

    `HF_TOKEN` opens gated models, `HF_ENDPOINT` names a mirror.
    """
    from gristmill.hub.pull import pull as pull_model

    print(pull_model(repository, revision, out))


@app.command("import")
def import_(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A Hugging Face directory: dbrx or qwen3_moe.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new directory.")],
) -> None:
    """Bring a published model in, tensor by tensor: weights in their own precision, tokenizer, settings, license.

    Nothing in SRC is run, and pickled weights are refused. What the files' checksums say, when any came with them, is
    checked; what is missing, unknown or damaged is named.
    """
    from gristmill.hub.importing import import_model

    print(import_model(src, out).path)


@app.command()
def export(
    src: ModelArg,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new directory, or the new .gguf file.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "q8_0", "q4_0"] | None,
        typer.Option(help="Of all weights; q8_0 and q4_0 are for gguf. [default: as each is stored]"),
    ] = None,
    format: Annotated[
        Literal["dbrx", "qwen3_moe", "gguf"] | None,
        typer.Option(help="gguf is for llama.cpp. [default: by OUT's ending, else the layout that fits the model]"),
    ] = None,
) -> None:
    """Give a model out: as a Hugging Face directory for transformers, vLLM and SGLang, or as one GGUF file."""
    import torch

    from gristmill.hub.export import export_gguf, export_model
    from gristmill.inference import find_model

    in_blocks = dtype in ("q8_0", "q4_0")
    precision = getattr(torch, dtype) if dtype and not in_blocks else None
    if format == "gguf" or (format is None and out.suffix == ".gguf"):
        print(export_gguf(find_model(src), out, dtype if in_blocks else precision))
    elif in_blocks:
        raise InputError(f"--dtype {dtype} is for GGUF files; `gristmill quantize` makes quantized directories")
    else:
        print(export_model(find_model(src), out, precision, format).path)


keys = typer.Typer(
    no_args_is_help=True,
    help="Keys of the endpoint: make them, with limits; see what each has used.\n\n"
    "A server that runs knows of a new or revoked key at once. Give `--database` the same value as `gristmill serve`.",
)
app.add_typer(keys, name="keys")
DatabaseOpt = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|URL",
        help="An SQLite file, or a URL that SQLAlchemy knows, such as postgresql+psycopg://host/name. "
        "[default: $GRISTMILL_DATABASE, else a file in your state folder]",
    ),
]


@keys.command("create")
def keys_create(
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
    from contextlib import closing

    from gristmill.serve.database import Database
    from gristmill.serve.keys import create
    from gristmill.serve.limits import Limits

    limits = Limits(
        input_tokens_per_minute=input_tokens_per_minute,
        output_tokens_per_minute=output_tokens_per_minute,
        requests_per_hour=requests_per_hour,
        parallel_requests=parallel_requests,
    )
    with closing(Database(database)) as found:
        key = create(found, name, limits, scope == "operator")
    print(f"{name}: {limits}. Keep the key; it is not shown again:\n{key}")


@keys.command("list")
def keys_list(database: DatabaseOpt = None) -> None:
    """All keys with their limits, revoked ones too. What is shown of a key opens nothing."""
    from contextlib import closing

    from gristmill.serve.database import Database
    from gristmill.serve.keys import all_keys, keys_text

    if (found := Database.existing(database)) is None:
        print("\n".join(keys_text([])))
        return
    with closing(found):
        print("\n".join(keys_text(all_keys(found))))


@keys.command("revoke")
def keys_revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As given to `keys create`.")],
    database: DatabaseOpt = None,
) -> None:
    """End a key, from the next request on. What it has used stays in `keys usage`; its name is free again."""
    from contextlib import closing

    from gristmill.serve.database import Database
    from gristmill.serve.keys import no_such_key, revoke

    if (found := Database.existing(database)) is None:
        raise no_such_key(name)
    with closing(found):
        print(f"revoked {name}, {revoke(found, name).label}")


@keys.command("usage")
def keys_usage(
    as_csv: Annotated[bool, typer.Option("--csv", help="As comma-separated values, for a spreadsheet.")] = False,
    database: DatabaseOpt = None,
) -> None:
    """Requests, tokens and cost by day (UTC), key and model. Costs are by the prices that `serve` had at the time."""
    from contextlib import closing

    from gristmill.serve.database import Database
    from gristmill.serve.usage import usage_csv, usage_text, used

    lines = []
    if (found := Database.existing(database)) is not None:
        with closing(found):
            lines = used(found)
    print(usage_csv(lines) if as_csv else "\n".join(usage_text(lines)) + "\n", end="")


@app.command()
def serve(
    model: ModelArg,
    host: Annotated[str, typer.Option(help="The address to listen on; a public one needs keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's id for clients. [default: MODEL's last part]")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds that one request may take.")] = 600,
    drain_s: Annotated[float, typer.Option("--drain", help="Seconds that what runs gets after SIGTERM.")] = 30,
    input_price: Annotated[float, typer.Option(min=0, help="Of a million tokens of prompts, for `keys usage`.")] = 0,
    output_price: Annotated[float, typer.Option(min=0, help="Of a million tokens of answers.")] = 0,
    database: DatabaseOpt = None,
) -> None:
    """Serve a model to OpenAI's clients: completions, chat, tokens, metrics.

    Keys are asked for when one was made before the start (`gristmill keys create NAME`), and with `--database`.
    """
    from decimal import Decimal

    from gristmill.serve.config import ServeConfig
    from gristmill.serve.start import serve as serve_model
    from gristmill.serve.usage import Prices

    cfg = ServeConfig(host=host, port=port, name=name or model.resolve().name, request_s=timeout_s, drain_s=drain_s)
    prices = Prices(input=Decimal(str(input_price)), output=Decimal(str(output_price)))
    raise typer.Exit(serve_model(model, cfg, database, prices))


@app.command()
def quantize(
    src: ModelArg,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new directory.")],
    bits: Annotated[int, typer.Option(help="8 or 4, of each matrix; an output matrix of its own has 8.")] = 8,
    group: Annotated[int, typer.Option(help="32, 64 or 128 inputs share a scale.")] = 64,
    documents: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text, JSONL or Parquet to measure on. [default: the test documents of its corpus]"
        ),
    ] = None,
) -> None:
    """Store a model's matrices, experts included, as small whole numbers, and measure what that costs."""
    from gristmill.hub.quantized import QuantizeConfig
    from gristmill.inference.quantizing import quantize_model

    print(quantize_model(src, out, QuantizeConfig(bits=bits, group=group), documents).path)


@app.command()
def report(path: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")]) -> None:
    """Write a run's report again from what stands in its folder."""
    from gristmill.pipeline import rewrite_report

    print(rewrite_report(path))


@app.command()
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


@app.command()
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
        Literal["adamw", "muon"] | None, typer.Option(help="[default: the recipe's, else adamw]")
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


@app.command()
def verify(path: PathArg) -> None:
    """Hash every file that the manifests cover; names a damaged one and exits with 1."""
    from gristmill.artifact import verify as verify_path
    from gristmill.progress import data_size

    result = verify_path(path)
    for line in result.not_covered:
        print(f"not covered: {line}")
    for line in result.problems:
        print(line, file=sys.stderr)
    if result.problems:
        raise typer.Exit(1)
    print(f"{result.num_files:,} files, {data_size(result.num_bytes)}: every byte is as it was written")


@app.command()
def lineage(path: PathArg) -> None:
    """Walk from a model back to each source and license."""
    from gristmill.artifact import Origin, load_ours
    from gristmill.artifact import lineage as lineage_of
    from gristmill.current import find_checkpoint
    from gristmill.progress import data_size

    told: set[str] = set()

    def show(node: Origin, depth: int) -> None:
        title = node.kind if node.kind == node.name else f"{node.kind} {node.name}"
        if node.id in told and node.inputs:
            print(f"{'  ' * depth}{title}  {node.content[:12]}  as above")
            return
        told.add(node.id)
        licenses = node.detail.get("licenses", {})
        said = ", ".join(f"{name} {data_size(size)}" for name, size in sorted(licenses.items(), key=lambda x: -x[1]))
        said = said or node.detail.get("license_name") or node.detail.get("license", "")
        print(f"{'  ' * depth}{title}  {node.content[:12]}  {said}".rstrip())
        for parent in node.inputs:
            show(parent, depth + 1)

    show(lineage_of(path if load_ours(path) else find_checkpoint(path) or path), 0)


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 bad input, 75 saved on SIGTERM (run again), 130 Ctrl-C."""
    _settle_streams()
    code = _exit_code(lambda: app(prog_name="gristmill", standalone_mode=False))
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):  # gloo's threads may wait for a lost rank, then abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


UsageError: Any = typer.BadParameter.__base__  # typer has a private copy of click, which defines it
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Closed(io.TextIOBase):
    """Standard output that was closed before Python started: only a verb that prints needs it."""

    def write(self, text: str) -> int:
        raise Failure("standard output is closed; redirect it to a file, or to /dev/null to discard it")


def _settle_streams() -> None:
    """Python sets a closed stream to None; and a terminal or a locale may lack characters that we print."""
    codecs.register_error("gristmill", _encodable)
    if sys.stdout is None:
        sys.stdout = _Closed()
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="gristmill")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends


def _encodable(problem: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a file name as they were; characters that the encoding does not have as escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(problem)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(problem)


def _exit_code(call: Callable[[], Any]) -> int:
    """Run `call` and return its exit code; errors of the user or the environment become one line on standard error."""
    try:
        code = int(call() or 0)
        sys.stdout.flush()  # here, because an error at the interpreter's exit would print a traceback
        return code
    except UsageError as bad:
        return _usage(bad)
    except InputError as bad:
        return _fail(bad, 2)
    except Failure as failure:
        return _fail(failure, 1)
    except UnicodeEncodeError as bad:  # Python's form of bytes that are not UTF-8, in an argument or a file name
        if "surrogates" not in bad.reason:
            raise
        return _fail(f"{bad.object!r} holds bytes that are not UTF-8, which is only possible in names of files", 2)
    except BrokenPipeError:  # the reader has left, as `head` does: no message
        _discard_output()
        return 1
    except OSError as problem:
        if problem.errno is None:
            raise
        _discard_output()
        return _fail(_reason(problem), 1)
    except (MemoryError, RuntimeError) as problem:
        if not _is_out_of_memory(problem):
            raise
        return _fail("not enough memory; close other programs, or use a smaller model, batch or limit", 1)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BaseException as stop:
        signum = getattr(stop, "signum", None)
        if signum is None:
            raise
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130 if signum == signal.SIGINT else 75


def _fail(message: object, code: int) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    return code


def _usage(bad: Any) -> int:
    """A wrong command line: the problem and where to read the rule. A missing verb prints the help instead."""
    command = bad.ctx.command_path if bad.ctx is not None else "gristmill"
    if bad.__class__.__name__ == "NoArgsIsHelpError":
        bad.show()
        return 2
    problem = bad.format_message().strip().rstrip(".").replace("Value error, ", "")
    return _fail(f"{command}: {problem[:1].lower()}{problem[1:]}; see `{command} --help`", 2)


def _is_out_of_memory(problem: MemoryError | RuntimeError) -> bool:
    """torch has no class for this on CPUs; its class for GPUs is not imported here: not every verb needs torch."""
    named = type(problem).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(problem)
    return isinstance(problem, MemoryError) or named


def _reason(problem: OSError) -> str:
    """What the system refused, for which file, and what to do about it."""
    files = [str(file) for file in (problem.filename, problem.filename2) if file is not None]
    where = f" ({' -> '.join(files)})" if files else ""
    if problem.errno in DISK_FULL:
        fix = "free some room"
    elif problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "make it writable or choose --out"
    else:
        fix = "correct this"
    return f"{problem.strerror}{where}; {fix}, then run the same command: finished stages are kept"


def _discard_output() -> None:
    """Send what is still buffered nowhere: the interpreter flushes it at its exit, which would fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
