"""Runs a recipe's stages in order; each makes one artifact in the run folder, and one that stands is not made again.

This file alone knows all stages. What a stage does is in its room; here is only what it is given.
"""

import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
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
    write_atomically,
)
from gristmill.corpus.build import build_corpus, fingerprint
from gristmill.errors import Failure, InputError
from gristmill.evaluate.bits_per_byte import bits_per_byte
from gristmill.evaluate.build import build_evaluation
from gristmill.evaluate.documents import read_documents
from gristmill.hub.checkpoint import TOKENIZER
from gristmill.hub.export import build_export
from gristmill.inference.load import load_model
from gristmill.inference.scorer import ModelScorer
from gristmill.model.counts import count_params, train_flops_per_token
from gristmill.progress import console
from gristmill.recipe import Recipe, curriculum_of, keyed, plain
from gristmill.report.collect import METRICS, collect, collect_run, read_metrics
from gristmill.report.page import write
from gristmill.streaming.build import build_shards
from gristmill.tokenizer import Tokenizer, build_tokenizer
from gristmill.train.checkpoint import Identity, checkpoint_path, read_state
from gristmill.train.display import Display, duration
from gristmill.train.loop import Saved, Started, Step, apply_compute, train
from gristmill.train.machine import best_dtype, describe_machine, gemm_flops
from gristmill.train.tracking import Tracking

StageName = Literal["corpus", "tokenizer", "shards", "train", "evaluate", "export"]
STAGES: tuple[StageName, ...] = ("corpus", "tokenizer", "shards", "train", "evaluate", "export")
# Raised when a stage's output changes for the same configuration, so that old artifacts are made again.
FORMATS: dict[StageName, int] = {"corpus": 1, "tokenizer": 1, "shards": 1, "train": 2, "evaluate": 1, "export": 1}
# The estimate printed at the start, measured with the quickstart on two Zen 4 cores (docs/LOG.md).
EXPECTED_MFU = 0.5
EXPECTED_OTHER_S = 120.0


class Stopped(BaseException):
    """The user (SIGINT) or the system (SIGTERM) ended the run; all that was committed stands."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def run(recipe: Recipe, out: Path | None = None, until: StageName | None = None) -> Path:
    """Run the stages up to `until` (None: all, then the report); returns the run folder.

    Raises InputError, Failure, OSError (a full disk) or Stopped; after each of them the same call goes on.
    """
    folder = out or Path("runs") / recipe.name
    wanted = STAGES[: STAGES.index(until) + 1] if until else STAGES
    with locked(folder), Signals() as signals:
        return _Run(recipe, folder, signals).stages(wanted, finish=until is None)


class Signals:
    """Turns SIGINT and SIGTERM into Stopped; while `graceful`, the first one only sets `event`."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.graceful = False
        self.signum = signal.SIGINT
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signal.Signals(signum)
        if not self.graceful or self.event.is_set():
            raise Stopped(signum)
        self.event.set()
        console.print(f"\n  {self.signum.name}: finishing this step and saving (again to stop at once)")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a second run on one folder. The lock goes with the process, however it ends."""
    try:
        (folder / STATE).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--out {folder} is or lies below a file; name a folder") from None
    with (folder / STATE / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(
                f"{folder} is in use by another gristmill process; wait for it or choose another --out"
            ) from None
        yield


class _Run:
    """One call of `run`: the artifacts so far, by stage."""

    def __init__(self, recipe: Recipe, folder: Path, signals: Signals) -> None:
        self.recipe, self.folder, self.signals = recipe, folder, signals
        self.done: dict[str, Artifact] = {}
        self.start = {"start": load(Path(recipe.start))} if recipe.start else {}
        self.machine = describe_machine()
        self.estimated = False

    def stages(self, wanted: tuple[StageName, ...], finish: bool) -> Path:
        self.fingerprint = fingerprint(self.recipe.corpus)
        self.estimated = "train" not in wanted  # the short stages are not worth one
        for name in wanted:
            self.done[name] = self.stage(name)
        if finish:
            self.finish()
        return self.folder

    def stage(self, name: StageName) -> Artifact:
        config, inputs = self.settings(name)
        hashes = {parent: artifact.content for parent, artifact in inputs.items()}
        if name == "corpus":
            hashes = self.fingerprint
        key = stage_key(name, FORMATS[name], config, hashes)
        path = self.folder / name / key[:8]
        if name == "train":
            artifact = standing(checkpoint_path(path, self.recipe.train.steps), key)
        else:
            artifact = standing(path, key)
        if artifact is not None:
            console.print(f"{name:<10}[bright_black]stands  {artifact.path.relative_to(self.folder)}[/]")
            return artifact
        if not self.estimated:
            self.say_estimate()
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
        console.print(f"{'':<10}{summary(artifact)}  [bright_black]{duration(time.perf_counter() - started)}[/]")
        return artifact

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
                raise Failure(f"{problems[0]}; import it again before training goes on from it")
        folder.mkdir(parents=True, exist_ok=True)
        log = MetricsLog(folder / METRICS)
        link_metrics(self.folder, folder)
        tracking = Tracking(r.train.tracking, self.folder / STATE, r.name, identity.key)
        tracking.params({"model": plain(r.model), "train": keyed(r.train)})
        tracking.dataset(self.done["corpus"])
        tokenizer = Tokenizer.load(self.path("tokenizer"))
        validation = read_documents(self.path("corpus"), "validation", r.evaluate.training_bytes)
        last: Artifact | None = None
        status = "FAILED"
        self.signals.graceful = True
        events = train(
            r.train,
            r.model,
            self.path("shards"),
            self.path("tokenizer"),
            self.start["start"].path if self.start else None,
            folder,
            curriculum_of(r.corpus),
            identity,
            self.signals.event,
        )

        def validate(step: int, model: Any) -> None:
            assert r.evaluate.context_length is not None
            bits = bits_per_byte(validation, ModelScorer(model, r.evaluate.context_length), tokenizer)
            record = {"step": step, "tokens": step * r.train.batch_tokens, "bits_per_byte": bits}
            log.write("validation", record)
            tracking.metrics({"held_out_bits_per_byte": bits}, step)
            display.held_out(bits["all"])

        try:
            with Display(r.train.steps) as display:
                for event in events:
                    match event:
                        case Started():
                            self.say_started(event)
                            log.resume(event.step)
                            machine = self.machine | event.compute | {"gemm_tflops": event.gemm_flops / 1e12}
                            log.write("machine", {"step": event.step, "machine": machine})
                            due = event.step > 0 and event.step % r.train.checkpoint.every == 0
                            if due and not log.has_validation(event.step):
                                validate(event.step, event.model)
                        case Step():
                            log.train(event)
                            tracking.metrics({k: v for k, v in asdict(event).items() if k != "expert_load"}, event.step)
                            display.show(event)
                        case Saved():
                            last = event.artifact
                            if event.step % r.train.checkpoint.every == 0 or event.step == r.train.steps:
                                validate(event.step, event.model)
            if self.signals.event.is_set():
                status = "KILLED"
                raise Stopped(self.signals.signum)
            assert last is not None
            tracking.model(last)
            status = "FINISHED"
            return last
        finally:
            self.signals.graceful = False
            tracking.close(status)

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

    def say_started(self, started: Started) -> None:
        for line in started.damage:
            console.print(f"  {line}; going on from an older checkpoint", style="red", markup=False)
        if started.compute["kernels"] == "torch":
            console.print(
                "  PyTorch's own kernels: the native ones were not built or not asked for; with them training is "
                "faster (install g++, then gristmill again)"
            )
        going_on = f"going on at step {started.step:,}; " if started.step else ""
        left = self.recipe.train.steps - started.step
        counts, compute = count_params(self.recipe.model), started.compute
        console.print(
            f"  {going_on}{left:,} steps; {counts.total_params / 1e6:.1f}M parameters, "
            f"{counts.active_params / 1e6:.1f}M active; {compute['dtype']} on {compute['threads']} threads, "
            f"{compute['kernels']} kernels"
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
            )
            write(report)
            metrics = {"stages": stages, "machine": machine, "seconds": seconds}
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
    files.append(stages["train"].path.parent / METRICS)  # what the link in the run folder points to
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
            return (
                f"{m['documents']:,} documents, {m['bytes'] / 1e6:.1f} MB kept; {dropped:,} dropped with a reason each"
            )
        case "tokenizer":
            return f"{m['vocab_size']:,} tokens, {m['bytes_per_token']:.2f} bytes each"
        case "shards":
            return f"{sum(s['tokens'] for s in m['sources'].values()):,} training tokens"
        case "checkpoint":
            return f"{m['train_tokens']:,} tokens, loss {m['final_loss']:.3f}"
        case "evaluate":
            ours, baselines = m["test"]["bits_per_byte"]["all"], m["baselines"]
            return (
                f"{ours:.3f} bits per byte on the test split (xz per document {baselines['xz_document']['all']:.3f}, "
                f"trigram {baselines['trigram']['all']:.3f})"
            )
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


class MetricsLog:
    """`metrics.jsonl`, the truth of the figures: cut back to the checkpoint that training goes on from."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._seconds = 0.0  # of training before this process

    def resume(self, step: int) -> None:
        self._records = [record for record in read_metrics(self.file) if record["step"] <= step and step > 0]
        self._seconds = max((record.get("seconds", 0.0) for record in self._records), default=0.0)
        kept = "".join(json.dumps(record) + "\n" for record in self._records)
        write_atomically(self.file, kept.encode())
        if step > 0:
            self.write("resume", {"step": step, "seconds": self._seconds})

    def has_validation(self, step: int) -> bool:
        return any(record["kind"] == "validation" and record["step"] == step for record in self._records)

    def train(self, step: Step) -> None:
        figures = asdict(step)
        figures["seconds"] = round(figures["seconds"] + self._seconds, 3)
        self.write("train", figures)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"kind": kind, **record}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that follows it


def say_what_next(folder: Path) -> None:
    # After `make quickstart` the program stands in .venv and not on the PATH.
    program = "gristmill" if shutil.which("gristmill") or not sys.argv[0].endswith("gristmill") else sys.argv[0]
    console.print(f"\nThe report: {folder / 'report.html'}\nTry next:", markup=False)
    for command, what in (
        (f"{program} generate {folder} 'def fibonacci('", "let the model write"),
        (f"{program} lineage {folder}", "from the model back to each source and license"),
        (f"{program} verify {folder}", "check every byte"),
        (f"{program} run --help", "change a setting, bring your own text"),
    ):
        console.print(f"  {command:<60}  {what}", markup=False)
