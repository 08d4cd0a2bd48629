"""What a Hugging Face configuration says beside the shape, and how a wrong one is refused."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gristmill.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The tokenizer's control tokens that a configuration names."""

    eot_id: int
    pad_id: int
    im_end_id: int

    def for_config(self) -> dict[str, Any]:
        return {"bos_token_id": self.eot_id, "eos_token_id": self.eot_id, "pad_token_id": self.pad_id}

    def for_generation(self) -> dict[str, Any]:
        """Generation stops at a document's end and at a chat turn's end."""
        return self.for_config() | {"eos_token_id": [self.eot_id, self.im_end_id]}


def require(config: Mapping[str, Any], key: str, wanted: Any) -> None:
    """Raises InputError when the configuration asks for something else."""
    if (given := config.get(key, wanted)) != wanted:
        raise InputError(f"config.json says {key}={given!r}; this model knows only {wanted!r}")


@contextmanager
def describe(kind: str) -> Iterator[None]:
    """Turns what goes wrong while a configuration is read into an InputError that says so."""
    try:
        yield
    except InputError:
        raise
    except KeyError as missing:
        raise InputError(f"config.json lacks {missing}, which a {kind} model needs") from None
    except (ValueError, TypeError, AttributeError) as problem:
        raise InputError(f"config.json does not describe a {kind} model: {problem}") from None
