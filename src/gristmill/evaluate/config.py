"""Settings of the evaluation stage."""

from dataclasses import dataclass, field

from gristmill.stage import OPERATIONAL


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How held-out text is scored and sampled.

    `context_length`: tokens that the model sees at once; None is the length that it was trained at.
    `validation_bytes`, `test_bytes`: at most about so many bytes of a split, drawn per source by hash; None is all.
    `every`: how often held-out loss is measured during training: at each `checkpoint`, or after this number of steps.
    It is always measured after the last step. `training_bytes`: the size of the validation text that is scored then,
    drawn in the same way.
    `samples` prompts a source are shown in the report; `functions` are completed for the share that parses.
    `prompt_tokens` is a prose prompt's length and the most that a function's head may have.
    """

    context_length: int | None = None
    validation_bytes: int | None = 200_000
    every: int | str = field(default="checkpoint", metadata=OPERATIONAL)
    training_bytes: int | None = field(default=40_000, metadata=OPERATIONAL)
    test_bytes: int | None = 500_000
    samples: int = 4
    functions: int = 24
    prompt_tokens: int = 64
    sample_tokens: int = 96
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.context_length is not None and self.context_length < 2:
            raise ValueError(f"context_length={self.context_length} must be at least 2, or null for the trained length")
        if self.every != "checkpoint" and (isinstance(self.every, str) or self.every < 1):
            raise ValueError(f"every={self.every!r} must be `checkpoint` or a number of steps, at least 1")
        for name in ("validation_bytes", "training_bytes", "test_bytes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1, or null for the whole split")
        for name in ("samples", "functions", "prompt_tokens", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.temperature > 0:  # the sampler's own bounds are checked in recipe.py
            raise ValueError(f"temperature={self.temperature} must be positive: the greedy completion is made anyway")

    @property
    def validation_interval(self) -> int | None:
        """Steps between two validations during training; None: at each checkpoint."""
        return None if isinstance(self.every, str) else self.every
