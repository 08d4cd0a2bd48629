"""Verbs that move models between formats and places: pull, import, export and quantize."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gristmill.cli.options import ModelArg
from gristmill.errors import InputError


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
