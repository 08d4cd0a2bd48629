"""The start token: the id that a tokenizer puts before each text (BOS), as transformers reads it from the same files.

A tokenizer that Gristmill trains has one, `<|endoftext|>`, because every document follows that token in training. A
published tokenizer keeps its own behavior.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from gristmill.artifact import MANIFEST
from gristmill.current import TOKENIZER
from gristmill.errors import InputError
from gristmill.tokenizer.chat import writes_bos
from gristmill.tokenizer.layout import EOT, hugging_face_config


def find_start_id(folder: Path, description: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """The id that `AutoTokenizer` puts before a text; None if it adds nothing.

    The post-processor of tokenizer.json decides. transformers 5 ignores `add_bos_token` beside a tokenizer.json.

    Args:
        folder: the tokenizer directory.
        description: its parsed tokenizer.json.
        config: its parsed tokenizer_config.json; empty if it has none.

    Raises InputError for a tokenizer that adds anything else, ValueError or KeyError for damage.
    """
    if _predates_start_tokens(folder, config):
        return _ids(description)[EOT]
    before, after = _added_by(description.get("post_processor"))
    if len(before) > 1 or after:
        raise InputError(
            f"{folder}: the tokenizer puts the ids {before} before and {after} after each text; Gristmill supports one "
            "start token and nothing after a text. Change post_processor in tokenizer.json"
        )
    return before[0] if before else None


def find_chat_start_id(folder: Path, description: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """The id that the chat template writes before the first turn; None if it writes none. Arguments as above."""
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else config.get("chat_template")
    token = config.get("bos_token")
    content = token.get("content") if isinstance(token, dict) else token
    if not (isinstance(template, str) and isinstance(content, str) and writes_bos(template)):
        return None
    return _ids(description).get(content)


def add_start_token(folder: Path) -> None:
    """Rewrite a tokenizer directory so that it puts `<|endoftext|>` before each text, in transformers and elsewhere."""
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    text = file.read_text(encoding="utf-8")
    description, config = json.loads(text), json.loads(settings.read_text(encoding="utf-8"))

    def start(sequence: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": EOT, "type_id": sequence}}

    def of(name: str, sequence: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": sequence}}

    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start(0), of("A", 0)],
        "pair": [start(0), of("A", 0), start(1), of("B", 1)],
        "special_tokens": {EOT: {"id": EOT, "ids": [_ids(description)[EOT]], "tokens": [EOT]}},
    }
    is_indented = text.startswith("{\n")
    file.write_text(json.dumps(description, ensure_ascii=False, indent=2 if is_indented else None), encoding="utf-8")
    config |= {"bos_token": EOT, "add_bos_token": True}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def upgrade(source: Path, copy: Path) -> None:
    """Give `copy`, a copy of the tokenizer directory `source`, the start token that `source` has only by its age."""
    try:
        config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # `Tokenizer.load` names the damage
    if isinstance(config, dict) and _predates_start_tokens(source, config):
        add_start_token(copy)


def _predates_start_tokens(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether an earlier version of Gristmill trained this tokenizer: its files say that it adds nothing to a text.

    The manifest of the tokenizer, or of the checkpoint around it, tells it from a published tokenizer.
    """
    ours = {key: value for key, value in hugging_face_config().items() if key != "chat_template"}
    if any(config.get(key) != value for key, value in ours.items()):
        return False
    for place in (folder, folder.parent) if folder.name == TOKENIZER else (folder,):
        try:
            manifest = json.loads((place / MANIFEST).read_bytes())
            while "start" in manifest["inputs"]:  # a training that continued another model has that model's tokenizer
                manifest = manifest["inputs"]["start"]
            return manifest["kind"] in ("tokenizer", "checkpoint")
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return False


def _added_by(post_processor: Mapping[str, Any] | None) -> tuple[list[int], list[int]]:
    """The ids that a post-processor puts before and after a text, by the library that defines it."""
    if post_processor is None:
        return [], []
    whole: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "decoder"))
    whole |= {"version": "1.0", "added_tokens": [], "post_processor": post_processor}
    whole |= {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    try:
        encoding = tokenizers.Tokenizer.from_str(json.dumps(whole)).encode("a")
    except Exception as problem:  # the library has no narrower one
        raise ValueError(f"post_processor: {problem}") from None
    at = encoding.special_tokens_mask.index(0)
    return encoding.ids[:at], encoding.ids[at + 1 :]


def _ids(description: Mapping[str, Any]) -> dict[str, int]:
    return description["model"]["vocab"] | {token["content"]: token["id"] for token in description["added_tokens"]}
