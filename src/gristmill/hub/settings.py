"""What a Hugging Face configuration says beside the shape, and how a wrong one is refused."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.errors import Failure, InputError


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is no file. Raises Failure when it holds something else."""
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (IsADirectoryError, PermissionError) as problem:
        raise Failure(f"{file} cannot be read: {problem.strerror}; make it a file that you may read") from None
    except (ValueError, RecursionError) as problem:
        raise Failure(f"{file} is not JSON: {problem}; fetch or build it again") from None
    if not isinstance(parsed, dict):
        raise Failure(f"{file} is damaged: it holds no JSON object; fetch or build it again")
    return parsed


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The tokenizer's control tokens that a configuration names."""

    eot_id: int
    pad_id: int
    im_end_id: int

    def for_config(self) -> dict[str, Any]:
        return {"bos_token_id": self.eot_id, "eos_token_id": self.eot_id, "pad_token_id": self.pad_id}

    def for_generation(self, published: Mapping[str, Any]) -> dict[str, Any]:
        """The published settings. Generation also stops at a document's end and at a chat turn's end."""
        stops = published.get("eos_token_id", [])
        stops = [*stops] if isinstance(stops, list) else [stops]
        stops += [id for id in (self.eot_id, self.im_end_id) if id not in stops]
        return {**self.for_config(), **published, "eos_token_id": stops}


def require(config: Mapping[str, Any], key: str, wanted: Any) -> None:
    """Raises InputError when the configuration asks for something else; null asks for nothing."""
    if (given := config.get(key)) is not None and given != wanted:
        raise InputError(f"config.json says {key}={given!r}; this model knows only {wanted!r}")


def require_plain_rotation(config: Mapping[str, Any]) -> None:
    """Raises InputError for rotary embeddings that are scaled, in any spelling."""
    require(config, "rope_scaling", None)
    rope = config.get("rope_parameters") or {}
    for key in ("rope_type", "type"):
        require(rope, key, "default")
    if strange := sorted(rope.keys() - {"rope_theta", "rope_type", "type"}):
        raise InputError(f"config.json says rope_parameters.{strange[0]}={rope[strange[0]]!r}, which this model lacks")


@contextmanager
def describe(kind: str) -> Iterator[None]:
    """Turns what goes wrong while a configuration is read into an InputError that says so."""
    try:
        yield
    except InputError:
        raise
    except KeyError as missing:
        raise InputError(f"config.json lacks {missing}, which a {kind} model needs") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as problem:
        raise InputError(f"config.json does not describe a {kind} model: {problem}") from None
