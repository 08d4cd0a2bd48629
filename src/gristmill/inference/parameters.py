"""Defines what a sampling parameter is: its bounds, its defaults and its meaning, each stated once.

`Sampling` (sampler.py) is the table: it declares each of its numbers with a `Parameter`. The API's schema and the
page's form are built from them. Tests compare the options of `gristmill generate` and docs/serving.md with them.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The values that a parameter may have: from `low` to `high`, both included.

    excludes_low: `low` itself is not allowed. or_zero: 0 is allowed as well. zero: the meaning of the value 0.
    """

    low: float
    high: float = math.inf
    excludes_low: bool = False
    or_zero: bool = False
    zero: str = ""

    def allow(self, value: float) -> bool:
        """Return whether the value is within the bounds. NaN and infinity never are."""
        if self.or_zero and value == 0:
            return True
        is_high_enough = value > self.low if self.excludes_low else value >= self.low
        return is_high_enough and value <= self.high and value != math.inf

    def __str__(self) -> str:
        if self.or_zero:
            low = f"{self.low:g}".replace("e-0", "e-")  # 1e-6, not 1e-06
            return f"0 ({self.zero}) or at least {low}"
        if self.excludes_low:
            return f"above {self.low} and at most {self.high}"
        values = f"at least {self.low}" if self.high == math.inf else f"from {self.low} to {self.high}"
        return f"{values}; 0 is {self.zero}" if self.zero else values


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One number of `Sampling`.

    help: its meaning, in one sentence. default: the API's, when neither the request nor the model gives a value; None
    is random. api: the bounds in requests over HTTP, where OpenAI's API has other ones. generate: the default of
    `gristmill generate`, where it differs. in_generate: that command has an option for it. is_published: a model's own
    generation settings may define it. needs_sampling: it has no effect when the most probable token is always taken.
    """

    help: str
    default: float | None
    bounds: Bounds
    api: Bounds | None = None
    kind: type[int] | type[float] = float
    generate: float | None = None
    in_generate: bool = True
    is_published: bool = False
    needs_sampling: bool = False

    @property
    def api_bounds(self) -> Bounds:
        return self.api or self.bounds

    @property
    def generate_default(self) -> float | None:
        return self.default if self.generate is None else self.generate

    @property
    def api_help(self) -> str:
        """The meaning and the default, for users of the API."""
        default = "random" if self.default is None else f"{self.default:g}"
        return f"{self.help} Default: {'as published with the model, else ' if self.is_published else ''}{default}."


def declared(parameter: Parameter, default: Any = ...) -> Any:
    """Return a dataclass field for a parameter. default: the field's, where it is not the parameter's."""
    return field(default=parameter.default if default is ... else default, metadata={"parameter": parameter})


def parameters_of(cls: Any) -> dict[str, Parameter]:
    """Return the parameters that a dataclass declares, by name."""
    return {each.name: each.metadata["parameter"] for each in fields(cls) if "parameter" in each.metadata}
