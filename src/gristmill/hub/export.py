"""A model leaves as a Hugging Face directory: as a recipe's last stage, checked by opening it with transformers, or
by `gristmill export`.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gristmill import artifact
from gristmill.artifact import Artifact, Built, Origin
from gristmill.errors import Failure, InputError
from gristmill.hub.agreement import compare, compare_tokenizers
from gristmill.hub.card import model_card
from gristmill.hub.folder import CARD, ModelFolder, name_of, open_model
from gristmill.hub.importing import card_license, check_files, copy_tokenizer, known_hashes
from gristmill.hub.layouts import LAYOUTS, published_layout
from gristmill.hub.published import write_published
from gristmill.hub.quantized import QuantizeConfig
from gristmill.hub.settings import SpecialIds
from gristmill.hub.tensors import MAX_SHARD_BYTES, assemble
from gristmill.kernels.quantized import WIDTHS
from gristmill.progress import bar, console
from gristmill.stage import Checked, Context, Stage, StageRun, Unsupported
from gristmill.tokenizer import Tokenizer

MAX_CHECKED_TOKENS = 256  # of each held-out sequence
ORIGINAL_CARD = "ORIGINAL_README.md"  # the card of the model that this one descends from
FORMAT = 2
GGUF = "gguf"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`license` is the one that you give the model, as the hub spells it; "other" refers to the card's list.

    `checked_sequences` held-out sequences must give the same logits in transformers, `checked_greedy` of them also
    the same greedy continuation.
    """

    name: str = "gristmill-dbrx"
    license: str = "other"
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_shard_bytes: int = MAX_SHARD_BYTES
    checked_sequences: int = 8
    checked_greedy: int = 4

    def __post_init__(self) -> None:
        for name in ("max_shard_bytes", "checked_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.checked_greedy <= self.checked_sequences:
            raise ValueError(
                f"checked_greedy={self.checked_greedy} must be from 0 to checked_sequences={self.checked_sequences}"
            )


def build_export(cfg: ExportConfig, checkpoint: Path, evaluation: Path, out: Path) -> Built:
    """Write the directory into the empty `out`, then compare it with ours on the evaluation's held-out texts.

    checkpoint: a checkpoint artifact with its `tokenizer/`. evaluation: an evaluation artifact.
    Metrics: export_max_logit_diff, export_max_logit, export_greedy_equal, export_greedy_ties.
    Raises Failure when transformers computes something else.
    """
    dtype: torch.dtype = getattr(torch, cfg.dtype)
    model = open_model(checkpoint)
    if model.tokenizer is None:
        raise InputError(f"{checkpoint} has no tokenizer; a recipe's export needs one")
    write_directory(out, model, dtype, cfg.max_shard_bytes)
    figures = _read_evaluation(evaluation)
    licensed = {"license": cfg.license}
    card = model_card(cfg.name, licensed, model, artifact.load(checkpoint), artifact.lineage(checkpoint), figures)
    (out / "README.md").write_text(card, encoding="utf-8")

    console.print("  checking the export against transformers")
    texts = [sample["prompt"] + sample["truth"] for sample in figures["samples"]][: cfg.checked_sequences]
    if not texts:
        raise InputError(f"{evaluation} has no samples to check the export on; evaluate with samples of at least 1")
    tokenizer = Tokenizer.load(model.tokenizer)
    compare_tokenizers(out, tokenizer, texts)
    limit = min(MAX_CHECKED_TOKENS, model.cfg.max_seq_len)
    sequences = [tokenizer.encode_prompt(text)[:limit] for text in texts]
    ours = assemble(model.cfg, {name: weight.to(dtype) for name, weight in model.weights.items()})
    agreement = compare(out, ours, sequences, cfg.checked_greedy)
    return Built(metrics={f"export_{name}": value for name, value in asdict(agreement).items()})


def export(src: Path, out: Path, dtype: str | None = None, format: str | None = None) -> Path:
    """Write the model in `src` as the new directory or GGUF file `out`, and return its path.

    Args:
        dtype: one of `dtype_names()`, for all weights; None keeps each weight's.
        format: one of `format_names()`; None is GGUF for a file name that ends in .gguf, else the layout that fits.
    Raises InputError for an unknown name, and for what the format cannot express.
    """
    for name, given, known in (("dtype", dtype, dtype_names()), ("format", format, format_names())):
        if given is not None and given not in known:
            raise InputError(f"--{name} {given!r:.80} is not one of {', '.join(known)}")
    precision = PRECISIONS.get(dtype or "")
    if format == GGUF or (format is None and out.suffix == ".gguf"):
        return export_gguf(src, out, precision or dtype)
    if dtype and not precision:
        raise InputError(f"--dtype {dtype} is for GGUF files; `gristmill quantize` makes quantized directories")
    return export_model(src, out, precision, format).path


def dtype_names() -> list[str]:
    return [*PRECISIONS, *(width.gguf for width in WIDTHS)]


def format_names() -> list[str]:
    return [*(layout.model_type for layout in LAYOUTS), GGUF]


def export_model(src: Path, out: Path, dtype: torch.dtype | None = None, layout: str | None = None) -> Artifact:
    """Write the model in `src` (whatever `open_model` takes) as the new Hugging Face directory `out`.

    dtype: None keeps the one that each tensor is stored in. layout: a published layout's `model_type`; None takes the
    one that fits. Memory is that of the largest tensor or two. Raises InputError when no published layout, or not the
    wanted one, can express this model, or when `out` holds something.
    """
    model = open_model(src)
    if layout not in (None, fitting := published_layout(model.cfg).model_type):
        raise InputError(f"{src} cannot leave as {layout}: its norms and attention are those of {fitting}")
    if known := known_hashes(src):
        check_files(src, known)
    ours = artifact.load_ours(src)
    origin = artifact.lineage(src) if ours else None
    num_bytes = sum(weight.to(dtype or weight.dtype).nbytes for weight in model.weights.values())
    with artifact.building(out, num_bytes) as folder:
        with bar("exporting", num_bytes) as advance:
            write_directory(folder, model, dtype, MAX_SHARD_BYTES, advance)
        card = model_card(name_of(out), license_of(src, origin), model, ours, origin, None)
        (folder / "README.md").write_text(card, encoding="utf-8")
        config = {"dtype": str(dtype or "as stored")}
        inputs = {} if ours is None else {"model": ours}
        key = artifact.stage_key("export", FORMAT, config, {name: a.content for name, a in inputs.items()})
        artifact.commit(folder, kind="export", key=key, config=config, inputs=inputs, built=Built())
    return artifact.load(out)


def export_gguf(src: Path, out: Path, dtype: torch.dtype | str | None = None) -> Path:
    """Write the model in `src` and its tokenizer as the new file `out`, which llama.cpp runs.

    dtype: also a width's GGUF type, such as "q8_0".

    Raises InputError for what llama.cpp cannot say, or when `out` is there already.
    """
    from gristmill.hub.gguf import write_gguf  # its package takes a while to import

    model = open_model(src)
    if out.suffix != ".gguf":
        raise InputError(f"{out} must be a file name that ends in .gguf")
    if out.exists():
        raise InputError(f"{out} is there already; give a new name, or remove it")
    if model.tokenizer is None:
        raise InputError(f"{src} has no tokenizer, which a GGUF file holds; put the one there that it was trained with")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{out} lies below a file; choose another place") from None
    if known := known_hashes(src):
        check_files(src, known)
    if isinstance(dtype, str):
        num_bytes = sum(
            torch.Size(weight.shape).numel() for weight in model.weights.values()
        )  # at most: 34 bytes for 32
    else:
        num_bytes = sum(weight.to(dtype or weight.dtype).nbytes for weight in model.weights.values())
    artifact.require_room(out, num_bytes)
    licensed = license_of(src, artifact.lineage(src) if artifact.load_ours(src) else None)
    license = licensed.get("license_name", licensed["license"])
    write_gguf(
        out, model.cfg, model.weights, model.tokenizer, name=Path(name_of(out)).stem, license=license, dtype=dtype
    )
    return out


def write_directory(
    out: Path,
    model: ModelFolder,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    advance: Callable[[float], None] = lambda num_bytes: None,
    quantize: QuantizeConfig | None = None,
) -> None:
    """Weights, configuration, tokenizer and the papers that travel with them; not the card."""
    for paper in model.papers:
        shutil.copyfile(paper, out / (ORIGINAL_CARD if paper.name == CARD else paper.name))
    ids = None
    if model.tokenizer:
        tokenizer = Tokenizer.load(model.tokenizer)
        ids = SpecialIds(eot_id=tokenizer.eot_id, pad_id=tokenizer.pad_id, im_end_id=tokenizer.im_end_id)
        copy_tokenizer(model.tokenizer, model.cfg, out)
    write_published(
        out,
        model.cfg,
        model.weights,
        ids,
        dtype=dtype,
        quantize=quantize,
        generation=model.generation,
        max_shard_bytes=max_shard_bytes,
        advance=advance,
    )


def license_of(src: Path, origin: Origin | None) -> dict[str, str]:
    """What a card says of a published model that is given out unchanged; "other" for one that was trained here."""
    if origin is None:
        return card_license(src) or {"license": "other"}
    while origin.kind in ("model", "export", "quantized") and origin.inputs:  # a bare checkpoint has no origin
        origin = origin.inputs[0]
    return {key: str(origin.detail[key]) for key in ("license", "license_name") if key in origin.detail} or {
        "license": "other"
    }


def _read_evaluation(path: Path) -> dict[str, Any]:
    file = path / "evaluation.json"
    try:
        figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is not an evaluation: it has no {file.name}") from None
    except ValueError as problem:
        raise Failure(f"{file} is damaged: {problem}") from None
    return figures


# ---- the stage -----------------------------------------------------------------------------------------


def _check(cfg: ExportConfig, context: Context) -> Checked:
    try:
        published_layout(context.recipe["model"])
    except InputError as reason:
        raise Unsupported(str(reason)) from None
    return Checked()


def _build(run: StageRun[ExportConfig], out: Path) -> Built:
    return build_export(run.config, run.inputs["train"].path, run.inputs["evaluate"].path, out)


def _summary(metrics: Mapping[str, Any]) -> str:
    return f"logits agree with transformers within {metrics['export_max_logit_diff']:.1e}"


EXPORT_STAGE = Stage(
    name="export",
    format=FORMAT,
    config=ExportConfig,
    inputs=("train", "evaluate"),
    check=_check,
    build=_build,
    doing="writing the Hugging Face directory and checking it",
    summary=_summary,
)
