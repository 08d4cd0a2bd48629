"""Verbs that move models between formats and places: pull, import, export and quantize."""

from pathlib import Path
from typing import Annotated

import typer

from gristmill.cli.options import ModelArg


def pull(
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="A model repository on the Hugging Face hub.")],
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit. [default: main]")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="[default: models/ORG--NAME]")] = None,
) -> None:
    """Fetch a published model: only the necessary files, and no code. Run the command again to resume.

    `HF_TOKEN` opens gated models, `HF_ENDPOINT` names a mirror.
    """
    from gristmill.hub.pull import pull as pull_model

    print(pull_model(repository, revision, out))


def import_(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A Hugging Face directory: {layouts}.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new directory.")],
) -> None:
    """Bring a published model in, tensor by tensor: weights in their own precision, tokenizer, settings, license.

    Nothing in SRC is executed, and pickled weights are rejected. Checksums that came with the files are checked. Errors
    name missing, unknown or damaged tensors.
    """
    from gristmill.hub.importing import import_model

    print(import_model(src, out).path)


def export(
    src: ModelArg,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new directory, or the new .gguf file.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of all weights: {precisions}; for gguf also {gguf_types}. [default: as each is stored]",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="{layouts}, or gguf for llama.cpp. [default: by OUT's ending, else the layout that fits the model]",
        ),
    ] = None,
) -> None:
    """Export a model as a Hugging Face directory for transformers, vLLM and SGLang, or as one GGUF file."""
    from gristmill.hub.export import export as export_model
    from gristmill.inference import find_model

    print(export_model(find_model(src), out, dtype, format))


def quantize(
    src: ModelArg,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new directory.")],
    bits: Annotated[int, typer.Option(help="{bits}, of each matrix; an output matrix of its own has {head_bits}.")] = 8,
    group: Annotated[int, typer.Option(help="{groups} inputs share a scale.")] = 64,
    documents: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text, JSONL or Parquet to measure on. [default: the test documents of its corpus]"
        ),
    ] = None,
) -> None:
    """Quantize a model's matrices, including the experts, and measure the loss of quality."""
    from gristmill.hub.quantized import QuantizeConfig
    from gristmill.inference.quantizing import quantize_model

    print(quantize_model(src, out, QuantizeConfig(bits=bits, group=group), documents).path)
