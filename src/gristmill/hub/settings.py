"""Reads a Hugging Face configuration, and refuses a wrong one by the name of its key."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.errors import Failure, InputError


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is no file. Raises Failure when it holds something else."""
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unambiguous)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (IsADirectoryError, PermissionError) as problem:
        raise Failure(f"{file} cannot be read: {problem.strerror}; make it a file that you may read") from None
    except (ValueError, RecursionError) as problem:
        raise Failure(f"{file} is not JSON: {problem}; fetch or build it again") from None
    if not isinstance(parsed, dict):
        raise Failure(f"{file} is damaged: it holds no JSON object; fetch or build it again")
    return parsed


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a key that is there twice with different values."""
    made = dict(pairs)
    if len(made) < len(pairs):
        for key, value in pairs:
            if value != made[key]:
                raise ValueError(f"{key!r:.80} is there twice, with different values")
    return made


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


def whole(config: Mapping[str, Any], *names: str, default: int) -> int:
    """An integer under one of its names; the default where it has none. Raises ValueError for anything else."""
    name, value = _given(config, names, default)
    if type(value) is not int:
        raise ValueError(f"{name}={value!r:.80} must be a whole number")
    return value


def number(config: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number; the default where the key is absent. Raises ValueError for anything else."""
    _, value = _given(config, (name,), default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={value!r:.80} must be a number")
    try:
        if math.isfinite(float(value)):
            return float(value)
    except OverflowError:
        pass
    raise ValueError(f"{name}={value!r:.80} must be finite")


def switch(config: Mapping[str, Any], name: str) -> bool:
    """True or false; false where the key is absent or null. Raises ValueError for anything else."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r:.80} must be true or false")
    return bool(value)


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A nested object; an empty one where the key is absent or null. Raises ValueError for anything else."""
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r:.80} must be an object")
    return value or {}


def _given(config: Mapping[str, Any], names: Sequence[str], default: Any) -> tuple[str, Any]:
    given = [(name, config[name]) for name in names if name in config] or [(names[0], default)]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise ValueError(f"{given[0][0]}={given[0][1]!r:.80} and {name}={value!r:.80} must be the same")
    return given[0]


def require(config: Mapping[str, Any], key: str, *wanted: Any) -> None:
    """Raises InputError unless the value is one of `wanted`, or the key is absent or null."""
    if (given := config.get(key)) is not None and given not in wanted:
        raise InputError(f"config.json says {key}={given!r:.80}; only {' or '.join(map(repr, wanted))} is supported")


# ---- settings that both layouts have -------------------------------------------------------------------

DROPOUTS = ("attention_dropout", "attn_pdrop", "resid_pdrop", "emb_pdrop")  # they apply to training only
DEFAULT_THETA = 10000.0  # the rotary base of transformers where a configuration gives none
# With factor 1, each of these ways to scale rotary embeddings changes nothing up to the model's context length.
SCALINGS = ("linear", "dynamic", "yarn", "llama3", "proportional")
NO_SCALING = {"factor": 1, "attention_factor": 1, "partial_rotary_factor": 1}
PARTS_OF_SCALING = {  # they say where a scaling applies, which is no matter when its factor is 1
    *("original_max_position_embeddings", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"),
    *("mscale", "mscale_all_dim", "truncate"),
}


def require_plain(config: Mapping[str, Any]) -> None:
    """Raises InputError, or ValueError for a wrong type, for settings of any model that would change this one."""
    dropouts(config)
    require(config, "per_layer_config", {})
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise InputError(
            f"config.json says layer_types={config['layer_types']!r:.80}; only full_attention is supported"
        )
    require(config, "partial_rotary_factor", 1)
    for place in ("rope_scaling", "rope_parameters"):
        _require_plain_rotation(place, section(config, place))


def _require_plain_rotation(place: str, rope: Mapping[str, Any]) -> None:
    kinds = {rope[key] for key in ("rope_type", "type") if rope.get(key) is not None}
    scaled = kinds - {"default"}
    changes = [key for key, plain in NO_SCALING.items() if rope.get(key) is not None and rope[key] != plain]
    unknown = sorted(rope.keys() - {"rope_type", "type", "rope_theta", *NO_SCALING, *PARTS_OF_SCALING})
    if not scaled <= {*SCALINGS} or changes or unknown or (scaled - {"proportional"} and rope.get("factor") is None):
        raise InputError(
            f"config.json says {place}={rope!r:.200}; rotary embeddings are not scaled here: the type must be default, "
            f"or {' or '.join(SCALINGS)} with factor 1"
        )


def rotary_bases(config: Mapping[str, Any]) -> dict[str, float]:
    """The place of each rotary base -> the base, in the order in which transformers looks for one."""
    places = {place: section(config, place) for place in ("rope_scaling", "rope_parameters")} | {"": config}
    return {
        f"{place}.rope_theta".lstrip("."): number(keys, "rope_theta", DEFAULT_THETA)
        for place, keys in places.items()
        if keys.get("rope_theta") is not None
    }


def two_bases(given: Mapping[str, float]) -> InputError:
    said = " and ".join(f"{place}={base}" for place, base in given.items())
    return InputError(
        f"config.json gives two rotary bases, {said}, and transformers uses {DEFAULT_THETA} where it finds none; "
        "write the one that the model was trained with in each place"
    )


def dropouts(config: Mapping[str, Any]) -> dict[str, float]:
    """Each dropout above 0, by its key. Raises ValueError for one that is not a probability below 1."""
    found = {}
    for keys in (config, section(config, "attn_config")):
        for name in DROPOUTS:
            share = 0.0 if keys.get(name) is None else number(keys, name, 0.0)
            if not 0 <= share < 1:
                raise ValueError(f"{name}={share} must be from 0 to below 1")
            if share:
                found[name] = share
    return found


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
