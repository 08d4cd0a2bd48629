"""Runs a recipe's stages in order; each makes one artifact in the run folder, and one that stands is not made again.

This file alone knows all stages. What a stage does is in its room; here is only what it is given.
"""

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from gristmill.artifact import (
    MANIFEST,
    STATE,
    Artifact,
    Built,
    commit,
    load,
    prepare,
    stage_key,
    standing,
    verify,
)
from gristmill.corpus.build import build_corpus, fingerprint
from gristmill.current import LATEST, record_stage
from gristmill.errors import Failure, InputError
from gristmill.evaluate.bits_per_byte import bits_per_byte
from gristmill.evaluate.build import build_evaluation
from gristmill.evaluate.documents import Document, read_documents
from gristmill.hub.checkpoint import TOKENIZER
from gristmill.hub.export import build_export
from gristmill.hub.importing import import_once
from gristmill.hub.published import model_type_of
from gristmill.inference.load import find_model, load_model
from gristmill.inference.scorer import ModelScorer
from gristmill.model.counts import count_params, train_flops_per_token
from gristmill.parallel.ranks import Ranks, join
from gristmill.progress import console, data_size, quiet
from gristmill.recipe import Recipe, curriculum_of, keyed, plain
from gristmill.report.collect import collect, collect_run
from gristmill.report.page import write
from gristmill.session import Signals, Stopped, locked
from gristmill.stop import StopRequested
from gristmill.streaming.build import build_shards
from gristmill.streaming.remote import build_remote, read_manifest, require
from gristmill.tokenizer import Tokenizer, build_tokenizer
from gristmill.tokenizer.gpt4 import load_table
from gristmill.train.checkpoint import Identity, checkpoint_path, read_state
from gristmill.train.display import Display, duration, say_skipped, say_started
from gristmill.train.log import METRICS, MetricsLog, read_metrics
from gristmill.train.loop import (
    Event,
    Saved,
    SaveFailed,
    Skipped,
    Started,
    Step,
    TrainingJob,
    ValidationDue,
    layout_of,
    train,
)
from gristmill.train.machine import apply_compute, best_dtype, describe_machine, gemm_flops
from gristmill.train.tracking import Tracking, check_uri

StageName = Literal["corpus", "tokenizer", "shards", "train", "evaluate", "export"]
STAGES: tuple[StageName, ...] = ("corpus", "tokenizer", "shards", "train", "evaluate", "export")
# Raised when a stage's output changes for the same configuration, so that old artifacts are made again.
FORMATS: dict[StageName, int] = {"corpus": 2, "tokenizer": 1, "shards": 1, "train": 4, "evaluate": 2, "export": 2}
# The estimate printed at the start, measured with the quickstart on two Zen 4 cores (docs/LOG.md).
EXPECTED_MFU = 0.5
EXPECTED_OTHER_S = 120.0


def run(recipe: Recipe, out: Path | None = None, until: StageName | None = None) -> Path:
    """Run the stages up to `until` (None: all, then the report); returns the run folder.

    Under torchrun every process calls it: rank 0 runs the stages, all of them train, and the run folder is one that all
    of them see.

    Raises InputError, Failure, OSError (a full disk) or Stopped; after each of them the same call goes on.
    """
    folder = out or Path("runs") / recipe.name
    wanted = STAGES[: STAGES.index(until) + 1] if until else STAGES
    ranks = join(recipe.train.rank_timeout_s)
    with quiet(ranks.rank > 0), locked(folder) if ranks.rank == 0 else nullcontext(), Signals() as signals:
        try:
            return _Run(recipe, folder, signals, ranks).stages(wanted, finish=until is None)
        finally:
            ranks.leave()


class _Run:
    """One call of `run`: the artifacts so far, by stage."""

    def __init__(self, recipe: Recipe, folder: Path, signals: Signals, ranks: Ranks) -> None:
        self.recipe, self.folder, self.signals, self.ranks = recipe, folder, signals, ranks
        self.done: dict[str, Artifact] = {}
        self.machine = describe_machine()
        self.estimated = False
        self.skipped: dict[str, str] = {}

    def check(self, wanted: tuple[StageName, ...]) -> None:
        """Check everything that does not need an earlier stage's output, so that no stage fails late."""
        r = self.recipe
        self.fingerprint = fingerprint(r.corpus)
        if "tokenizer" in wanted and r.tokenizer.kind == "gpt4":
            load_table(r.tokenizer.table)
        if "shards" in wanted and (remote := r.shards.source()):
            require("shards.remote", remote.url)
            remote.directory  # noqa: B018  # raises InputError where the home directory is unknown
        if "train" in wanted:
            self.layout = layout_of(r.train, r.model, self.ranks)
            self.check_memory()
            check_uri(r.train.tracking)
            if url := r.train.checkpoint.copy_to:
                require("train.checkpoint.copy_to", url)
        if "export" in wanted:
            try:
                model_type_of(r.model)
            except InputError as reason:
                self.skipped["export"] = str(reason)
                console.print(f"export will be skipped: {reason}", markup=False)

    def check_memory(self) -> None:
        """Raises InputError when one process on a CPU cannot hold weights, gradients and moments."""
        needed = 12 * count_params(self.recipe.model).total_params / 2**30  # three numbers of 4 bytes
        memory = self.machine["memory_gib"]  # 0 where it is unknown
        if self.ranks.world_size == 1 and self.machine["gpu"] is None and 0 < memory < needed:
            raise InputError(
                f"model: training takes at least {needed:,.0f} GiB for weights, gradients and moments, and this "
                f"machine has {memory:,.0f} GiB; make the model smaller, or see `gristmill plan` for how to split it"
            )

    def stages(self, wanted: tuple[StageName, ...], finish: bool) -> Path:
        self.check(wanted)
        self.estimated = "train" not in wanted or self.ranks.rank > 0  # the short stages are not worth one
        if "tokenizer" in wanted:
            with self.ranks.turn():  # rank 0 first, which may import it
                _ = self.start
        for name in wanted:
            if name in self.skipped:
                console.print(f"{name:<10}skipped: {self.skipped[name]}", markup=False)
                continue
            if self.ranks.rank > 0 and "train" in self.done:
                return self.folder  # rank 0 finishes alone
            if name == "train":
                self.done[name] = self.stage(name)
                continue
            with self.ranks.turn() as mine:
                if mine:
                    self.done[name] = self.stage(name)
            if not mine:
                self.done[name] = self.made(name)
        if finish and self.ranks.rank == 0:
            self.finish()
        return self.folder

    @cached_property
    def start(self) -> dict[str, Artifact]:
        """The model to train further, under its name as an input. A published directory is imported first."""
        if not self.recipe.start:
            return {}
        given = Path(self.recipe.start)
        if given.resolve() == self.folder.resolve():
            raise InputError(f"start={given} is the run folder itself; name a checkpoint in it, or another --out")
        return {"start": import_once(find_model(given), self.folder / "start")}

    def made(self, name: StageName) -> Artifact:
        """A stage's artifact, which rank 0 has made."""
        key, path, _config, _inputs = self.identity(name)
        artifact = standing(checkpoint_path(path, self.recipe.train.steps) if name == "train" else path, key)
        if artifact is None:
            raise Failure(
                f"rank {self.ranks.rank} does not find {path}; all ranks must see one run folder and one corpus"
            )
        return artifact

    def identity(self, name: StageName) -> tuple[str, Path, dict[str, Any], dict[str, Artifact]]:
        """A stage's key, its place, and what made the key: its settings and inputs."""
        config, inputs = self.settings(name)
        hashes = {parent: artifact.content for parent, artifact in inputs.items()}
        if name == "corpus":
            hashes = self.fingerprint
        if name == "shards" and self.recipe.shards.remote:
            hashes |= {"remote": self.remote["content"]}
        key = stage_key(name, FORMATS[name], config, hashes)
        return key, self.folder / name / key[:8], config, inputs

    def stage(self, name: StageName) -> Artifact:
        key, path, config, inputs = self.identity(name)
        artifact = standing(checkpoint_path(path, self.recipe.train.steps) if name == "train" else path, key)
        stands = artifact is not None and (name != "train" or self.is_validated(path))
        if name == "train":  # all ranks skip it, or none
            stands = bool(self.ranks.from_first(stands))
        if stands:
            artifact = artifact or self.made(name)
            self.record(name, path)
            console.print(f"{name:<10}[bright_black]stands  {artifact.path.relative_to(self.folder)}[/]")
            return artifact
        if not self.estimated:
            self.say_estimate()
        if self.ranks.rank == 0:
            (self.folder / MANIFEST).unlink(missing_ok=True)  # it speaks of the run before
        console.print(f"[bold]{name:<10}[/]{SAYS[name]}")
        started = time.perf_counter()
        if name == "train":
            artifact = self.train(path, Identity(key, config, inputs))
        else:
            built = self.build(name, prepare(path))
            seconds = {"seconds": round(time.perf_counter() - started, 1)}
            built = replace(built, metrics=built.metrics | seconds)
            artifact = commit(path, kind=name, key=key, config=config, inputs=inputs, built=built)
            self.record(name, path)
        console.print(f"{'':<10}{summary(artifact)}  [bright_black]{duration(time.perf_counter() - started)}[/]")
        return artifact

    def record(self, name: StageName, folder: Path) -> None:
        """Until the run is finished, its folder says here which artifact of a stage is current."""
        if self.ranks.rank == 0:
            record_stage(self.folder, name, folder, STAGES)

    def settings(self, name: StageName) -> tuple[dict[str, Any], dict[str, Artifact]]:
        """The part of the recipe that a stage reads, and the artifacts: together they make its key."""
        r = self.recipe
        match name:
            case "corpus":
                return keyed(r.corpus), {}
            case "tokenizer":
                return keyed(r.tokenizer), self.inputs("corpus") | self.start
            case "shards":
                return keyed(r.shards), self.inputs("corpus", "tokenizer")
            case "train":
                mix = keyed(curriculum_of(r.corpus))
                config = {"model": keyed(r.model), "train": keyed(r.train), "curriculum": mix}
                return config, self.inputs("shards", "tokenizer") | self.start
            case "evaluate":
                return keyed(r.evaluate), self.inputs("corpus", "train")
            case "export":
                return keyed(r.export), self.inputs("train", "evaluate")

    @cached_property
    def remote(self) -> dict[str, Any]:
        """The manifest of the shards that lie elsewhere."""
        assert self.recipe.shards.remote
        return read_manifest(self.recipe.shards.remote)

    def inputs(self, *names: StageName) -> dict[str, Artifact]:
        return {name: self.done[name] for name in names}

    def path(self, name: StageName) -> Path:
        return self.done[name].path

    def build(self, name: StageName, out: Path) -> Built:
        r = self.recipe
        match name:
            case "corpus":
                return build_corpus(r.corpus, out)
            case "tokenizer":
                given = self.start["start"].path / TOKENIZER if self.start else None
                return build_tokenizer(r.tokenizer, self.path("corpus"), out, given)
            case "shards" if r.shards.remote:
                return build_remote(r.shards, self.remote, self.done["corpus"], self.done["tokenizer"], out)
            case "shards":
                tokenizer = Tokenizer.load(self.path("tokenizer"))
                return build_shards(
                    r.shards, self.path("corpus"), tokenizer.encode_batch, tokenizer.eot_id, tokenizer.vocab_size, out
                )
            case "evaluate":
                return evaluate(r, self.path("corpus"), self.path("train"), out)
            case "export":
                return build_export(r.export, self.path("train"), self.path("evaluate"), out)
            case "train":
                raise AssertionError("training commits its own artifacts")

    def train(self, folder: Path, identity: Identity) -> Artifact:
        r = self.recipe
        for start in self.start.values():
            if problems := verify(start.path).problems:
                raise Failure(f"{problems[0]}; remove {start.path}, then build it or import it again")
        folder.mkdir(parents=True, exist_ok=True)
        self.record("train", folder)
        self.signals.graceful = True
        job = TrainingJob(
            cfg=r.train,
            model_cfg=r.model,
            layout=self.layout,
            shards=self.path("shards"),
            remote=r.shards.source(),
            tokenizer=self.path("tokenizer"),
            start=self.start["start"].path if self.start else None,
            folder=folder,
            curriculum=curriculum_of(r.corpus),
            identity=identity,
            validate_every=r.evaluate.validation_interval,
        )
        events = train(job, self.signals.stop, self.ranks)
        try:
            if self.ranks.rank == 0:
                self.watch(events, folder, identity)
            else:
                self.follow(events)
            if self.stopped(folder):
                raise Stopped(self.signals.stop.signum or signal.SIGTERM)  # None: another rank was told to
            return load(checkpoint_path(folder, r.train.steps))
        finally:
            events.close()  # a save under way is finished while the folder is still locked
            self.signals.graceful = False

    def is_validated(self, folder: Path) -> bool:
        """Whether the finished model's held-out loss was measured; a stop may have come before."""
        log = MetricsLog(folder / METRICS)
        return not log.file.exists() or log.has("validation", self.recipe.train.steps)

    def stopped(self, folder: Path) -> bool:
        """Whether this process, or another rank, was told to stop."""
        last = checkpoint_path(folder, self.recipe.train.steps)
        return self.signals.stop.is_set() or not (last / MANIFEST).exists()

    def follow(self, events: Iterator[Event]) -> None:
        """What a rank does that trains and has nothing to say."""
        for event in events:
            if isinstance(event, ValidationDue):
                self.held_out(event, wanted=False)
        with self.ranks.turn():
            pass  # rank 0 has committed the last checkpoint

    def held_out(self, at: ValidationDue, wanted: bool) -> dict[str, float] | None:
        """Bits per byte of the validation split, by all ranks together, if rank 0 wants them.

        None when one is told to stop meanwhile: whoever goes on from this step measures it first.
        """
        if not self.ranks.from_first(wanted):
            return None

        assert self.recipe.evaluate.context_length is not None
        scorer = ModelScorer(at.model, self.recipe.evaluate.context_length, self.ranks, self.signals.stop)
        documents, tokenizer = self.validation
        try:
            return bits_per_byte(documents, scorer, tokenizer)
        except StopRequested:
            return None

    @cached_property
    def validation(self) -> tuple[list[Document], Tokenizer]:
        """The text whose loss is measured during training."""
        documents = read_documents(self.path("corpus"), "validation", self.recipe.evaluate.training_bytes)
        return documents, Tokenizer.load(self.path("tokenizer"))

    def watch(self, events: Iterator[Event], folder: Path, identity: Identity) -> None:
        """Train, and keep the figures: in metrics.jsonl, in MLflow and on the screen."""
        r = self.recipe
        log = MetricsLog(folder / METRICS, keep_trying=r.train.checkpoint.on_error == "go_on")
        link_metrics(self.folder, folder)
        tracking = Tracking(r.train.tracking, self.folder / STATE, r.name, identity.key)
        tracking.params({"model": plain(r.model), "train": keyed(r.train)})
        tracking.dataset(self.done["corpus"])
        last: Artifact | None = None
        status = "FAILED"

        try:
            with Display(r.train.steps) as display:
                for event in events:
                    match event:
                        case Started():
                            say_started(event, r.train.steps)
                            log.resume(event.step)
                            machine = self.machine | event.compute | {"gemm_tflops": event.gemm_flops / 1e12}
                            if event.data_sheet_flops:
                                machine["data_sheet_tflops"] = event.data_sheet_flops / 1e12
                            log.write("machine", {"step": event.step, "machine": machine, **self.source()})
                        case Step():
                            log.train(event)
                            tracking.metrics({k: v for k, v in asdict(event).items() if k != "expert_load"}, event.step)
                            display.show(event)
                        case Skipped():
                            say_skipped(event)
                            if event.back_to is not None:
                                log.cut(event.back_to)
                            log.write("skipped", asdict(event))
                        case ValidationDue():
                            seen = event.resumed and log.has("validation", event.step)
                            if bits := self.held_out(event, wanted=not seen):
                                finite = {name: value for name, value in bits.items() if math.isfinite(value)}
                                figures = {"step": event.step, "tokens": event.tokens, "bits_per_byte": finite}
                                log.write("validation", figures)
                                tracking.metrics({"held_out_bits_per_byte": finite}, event.step)
                                display.held_out(bits["all"])
                        case Saved():
                            last = event.artifact
                        case SaveFailed():
                            what = "stands, but" if event.stands else "was not saved:"
                            said = f"  the checkpoint of step {event.step:,} {what} {event.reason}"
                            console.print(said, style="red", markup=False)
                            log.write("save_failed", asdict(event))
            with self.ranks.turn():
                status = "KILLED" if self.stopped(folder) else "FINISHED"
            if last is not None:
                tracking.model(last)
        finally:
            tracking.close(status)

    def source(self) -> dict[str, Any]:
        """Where the shards are read from, if not here, for whoever wants to read them again."""
        remote = self.recipe.shards.source()
        return {"shards": asdict(remote) | {"cache": str(remote.directory.resolve())}} if remote else {}

    def say_estimate(self) -> None:
        """Before the first stage that must run: how long all of it takes on this machine."""
        self.estimated = True
        r, dtype = self.recipe, best_dtype()
        rate = gemm_flops(dtype)
        work = train_flops_per_token(r.model, r.train.seq_len) * r.train.steps * r.train.batch_tokens
        seconds = work / (rate * EXPECTED_MFU) + EXPECTED_OTHER_S
        console.print(
            f"{r.name}: about {max(1, round(seconds / 60))} min from nothing on this machine ({self.machine['cpu']}, "
            f"{self.machine['cores']} cores, {str(dtype).removeprefix('torch.')} at {rate / 1e12:.2f} TFLOP/s)"
        )

    def finish(self) -> None:
        """The report, and the run's own manifest over it."""
        stages = {name: artifact.path.relative_to(self.folder).as_posix() for name, artifact in self.done.items()}
        key = stage_key("run", 1, plain(self.recipe), {name: a.content for name, a in self.done.items()})
        if not self.is_sealed(key):
            (self.folder / MANIFEST).unlink(missing_ok=True)  # it vouches for the report that is now rewritten
            link_metrics(self.folder, self.path("train").parent)
            records = read_metrics(self.folder / METRICS)
            seconds = {name: a.metrics["seconds"] for name, a in self.done.items() if name != "train"}
            seconds["train"] = max((record.get("seconds", 0.0) for record in records), default=0.0)
            machine = next((r["machine"] for r in reversed(records) if r["kind"] == "machine"), self.machine)
            report = collect(
                self.folder,
                stages={name: artifact.path for name, artifact in self.done.items()},
                recipe=plain(self.recipe),
                machine=machine,
                seconds=seconds,
                skipped=self.skipped,
            )
            write(report)
            metrics = {"stages": stages, "machine": machine, "seconds": seconds}
            metrics |= {"skipped": self.skipped} if self.skipped else {}
            seal(self.folder, key, plain(self.recipe), self.done, metrics)
        say_what_next(self.folder)

    def is_sealed(self, key: str) -> bool:
        try:
            return standing(self.folder, key) is not None
        except Failure:  # a report that was deleted or edited is made again
            return False


def link_metrics(folder: Path, training: Path) -> None:
    """`metrics.jsonl` in the run folder is the current training's."""
    link = folder / METRICS
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(training / METRICS, folder))


def seal(
    folder: Path, key: str, config: Mapping[str, Any], stages: Mapping[str, Artifact], metrics: Mapping[str, Any]
) -> None:
    """Commit the run folder itself: its manifest covers the report and the figures, and names the stages' artifacts."""
    files = [folder / name for name in (METRICS, "report.html", "report.json")]
    training = stages["train"].path.parent
    files += [training / METRICS, training / LATEST]  # the first is what the link in the run folder points to
    commit(folder, kind="run", key=key, config=config, inputs=stages, built=Built(metrics=dict(metrics)), files=files)


def rewrite_report(folder: Path) -> Path:
    """Write a run's report again from what stands in its folder, finished or not; returns the page."""
    report = collect_run(folder)
    with locked(folder):
        if (folder / MANIFEST).exists():
            old = load(folder)
            stages = {name: load(folder / path) for name, path in old.metrics["stages"].items()}
            (folder / MANIFEST).unlink()
            write(report)
            seal(folder, old.key, old.manifest["config"], stages, old.metrics)
        else:
            write(report)
    return folder / "report.html"


SAYS: dict[StageName, str] = {
    "corpus": "reading, cleaning and deduplicating documents",
    "tokenizer": "making the vocabulary",
    "shards": "tokenizing into blocks",
    "train": "training the model",
    "evaluate": "scoring held-out text beside the baselines",
    "export": "writing the Hugging Face directory and checking it",
}


def summary(artifact: Artifact) -> str:
    """One line on what a stage made."""
    m = artifact.metrics
    match artifact.kind:
        case "corpus":
            dropped = sum(m["dropped"].values())
            return f"{m['documents']:,} documents, {data_size(m['bytes'])} kept; {dropped:,} dropped with a reason each"
        case "tokenizer":
            return f"{m['vocab_size']:,} tokens, {m['bytes_per_token']:.2f} bytes each"
        case "shards":
            return f"{sum(s['tokens'] for s in m['sources'].values()):,} training tokens"
        case "checkpoint":
            return f"{m['train_tokens']:,} tokens, loss {m['final_loss'] or math.nan:.3f}"
        case "evaluate":
            figures = m["test"]["bits_per_byte"], m["baselines"]["xz_document"], m["baselines"]["trigram"]
            ours, xz, trigram = (f"{bits['all']:.3f}" if "all" in bits else "no finite number of" for bits in figures)
            return f"{ours} bits per byte on the test split (xz per document {xz}, trigram {trigram})"
        case _:
            return f"logits agree with transformers within {m['export_max_logit_diff']:.1e}"


def evaluate(recipe: Recipe, corpus: Path, checkpoint: Path, out: Path) -> Built:
    """The evaluation stage on a checkpoint, in the arithmetic that it was trained in."""
    compute = apply_compute(read_state(checkpoint).compute)
    model, tokenizer = load_model(checkpoint, getattr(torch, compute["dtype"]))
    model.to(compute["device"])
    assert recipe.evaluate.context_length is not None
    scorer = ModelScorer(model, recipe.evaluate.context_length)
    return build_evaluation(recipe.evaluate, corpus, tokenizer, scorer, out)


def say_what_next(folder: Path) -> None:
    # After `make quickstart` the program stands in .venv and not on the PATH.
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
