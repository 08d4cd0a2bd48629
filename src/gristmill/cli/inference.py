"""Verbs that compute with a model: generate and serve."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from gristmill.cli.options import DatabaseOpt, ModelArg, utf8_text
from gristmill.errors import InputError


def generate(
    model: ModelArg,
    prompt: Annotated[str, typer.Argument(help="The text to continue; with --chat the user's message to answer.")],
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt as a message in a conversation.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="With --chat: the system prompt.")] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="At most so many new tokens, and no more than the context has room for.")
    ] = 128,
    # The table in inference/sampler.py defines these parameters. A test compares names, helps and defaults with it.
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Values above 1 flatten the distribution; 0 always takes the most probable token (greedy). "
            "[default: as published, else 0.8]"
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Keep the most probable tokens up to this probability mass. [default: as published, else 0.95]"
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Keep this many of the most probable tokens; 0 keeps all. [default: as published, else 0]", min=0
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Keep tokens at least this times as probable as the most probable one. [default: as published, else 0]"
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Values above 1 discourage tokens that the prompt or the answer contains already. "
            "[default: as published, else 1]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answer, regardless of the batch.")] = 0,
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
    prompt, system = utf8_text("PROMPT", prompt), system and utf8_text("--system", system)
    grammar = read_schema(json_schema) if json_schema is not None else None
    published = published_sampling(find_model(model))
    for setting in published.not_applied:
        print(f"note: the model is published with {setting}, which is not applied", file=sys.stderr)
    given = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    sampling = published.sampling(given)
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


def serve(
    model: ModelArg,
    host: Annotated[str, typer.Option(help="The address to listen on; a public one needs keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's id for clients. [default: MODEL's last part]")] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Use at most this much memory, like 16GiB, for weights and cache together. Weights come first and the "
            "cache gets the rest; experts that do not fit are read from disk when used.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Compute in this precision. [default: as stored; bfloat16 if quantized]"),
    ] = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            help="Capacity of the key/value cache, of all requests together. A larger cache runs more requests at once "
            "and keeps more prompts. [default: 32768; with --memory, as many as fit]"
        ),
    ] = None,
    max_running: Annotated[
        int, typer.Option(help="Sequences in one step. More raise throughput and slow down each of them.")
    ] = 64,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait for the engine, within --max-requests. More get 503.")
    ] = 1024,
    token_budget: Annotated[
        int,
        typer.Option(
            help="Tokens of one step. More read long prompts faster; fewer shorten the gaps between an answer's tokens."
        ),
    ] = 512,
    max_requests: Annotated[
        int, typer.Option(help="HTTP requests at once, running, waiting and arriving. More get 503.")
    ] = 512,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds that one request may take.")] = 600,
    drain_s: Annotated[float, typer.Option("--drain", help="Seconds for running requests to end after SIGTERM.")] = 30,
    input_price: Annotated[float, typer.Option(min=0, help="Of a million tokens of prompts, for `keys usage`.")] = 0,
    output_price: Annotated[float, typer.Option(min=0, help="Of a million tokens of answers.")] = 0,
    database: DatabaseOpt = None,
) -> None:
    """Serve a model to OpenAI's clients: completions, chat, tokens, metrics.

    Keys are asked for when one was made before the start (`gristmill keys create NAME`), and with `--database`.
    """
    from decimal import Decimal

    from gristmill.inference import EngineConfig, parse_bytes
    from gristmill.serve.config import ServeConfig
    from gristmill.serve.start import serve as serve_model
    from gristmill.serve.usage import Prices

    cfg = ServeConfig(
        host=host,
        port=port,
        name=model.resolve().name if name is None else name,
        max_requests=max_requests,
        request_s=timeout_s,
        drain_s=drain_s,
    )
    engine = EngineConfig(
        cache_tokens=cache_tokens, max_running=max_running, max_waiting=max_waiting, token_budget=token_budget
    )
    memory_bytes = None if memory is None else parse_bytes(memory)
    prices = Prices(input=Decimal(str(input_price)), output=Decimal(str(output_price)))
    raise typer.Exit(serve_model(model, cfg, engine, dtype, memory_bytes, database, prices))
