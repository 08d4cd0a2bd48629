"""The settings that a model's directory publishes for generation, and what they become with the user's own.

A Hugging Face directory has `generation_config.json`, an imported model the same keys in `generation.json`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.errors import InputError
from gristmill.hub.folder import GENERATION
from gristmill.hub.published import GENERATION_JSON
from gristmill.hub.settings import read_json
from gristmill.inference.sampler import Sampling

OURS = Sampling(temperature=0.8, top_p=0.95)  # for a model that publishes nothing
# Published settings that would change the next token and are not applied here, with the values that change nothing.
NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "guidance_scale": (1,),
    "stop_strings": ([],),
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a directory says; None where it says nothing.

    `top_k` 0 is all tokens. `temperature` is 0 where the file says `do_sample: false`. `stop_ids`: its `eos_token_id`.
    `not_applied`: what else it says of the next token ("num_beams=4"), which has no counterpart here.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_ids: frozenset[int] = frozenset()
    not_applied: tuple[str, ...] = ()

    def sampling(
        self,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
    ) -> Sampling:
        """Each setting: the one given (`top_k` 0 is all tokens), else the published one, else ours (OURS).

        Raises InputError for an impossible one, and for a top_p, top_k or min_p given to a model published as greedy.
        """
        if self.temperature == 0 and temperature is None and (top_p, top_k, min_p) != (None, None, None):
            raise InputError(
                "top_p, top_k and min_p change nothing here: this model is published with do_sample false, which is "
                "greedy; give a temperature too"
            )
        return Sampling(
            temperature=_first(temperature, self.temperature, OURS.temperature),
            top_p=_first(top_p, self.top_p, OURS.top_p),
            top_k=_first(top_k, self.top_k, OURS.top_k) or None,
            min_p=_first(min_p, self.min_p, OURS.min_p),
            repetition_penalty=_first(repetition_penalty, self.repetition_penalty, OURS.repetition_penalty),
            seed=seed,
        )


def _first(*choices: Any) -> Any:
    return next((choice for choice in choices if choice is not None), None)


def published_sampling(folder: Path) -> Published:
    """What `folder` (see `find_model`) publishes: nothing when it has no such file.

    `do_sample: false` is greedy. Where `do_sample` is absent a published temperature counts, as in vLLM: who writes one
    means it, although transformers would be greedy. What the file leaves out is ours (transformers: top_k 50).
    Raises Failure when the file is damaged, InputError when it holds an impossible value; both name the file.
    """
    file = folder / GENERATION if (folder / GENERATION).is_file() else folder / GENERATION_JSON
    said = read_json(file)
    if said is None:
        return Published()
    try:
        published = Published(
            temperature=_number(said, "temperature") if _does_sample(said) else 0.0,
            top_p=_number(said, "top_p"),
            top_k=_top_k(said),
            min_p=_number(said, "min_p"),
            repetition_penalty=_number(said, "repetition_penalty"),
            stop_ids=_stop_ids(said),
            not_applied=tuple(f"{key}={said[key]!r:.40}" for key in NOT_APPLIED if not _changes_nothing(said, key)),
        )
        published.sampling()
    except InputError as problem:
        raise InputError(f"{file}: {problem}; correct it, or remove the file to go without") from None
    return published


def _does_sample(said: dict[str, Any]) -> bool:
    value = said.get("do_sample")
    if value is not None and not isinstance(value, bool):
        raise InputError(f"do_sample={value!r:.80} must be true or false")
    return value is not False


def _number(said: dict[str, Any], key: str) -> float | None:
    value = said.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{key}={value!r:.80} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{key}={number} must be finite")
    return number


def _top_k(said: dict[str, Any]) -> int | None:
    value = said.get("top_k")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise InputError(f"top_k={value!r:.80} must be a whole number from 0; 0 is all tokens")
    return value


def _stop_ids(said: dict[str, Any]) -> frozenset[int]:
    value = said.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for id in ids:
        if isinstance(id, bool) or not isinstance(id, int) or id < 0:
            raise InputError(f"eos_token_id={value!r:.80} must be a token id or a list of them")
    return frozenset(ids)


def _changes_nothing(said: dict[str, Any], key: str) -> bool:
    return said.get(key) is None or said[key] in NOT_APPLIED[key]
