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
import yaml
from torch import Tensor

from gristmill import artifact
from gristmill.artifact import Artifact, Built
from gristmill.current import TOKENIZER
from gristmill.errors import Failure, InputError
from gristmill.hub.checkpoint import CONFIG
from gristmill.hub.folder import CARD, DOCUMENTS, GENERATION, PULLED, name_of, papers
from gristmill.hub.layouts import published_layout
from gristmill.hub.published import CONFIG_JSON, GENERATION_JSON, read_published
from gristmill.hub.settings import dropouts, read_json
from gristmill.hub.tensors import INDEX, Weight, Weights, write_weights
from gristmill.model import ModelConfig
from gristmill.progress import bar, console
from gristmill.tokenizer import Tokenizer
from gristmill.tokenizer.chat import published_system_prompt
from gristmill.tokenizer.gpt4 import write_gpt4
from gristmill.tokenizer.start import upgrade

FORMAT = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
READ = (CONFIG_JSON, INDEX, GENERATION_JSON, *TOKENIZER_FILES)  # of a published directory, beside the weights
READ_OF_OURS = (CONFIG, GENERATION, *(f"{TOKENIZER}/{name}" for name in TOKENIZER_FILES))


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
    for name, dropout in dropouts(read_json(src / CONFIG_JSON) or {}).items():
        console.print(f"  {name}={dropout} is left out: it applies to training only, and training here has no dropout")
    num_bytes = sum(weight.nbytes for weight in weights.values())
    with artifact.building(out, num_bytes) as folder:
        (folder / CONFIG).write_bytes(artifact.canonical(asdict(cfg)))
        import_tokenizer(src, cfg, folder / TOKENIZER)
        import_settings(src, folder)
        for paper in papers(src):
            (folder / DOCUMENTS).mkdir(exist_ok=True)
            shutil.copyfile(paper, folder / DOCUMENTS / paper.name)
        hashes = check_files(src, known)
        if not any(name.endswith(".safetensors") for name in known):
            console.print(
                "  no checksums came with these weights: damage inside them shows only as NaN, infinity or a bad header"
            )
        with bar("converting", num_bytes) as advance:
            write_weights(folder, finite(weights), advance=advance)
        ours = artifact.load_ours(src)  # a directory that we exported tells its origin itself
        source = describe_source(src, hashes)
        config = {"model": asdict(cfg)}
        artifact.commit(
            folder,
            kind="model",
            key=artifact.stage_key("model", FORMAT, config, {"source": source["fingerprint"]}),
            config=config,
            inputs={"export": ours} if ours else {},
            built=Built(metrics={"weight_bytes": num_bytes}, sources={} if ours else {source["name"]: source}),
        )
    return artifact.load(out)


def import_once(path: Path, folder: Path) -> Artifact:
    """A model as an artifact of ours: `path` itself, or its import below `folder`, made when it is not there yet."""
    if (path / CONFIG).is_file():
        return artifact.load(path)
    ours = artifact.load_ours(path)
    content = ours.content if ours else _fingerprint(check_files(path, known_hashes(path)))
    out = folder / content[:16]
    return artifact.load(out) if (out / artifact.MANIFEST).exists() else import_model(path, out)


# ---- is it whole? --------------------------------------------------------------------------------------


def check_files(src: Path, known: Mapping[str, str]) -> dict[str, str]:
    """The SHA-256 of each file that is read. Raises Failure for one that differs from the hash that came with it."""
    weights = sorted(file.name for file in src.glob("*.safetensors"))
    files = [src / name for name in (*READ, *READ_OF_OURS, *weights) if (src / name).is_file()]
    hashes: dict[str, str] = {}
    with bar("checking", sum(file.stat().st_size for file in files)) as advance:
        for file in files:
            found, name = artifact.sha256_file(file, advance), file.relative_to(src).as_posix()
            if found != known.get(name, found):
                raise Failure(
                    f"{file} is damaged: its SHA-256 is {found[:12]}…, and {known[name][:12]}… came with it; "
                    "fetch or build it again"
                )
            hashes[name] = found
    return hashes


def describe_source(src: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What the manifest says of where the model came from. Raises Failure when the record of `pull` is damaged."""
    pulled = read_json(src / PULLED) or {}
    for key in ("repository", "commit", "license"):
        value = pulled.get(key)
        if value is not None and not (isinstance(value, str) and value.isprintable()):
            raise Failure(
                f"{src / PULLED} is damaged: {key}={value!r:.80} must be one line of text; pull the model again"
            )
    return {
        "name": pulled.get("repository") or name_of(src),
        "revision": pulled.get("commit"),
        **(card_license(src) or {"license": pulled.get("license") or "unknown"}),
        "licenses": {},
        "fingerprint": _fingerprint(hashes),
    }


def _fingerprint(hashes: Mapping[str, str]) -> str:
    return artifact.content_hash({name: {"sha256": digest} for name, digest in hashes.items()})


def known_hashes(src: Path) -> dict[str, str]:
    """File name -> SHA-256: from our own manifest, the hub client's notes, or the hub cache's file names."""
    known: dict[str, str] = {}
    if ours := artifact.load_ours(src):
        known |= {name: entry["sha256"] for name, entry in ours.manifest["files"].items()}
    for note in (src / ".cache/huggingface/download").glob("*.metadata"):
        lines = note.read_text(errors="replace").splitlines() if note.is_file() else []
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


def card_license(src: Path) -> dict[str, str] | None:
    """`license`, and `license_name` where the hub knows it as "other", from the card's front matter."""
    card = src / CARD
    if not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        said = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not said.get("license"):
        return None
    given = said["license"]
    license = " AND ".join(map(str, given)) if isinstance(given, list) else str(given)
    return {"license": license} | ({"license_name": str(said["license_name"])} if said.get("license_name") else {})


# ---- what comes with the weights -----------------------------------------------------------------------


def import_tokenizer(src: Path, cfg: ModelConfig, out: Path) -> None:
    """Copy or make the tokenizer; says why when there is none.

    The original DBRX came with a wrapper in Python, which is not run: its vocabulary is GPT-4's, and is made from that.
    """
    if (src / "tokenizer.json").is_file():
        copy_tokenizer(src, cfg, out)
        return
    has_another = any((src / name).is_file() for name in ("vocab.json", "tokenizer.model"))
    if cfg.vocab_size != published_layout(cfg).gpt4_vocab_size or has_another:
        console.print(f"  {src} has no tokenizer.json: the model is imported without a tokenizer", markup=False)
        return
    template = chat_template(src)
    out.mkdir()
    try:
        write_gpt4(out, default_system_prompt=published_system_prompt(template) if template else None)
    except InputError as problem:
        out.rmdir()
        console.print(f"  no tokenizer: {problem}", markup=False)


def copy_tokenizer(src: Path, cfg: ModelConfig, out: Path) -> None:
    """tokenizer.json, and its settings without anything that would run; a wrong one raises Failure or InputError."""
    size = Tokenizer.load(src).vocab_size
    if size > (cfg.vocab_size or 0):
        raise InputError(f"{src / 'tokenizer.json'} has ids up to {size - 1}, and the model {cfg.vocab_size} rows")
    config, template = read_json(src / "tokenizer_config.json") or {}, chat_template(src)
    kept = {key: value for key, value in config.items() if key not in ("auto_map", "added_tokens_decoder")}
    if "auto_map" in config or "tokenizer_class" not in config:
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template:
        kept["chat_template"] = template
        if prompt := published_system_prompt(template):
            kept["default_system_prompt"] = prompt
    out.mkdir(exist_ok=True)
    shutil.copyfile(src / "tokenizer.json", out / "tokenizer.json")
    (out / "tokenizer_config.json").write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    upgrade(src, out)


def chat_template(src: Path) -> str | None:
    file = src / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    given = (read_json(src / "tokenizer_config.json") or {}).get("chat_template")
    return given if isinstance(given, str) else None


def import_settings(src: Path, out: Path) -> None:
    """The published settings for generation; what is not applied here is kept too, so that it can be said."""
    published = read_json(src / GENERATION_JSON) or {}
    kept = {key: value for key, value in published.items() if key != "transformers_version" and key[:1] != "_"}
    if kept:
        (out / GENERATION).write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
