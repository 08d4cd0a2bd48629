"""`gristmill import`: a published directory becomes a model artifact of ours, tensor by tensor.

model.json, model*.safetensors   our names, in the dtype that was published
tokenizer/                       tokenizer.json and its settings, without anything that would run
generation.json                  the settings that it was published with
documents/                       its makers' license, notices and card
manifest.json                    where it came from and every file's hash
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill import artifact
from gristmill.artifact import MANIFEST, Artifact, Built
from gristmill.errors import Failure, InputError
from gristmill.hub.checkpoint import CONFIG, TOKENIZER
from gristmill.hub.folder import DOCUMENTS, GENERATION, LICENSES
from gristmill.hub.published import CONFIG_JSON, GENERATION_JSON, read_json, read_published
from gristmill.hub.tensors import INDEX, Weight, Weights, write_weights
from gristmill.model import ModelConfig
from gristmill.progress import bar, console
from gristmill.tokenizer import Tokenizer
from gristmill.tokenizer.chat import published_system_prompt
from gristmill.tokenizer.gpt4 import write_gpt4

FORMAT = 1
DBRX_VOCAB_SIZE = 100_352  # GPT-4's table and DBRX's special tokens, rounded up
PULLED = "pulled.json"  # what `gristmill pull` says of the directory that it fetched
SETTINGS = (
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def import_model(src: Path, out: Path) -> Artifact:
    """Convert the Hugging Face directory `src` into the new directory `out`.

    The largest tensor decides the memory: what is read is a map of the file, what is written is not kept.
    Raises InputError for what is not a model of a known layout (tensors that miss, are unknown or of another shape
    are named), Failure for damage: files that are cut short, that differ from the hashes that came with them, or hold
    NaN or infinity.
    """
    known = known_hashes(src)
    try:
        cfg, weights = read_published(src)
    except (InputError, Failure):
        if known:
            check_files(src, known)  # a damaged file says more than what its damage looks like
        raise
    if not any(name.endswith(".safetensors") for name in known):
        console.print(
            "  no checksums came with these weights: damage inside them shows only as NaN, infinity or a wrong header"
        )
    num_bytes = sum(weight.nbytes for weight in weights.values())
    source = describe_source(src, check_files(src, known))
    inputs = {"export": artifact.load(src)} if (src / MANIFEST).is_file() else {}  # it tells its origin itself
    with artifact.building(out, num_bytes) as folder:
        (folder / CONFIG).write_bytes(artifact.canonical(asdict(cfg)))
        with bar("converting", num_bytes) as advance:
            write_weights(folder, finite(weights), advance=advance)
        import_tokenizer(src, cfg, folder / TOKENIZER)
        import_documents(src, folder)
        config = {"model": asdict(cfg)}
        key = artifact.stage_key("model", FORMAT, config, {"source": source["fingerprint"]})
        sources = {} if inputs else {source["name"]: source}
        built = Built(metrics={"weight_bytes": num_bytes}, sources=sources)
        artifact.commit(folder, kind="model", key=key, config=config, inputs=inputs, built=built)
    return artifact.load(out)


# ---- is it whole? --------------------------------------------------------------------------------------


def check_files(src: Path, known: Mapping[str, str]) -> dict[str, str]:
    """The SHA-256 of each file of the model. Raises Failure for one that differs from the hash that came with it."""
    files = [file for file in (src / CONFIG_JSON, src / INDEX, *sorted(src.glob("*.safetensors"))) if file.is_file()]
    hashes: dict[str, str] = {}
    with bar("checking", sum(file.stat().st_size for file in files)) as advance:
        for file in files:
            found = artifact.sha256_file(file, advance)
            if found != known.get(file.name, found):
                raise Failure(
                    f"{file} is damaged: its SHA-256 is {found[:12]}…, and {known[file.name][:12]}… came with it; "
                    "fetch it again"
                )
            hashes[file.name] = found
    return hashes


def describe_source(src: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What the manifest says of where the model came from."""
    pulled = read_json(src / PULLED) or {}
    license = str(pulled.get("license") or card_license(src) or "unknown")
    return {
        "name": str(pulled.get("repository") or src.resolve().name),
        "revision": pulled.get("commit"),
        "license": license,
        "licenses": {},
        "fingerprint": artifact.content_hash({name: {"sha256": digest} for name, digest in hashes.items()}),
    }


def known_hashes(src: Path) -> dict[str, str]:
    """File name -> SHA-256: from our own manifest, the hub client's notes, or the hub cache's file names."""
    known: dict[str, str] = {}
    if (src / MANIFEST).is_file():
        known |= {name: entry["sha256"] for name, entry in artifact.load(src).manifest["files"].items()}
    for note in (src / ".cache/huggingface/download").glob("*.metadata"):
        lines = note.read_text(errors="replace").splitlines()
        if len(lines) > 1 and is_sha256(lines[1]):  # the commit, then the file's tag: SHA-256 where Git LFS keeps it
            known[note.name.removesuffix(".metadata")] = lines[1]
    for file in src.glob("*.safetensors"):
        if file.is_symlink() and is_sha256(blob := file.readlink().name):
            known[file.name] = blob
    return known


def is_sha256(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def finite(weights: Weights) -> Weights:
    return {name: replace(weight, load=partial(_load_finite, name, weight)) for name, weight in weights.items()}


def _load_finite(name: str, weight: Weight) -> Tensor:
    tensor = weight.load()
    if tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
        raise Failure(f"{name} holds NaN or infinity: the file is damaged, or the training that made it diverged")
    return tensor


def card_license(src: Path) -> str | None:
    """The license that the card's front matter names."""
    card = src / "README.md"
    if not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    said = dict(re.findall(r"^(license|license_name):\s*([\w.+-]+)\s*$", head[1], re.MULTILINE)) if head else {}
    return said.get("license_name") or said.get("license")


# ---- what comes with the weights -----------------------------------------------------------------------


def import_tokenizer(src: Path, cfg: ModelConfig, out: Path) -> None:
    """Copy or make the tokenizer; says why when there is none.

    The original DBRX came with a wrapper in Python, which is not run: its vocabulary is GPT-4's, and is made from that.
    """
    config = read_json(src / "tokenizer_config.json") or {}
    template = chat_template(src, config)
    prompt = published_system_prompt(template) if template else None
    if (src / "tokenizer.json").is_file():
        Tokenizer.load(src)  # refuses what is not one
        out.mkdir()
        shutil.copyfile(src / "tokenizer.json", out / "tokenizer.json")
        kept = {key: value for key, value in config.items() if key not in ("auto_map", "added_tokens_decoder")}
        if "auto_map" in config or "tokenizer_class" not in config:
            kept["tokenizer_class"] = "PreTrainedTokenizerFast"
        kept |= {"chat_template": template} if template else {}
        kept |= {"default_system_prompt": prompt} if prompt else {}
        (out / "tokenizer_config.json").write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    elif cfg.vocab_size == DBRX_VOCAB_SIZE:
        out.mkdir()
        try:
            write_gpt4(out, default_system_prompt=prompt)
        except InputError as problem:
            out.rmdir()
            console.print(f"  no tokenizer: {problem}", markup=False)
    else:
        console.print(f"  {src} has no tokenizer.json: the model is imported without a tokenizer", markup=False)


def chat_template(src: Path, config: Mapping[str, Any]) -> str | None:
    file = src / "chat_template.jinja"
    given = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    return given if isinstance(given, str) else None


def import_documents(src: Path, out: Path) -> None:
    published = read_json(src / GENERATION_JSON) or {}
    if kept := {key: published[key] for key in SETTINGS if published.get(key) is not None}:
        (out / GENERATION).write_bytes(artifact.canonical(kept))
    documents = [file for pattern in (*LICENSES, "README.md") for file in src.glob(pattern) if file.is_file()]
    for file in documents:
        (out / DOCUMENTS).mkdir(exist_ok=True)
        shutil.copyfile(file, out / DOCUMENTS / file.name)
