"""Defines a stage: a function from artifacts to one artifact, together with all that a run needs to call it.

Each room defines its `Stage` next to its builder, `pipeline.STAGES` lists them, and `pipeline.run` iterates over the
list. This file knows no room: it may use artifacts and the signals of a session.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from gristmill.artifact import MANIFEST, Artifact, Built, commit, load, prepare, stage_key, standing
from gristmill.errors import Failure, InputError
from gristmill.session import Signals

Config = TypeVar("Config")
OPERATIONAL = {"key": False}  # metadata of a configuration's field that cannot change the output
START = "start"  # an input of a stage, if the recipe names a model to continue


class Unsupported(Exception):
    """Raised by a stage's check: the stage does not support this recipe, so the run skips it. States the reason."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A resolved recipe. `sections` maps each section's name to its configuration.

    start: the model to train further: a run folder, a checkpoint or a Hugging Face directory. The run takes its
    weights, its shape and its tokenizer, not the `model` and `tokenizer` sections of a base recipe. A `model` section
    next to `start` gives only settings that do not change a tensor, such as `max_seq_len` or `moe_loss_weight`.
    """

    name: str
    start: str | None = None
    sections: Mapping[str, Any]

    def __getitem__(self, section: str) -> Any:
        return self.sections[section]

    def to_dict(self) -> dict[str, Any]:
        """Every key of the recipe, in YAML's types."""
        return {"name": self.name, "start": self.start, **plain(self.sections)}


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the stages of one run share.

    Args:
        folder: The run folder.
        order: The names of all stages, in their order.
        ranks: The processes of the run: a `parallel.ranks.Ranks`, which this layer cannot import.
        artifacts: Stage name -> artifact of each stage so far, and START -> the model that the recipe continues.
    """

    recipe: Recipe
    folder: Path
    order: tuple[str, ...]
    ranks: object
    signals: Signals
    artifacts: dict[str, Artifact] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The result of a stage's check.

    fingerprint: name -> hash of each thing that the stage reads from outside the run; it is part of the stage's key.
    value: anything that the build needs again.
    """

    fingerprint: Mapping[str, str] = field(default_factory=dict)
    value: Any = None


@dataclass(frozen=True, kw_only=True)
class StageRun(Generic[Config]):
    """One stage in one run.

    Args:
        settings: The part of the configuration that can change the output, as JSON.
        inputs: The artifacts that it reads.
        key: Identifies the artifact: a hash of the stage's name and format, `settings`, `inputs` and the fingerprint.
        folder: The stage's folder for this key: the artifact, or a folder of checkpoints.
    """

    config: Config
    settings: Mapping[str, Any]
    inputs: Mapping[str, Artifact]
    checked: Checked
    key: str
    folder: Path
    context: Context


def _no_check(config: object, context: Context) -> Checked:
    return Checked()


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[Config]):
    """A function from artifacts to one artifact.

    Args:
        name: Also the name of its section in the recipe and of its folder in the run folder.
        format: Raise it when the output changes for the same configuration, so that old artifacts are built again.
        config: The class of its section.
        more_sections: Further sections that belong to this stage, with their classes.
        inputs: The names of the stages whose artifacts it reads. START is one of them only if the recipe has a `start`.
        check: Runs before the first stage, on all ranks, so that no stage fails late. Raises InputError, or Unsupported
            for a recipe without this stage.
        build: Writes the files of the artifact to an empty folder. None for a subclass that overrides `make`.
        doing: Describes the work, on the line that announces the stage.
        summary: Describes the artifact in one line, from its metrics.
    """

    name: str
    format: int
    config: type[Config]
    more_sections: Mapping[str, type[Any]] = field(default_factory=dict)
    inputs: tuple[str, ...]
    check: Callable[[Config, Context], Checked] = _no_check
    build: Callable[[StageRun[Config], Path], Built] | None
    doing: str
    summary: Callable[[Mapping[str, Any]], str]
    is_collective: ClassVar[bool] = False  # whether all ranks build it together; else rank 0 builds it

    @property
    def sections(self) -> dict[str, type[Any]]:
        """The recipe's sections that belong to this stage, with their classes."""
        return {**self.more_sections, self.name: self.config}

    def configuration(self, recipe: Recipe) -> Config:
        """Return the stage's own section."""
        config = recipe[self.name]
        assert isinstance(config, self.config)
        return config

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """Return the part of the recipe that can change the artifact, as JSON."""
        return dict(keyed(self.configuration(recipe)))

    def identify(self, context: Context, checked: Checked) -> StageRun[Config]:
        """Identify the stage's artifact in this run. The inputs must exist."""
        settings, made = self.settings(context.recipe), context.artifacts
        inputs = {name: made[name] for name in self.inputs if name in made or name != START}
        hashes = {name: artifact.content for name, artifact in inputs.items()}
        key = stage_key(self.name, self.format, settings, hashes | dict(checked.fingerprint))
        return StageRun(
            config=self.configuration(context.recipe),
            settings=settings,
            inputs=inputs,
            checked=checked,
            key=key,
            folder=context.folder / self.name / key[:8],
            context=context,
        )

    def find(self, run: StageRun[Config]) -> Artifact | None:
        """Return the artifact if the stage is finished."""
        return standing(run.folder, run.key)

    def has_other_format(self, run: StageRun[Config]) -> bool:
        """Return whether the run folder has an artifact of the same settings and inputs under another key.

        A version of Gristmill with another format wrote it. If the key includes a fingerprint, the answer is no: the
        manifest does not record it, so its change cannot be told from a change of the format.
        """
        contents = {name: artifact.content for name, artifact in run.inputs.items()}
        folder = run.folder.parent
        if run.checked.fingerprint:
            return False
        for file in (*folder.glob(f"*/{MANIFEST}"), *folder.glob(f"*/*/{MANIFEST}")):
            try:
                artifact = load(file.parent)
            except (Failure, InputError):
                continue
            its_contents = {name: given["content"] for name, given in artifact.manifest["inputs"].items()}
            if artifact.manifest["config"] == run.settings and its_contents == contents and artifact.key != run.key:
                return True
        return False

    def make(self, run: StageRun[Config]) -> Artifact:
        """Build the artifact and commit it. Its metrics get the seconds that this took."""
        assert self.build is not None
        started = time.perf_counter()
        built = self.build(run, prepare(run.folder))
        seconds = {"seconds": round(time.perf_counter() - started, 1)}
        built = replace(built, metrics=built.metrics | seconds)
        return commit(run.folder, kind=self.name, key=run.key, config=run.settings, inputs=run.inputs, built=built)

    def estimate(self, recipe: Recipe) -> str | None:
        """Return a line on how long the whole run takes, if this stage takes most of it."""
        return None


# ---- configurations as JSON ----------------------------------------------------------------------------


def plain(config: Any) -> Any:
    """A configuration in the types of YAML and JSON: tuples become lists."""
    if is_dataclass(config):
        return {f.name: plain(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, list | tuple) else config


def keyed(config: Any) -> Any:
    """The part of a configuration that can change a stage's output, in JSON's types: it makes the stage's key.

    Fields with the metadata OPERATIONAL are left out. `key: None` marks the path of some input: it counts as null,
    because the hash of the input's content is in the key.
    """
    if is_dataclass(config):
        roles = {f.name: f.metadata.get("key", True) for f in fields(config)}
        return {
            name: None if role is None else keyed(getattr(config, name))
            for name, role in roles.items()
            if role is not False
        }
    if isinstance(config, dict):
        return {str(key): keyed(value) for key, value in config.items()}
    return [keyed(value) for value in config] if isinstance(config, list | tuple) else config
