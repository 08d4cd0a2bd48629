"""Reads the generation settings that a model's directory publishes, and combines them with the user's own.

A Hugging Face directory has `generation_config.json`, an imported model the same keys in `generation.json`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gristmill.errors import InputError
from gristmill.hub.folder import GENERATION
from gristmill.hub.published import GENERATION_JSON
from gristmill.hub.settings import read_json
from gristmill.inference.errors import SettingError
from gristmill.inference.sampler import PARAMETERS, Sampling

# The defaults of `gristmill generate` and of the API, for a model that publishes nothing. None is random.
GENERATE_DEFAULTS = {name: parameter.generate_default for name, parameter in PARAMETERS.items()}
API_DEFAULTS = {name: parameter.default for name, parameter in PARAMETERS.items()}
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
    """The generation settings of a model's directory.

    values: the sampling parameters that it defines, by name; `top_k` 0 is all tokens, `temperature` is 0 where the
    file says `do_sample: false`. stop_ids: its `eos_token_id`. not_applied: settings that would change the next token
    ("num_beams=4") and are not supported here.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()
    not_applied: tuple[str, ...] = ()

    def sampling(
        self, given: Mapping[str, float | None], defaults: Mapping[str, float | None] = GENERATE_DEFAULTS
    ) -> Sampling:
        """Return the sampling of a request: each parameter as given, else as published, else the default.

        Args:
            given: by name; None is as if it were left out. `top_k` 0 is all tokens.
            defaults: of all parameters.

        Raises SettingError for an impossible value, and for one that has no effect on a model published as greedy.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if self.values.get("temperature") == 0 and "temperature" not in given:
            for name in given:
                if PARAMETERS[name].needs_sampling:
                    raise SettingError(
                        name,
                        f"{name} has no effect: this model is published with do_sample false, which is greedy; "
                        "give a temperature too",
                    )
        chosen: dict[str, Any] = {**defaults, **self.values, **given}
        return Sampling(**{**chosen, "top_k": chosen["top_k"] or None})


def published_sampling(folder: Path) -> Published:
    """Read the settings that `folder` (see `find_model`) publishes; none when it has no such file.

    `do_sample: false` is greedy. Where `do_sample` is absent, a published temperature counts as in vLLM, although
    transformers would be greedy. Parameters that the file omits have our defaults (transformers: top_k 50).
    Raises Failure when the file is damaged, InputError when it holds an impossible value; both name the file.
    """
    file = folder / GENERATION if (folder / GENERATION).is_file() else folder / GENERATION_JSON
    said = read_json(file)
    if said is None:
        return Published()
    try:
        published = Published(
            values=_values(said if _does_sample(said) else {**said, "temperature": 0}),
            stop_ids=_stop_ids(said),
            not_applied=tuple(f"{key}={said[key]!r:.40}" for key in NOT_APPLIED if not _changes_nothing(said, key)),
        )
        published.sampling({})
    except InputError as problem:
        raise InputError(f"{file}: {problem}; correct it, or remove the file to go without") from None
    return published


def _does_sample(said: dict[str, Any]) -> bool:
    value = said.get("do_sample")
    if value is not None and not isinstance(value, bool):
        raise InputError(f"do_sample={value!r:.80} must be true or false")
    return value is not False


def _values(said: dict[str, Any]) -> dict[str, float]:
    names = [name for name, parameter in PARAMETERS.items() if parameter.is_published]
    return {name: _number(name, said[name]) for name in names if said.get(name) is not None}


def _number(name: str, value: Any) -> float:
    parameter = PARAMETERS[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name}={value!r:.80} must be a number")
    if parameter.kind is int:
        if not isinstance(value, int) or not parameter.bounds.allow(value):
            raise InputError(f"{name}={value!r:.80} must be a whole number, {parameter.bounds}")
        return value
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{name}={number} must be finite")
    return number


def _stop_ids(said: dict[str, Any]) -> frozenset[int]:
    value = said.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for id in ids:
        if isinstance(id, bool) or not isinstance(id, int) or id < 0:
            raise InputError(f"eos_token_id={value!r:.80} must be a token id or a list of them")
    return frozenset(ids)


def _changes_nothing(said: dict[str, Any], key: str) -> bool:
    return said.get(key) is None or said[key] in NOT_APPLIED[key]
