"""Runs a recipe's stages in order. Each stage commits one artifact to the run folder; finished stages are skipped.

Each room defines its stage next to its builder; `STAGES` lists them. This file iterates over the list and then writes
the report. It may import every room, because it connects them: it gives the tokenizer to the stage that writes shards,
and the engine's scorer to the evaluation.
"""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from gristmill.artifact import MANIFEST, Artifact, Built, commit, load, stage_key, standing
from gristmill.corpus.build import CORPUS_STAGE
from gristmill.current import LATEST, record_stage
from gristmill.errors import Failure, InputError
from gristmill.evaluate.build import evaluation_stage
from gristmill.hub.export import EXPORT_STAGE
from gristmill.hub.importing import import_once
from gristmill.inference.load import find_model, load_model
from gristmill.inference.scorer import ModelScorer
from gristmill.parallel.ranks import Ranks, join
from gristmill.progress import console, quiet
from gristmill.report.collect import collect, collect_run
from gristmill.report.page import write
from gristmill.session import Signals, locked
from gristmill.stage import START, Checked, Context, Recipe, Stage, Unsupported
from gristmill.streaming.build import shards_stage
from gristmill.tokenizer import Tokenizer
from gristmill.tokenizer.train import TOKENIZER_STAGE
from gristmill.train.checkpoint import read_state
from gristmill.train.display import duration
from gristmill.train.log import METRICS, read_metrics
from gristmill.train.machine import apply_compute, describe_machine
from gristmill.train.stage import TRAIN_STAGE, link_metrics

TRAIN = TRAIN_STAGE.name


def load_scorer(checkpoint: Path, context_length: int) -> tuple[ModelScorer, Tokenizer]:
    """A scorer of the checkpoint, in the arithmetic that it was trained in, and its tokenizer."""
    compute = apply_compute(read_state(checkpoint).compute)
    model, tokenizer = load_model(checkpoint, getattr(torch, compute["dtype"]))
    return ModelScorer(model.to(compute["device"]), context_length), tokenizer


STAGES: tuple[Stage[Any], ...] = (
    CORPUS_STAGE,
    TOKENIZER_STAGE,
    shards_stage(Tokenizer.load),
    TRAIN_STAGE,
    evaluation_stage(load_scorer),
    EXPORT_STAGE,
)


def names_of(stages: Sequence[Stage[Any]] = STAGES) -> tuple[str, ...]:
    return tuple(stage.name for stage in stages)


def run(
    recipe: Recipe, out: Path | None = None, until: str | None = None, stages: tuple[Stage[Any], ...] = STAGES
) -> Path:
    """Run the stages up to `until`, or all of them and then the report. Returns the run folder.

    Under torchrun every process calls it: rank 0 runs the stages, all ranks train, and all must see one run folder.

    Raises InputError, Failure, OSError (a full disk) or Stopped; after each of them, the same call resumes the run.
    """
    folder, order = out or Path("runs") / recipe.name, names_of(stages)
    wanted = stages[: order.index(until) + 1] if until else stages
    ranks = join(recipe["train"].rank_timeout_s)
    with quiet(ranks.rank > 0), locked(folder) if ranks.rank == 0 else nullcontext(), Signals() as signals:
        try:
            context = Context(recipe=recipe, folder=folder, order=order, ranks=ranks, signals=signals)
            this = _Run(context, ranks, wanted)
            this.run()
            if until is None and ranks.rank == 0:
                _finish(context, this.skipped)
            return folder
        finally:
            ranks.leave()


class _Run:
    """One call of `run`: checks all stages, then finds or builds the artifact of each."""

    def __init__(self, context: Context, ranks: Ranks, stages: Sequence[Stage[Any]]) -> None:
        self.context, self.ranks, self.stages = context, ranks, stages
        self.checked: dict[str, Checked] = {}
        self.skipped: dict[str, str] = {}  # stage -> reason
        self.is_announced = ranks.rank > 0

    def run(self) -> None:
        self.check()
        if any(START in stage.inputs for stage in self.stages):
            with self.ranks.turn():  # rank 0 first: it may have to import the model
                self.import_start()
        for number, stage in enumerate(self.stages):
            if stage.name in self.skipped:
                console.print(f"{stage.name:<10}skipped: {self.skipped[stage.name]}", markup=False)
                continue
            if stage.is_collective:
                self.context.artifacts[stage.name] = self.find_or_make(stage)
                if self.ranks.rank > 0 and not any(later.is_collective for later in self.stages[number + 1 :]):
                    return  # rank 0 builds the rest
                continue
            with self.ranks.turn() as is_mine:
                if is_mine:
                    self.context.artifacts[stage.name] = self.find_or_make(stage)
            if not is_mine:
                self.context.artifacts[stage.name] = self.find(stage)

    def check(self) -> None:
        """Check everything that does not need an earlier stage's artifact, so that no stage fails late."""
        for stage in self.stages:
            try:
                self.checked[stage.name] = stage.check(stage.configuration(self.context.recipe), self.context)
            except Unsupported as reason:
                self.skipped[stage.name] = str(reason)
                console.print(f"{stage.name} will be skipped: {reason}", markup=False)

    def import_start(self) -> None:
        """Find the model that the recipe continues. A published directory is imported first."""
        folder = self.context.folder
        if self.context.recipe.start:
            given = Path(self.context.recipe.start)
            if given.resolve() == folder.resolve():
                raise InputError(f"start={given} is the run folder itself; name a checkpoint in it, or another --out")
            self.context.artifacts[START] = import_once(find_model(given), folder / START)

    def find(self, stage: Stage[Any]) -> Artifact:
        """Find an artifact that rank 0 has built or found."""
        run = stage.identify(self.context, self.checked[stage.name])
        if (artifact := stage.find(run)) is None:
            raise Failure(
                f"rank {self.ranks.rank} does not find {run.folder}; all ranks must see one run folder and one corpus"
            )
        return artifact

    def find_or_make(self, stage: Stage[Any]) -> Artifact:
        context = self.context
        run = stage.identify(context, self.checked[stage.name])
        artifact = stage.find(run)
        is_finished = artifact is not None
        if stage.is_collective:  # all ranks skip it, or none
            is_finished = bool(self.ranks.from_first(is_finished))
        if is_finished:
            artifact = artifact or self.find(stage)
            console.print(f"{stage.name:<10}[bright_black]stands  {artifact.path.relative_to(context.folder)}[/]")
        else:
            self.announce()
            if self.ranks.rank == 0:
                if stage.has_other_format(run):
                    console.print(
                        f"{stage.name:<10}the version that wrote this folder had another format; building it again"
                    )
                (context.folder / MANIFEST).unlink(missing_ok=True)  # it describes the run before this one
            console.print(f"[bold]{stage.name:<10}[/]{stage.doing}")
            started = time.perf_counter()
            artifact = stage.make(run)
            took = duration(time.perf_counter() - started)
            console.print(f"{'':<10}{stage.summary(artifact.metrics)}  [bright_black]{took}[/]")
        if self.ranks.rank == 0:
            record_stage(context.folder, stage.name, run.folder, context.order)
        return artifact

    def announce(self) -> None:
        """Before the first stage that has to run: print how long the whole run takes."""
        lines = [] if self.is_announced else [stage.estimate(self.context.recipe) for stage in self.stages]
        self.is_announced = True
        for line in lines:
            if line:
                console.print(line)


# ---- the report ----------------------------------------------------------------------------------------


def _finish(context: Context, skipped: Mapping[str, str]) -> None:
    """Write the report, and the run's own manifest that covers it."""
    folder, config = context.folder, context.recipe.to_dict()
    made = {name: context.artifacts[name] for name in context.order if name in context.artifacts}
    key = stage_key("run", 1, config, {name: artifact.content for name, artifact in made.items()})
    if not _is_sealed(folder, key):
        (folder / MANIFEST).unlink(missing_ok=True)  # it covers the report that is now rewritten
        link_metrics(folder, made[TRAIN].path.parent)
        records = read_metrics(folder / METRICS)
        seconds = {name: artifact.metrics["seconds"] for name, artifact in made.items() if name != TRAIN}
        seconds[TRAIN] = max((record.get("seconds", 0.0) for record in records), default=0.0)
        machine = next((r["machine"] for r in reversed(records) if r["kind"] == "machine"), describe_machine())
        report = collect(
            folder,
            order=context.order,
            stages={name: artifact.path for name, artifact in made.items()},
            recipe=config,
            machine=machine,
            seconds=seconds,
            skipped=skipped,
        )
        write(report)
        stages = {name: artifact.path.relative_to(folder).as_posix() for name, artifact in made.items()}
        metrics = {"stages": stages, "machine": machine, "seconds": seconds}
        metrics |= {"skipped": dict(skipped)} if skipped else {}
        _seal(folder, key, config, made, metrics)
    _print_next_steps(folder)


def _is_sealed(folder: Path, key: str) -> bool:
    try:
        return standing(folder, key) is not None
    except Failure:  # a report that was deleted or edited is written again
        return False


def _seal(
    folder: Path, key: str, config: Mapping[str, Any], stages: Mapping[str, Artifact], metrics: Mapping[str, Any]
) -> None:
    """Commit the run folder itself: its manifest covers the report and the figures, and names the stages' artifacts."""
    files = [folder / name for name in (METRICS, "report.html", "report.json")]
    training = stages[TRAIN].path.parent
    files += [training / METRICS, training / LATEST]  # the first is what the link in the run folder points to
    commit(folder, kind="run", key=key, config=config, inputs=stages, built=Built(metrics=dict(metrics)), files=files)


def rewrite_report(folder: Path) -> Path:
    """Write a run's report again from its folder, finished or not; returns the page."""
    report = collect_run(folder, names_of())
    with locked(folder):
        if (folder / MANIFEST).exists():
            old = load(folder)
            stages = {name: load(folder / path) for name, path in old.metrics["stages"].items()}
            (folder / MANIFEST).unlink()
            write(report)
            _seal(folder, old.key, old.manifest["config"], stages, old.metrics)
        else:
            write(report)
    return folder / "report.html"


def _print_next_steps(folder: Path) -> None:
    # After `make quickstart`, the program is in .venv and not on the PATH.
    program = "gristmill" if shutil.which("gristmill") or not sys.argv[0].endswith("gristmill") else sys.argv[0]
    console.print(f"\nThe report: {folder / 'report.html'}\nTry next:", markup=False)
    for command, what in (
        (f"{program} generate {folder} 'def fibonacci('", "let the model write"),
        (f"{program} serve {folder}", "ask it from a browser, curl or OpenAI's clients"),
        (f"{program} lineage {folder}", "from the model back to each source and license"),
        (f"{program} verify {folder}", "check every byte"),
        (f"{program} run --help", "change a setting, bring your own text"),
    ):
        console.print(f"  {command:<60}  {what}", markup=False)
