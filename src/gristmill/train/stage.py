"""The training stage: runs the training loop on all ranks, measures held-out loss with the inference engine's scorer,
and records the figures in metrics.jsonl, in MLflow and on the screen.

The loop itself is in `loop.py` and knows none of this. The stage commits no artifact of its own: its artifact is the
last checkpoint, which the loop has committed.
"""

import math
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from gristmill.artifact import MANIFEST, STATE, Artifact, load, standing, verify
from gristmill.current import record_stage
from gristmill.errors import Failure, InputError
from gristmill.evaluate.bits_per_byte import bits_per_byte
from gristmill.evaluate.config import EvaluateConfig
from gristmill.evaluate.documents import Document, read_documents
from gristmill.inference.scorer import ModelScorer
from gristmill.model import ModelConfig
from gristmill.model.counts import TRAINING_BYTES, count_params, train_flops_per_token
from gristmill.parallel.ranks import Ranks
from gristmill.progress import console
from gristmill.session import Stopped
from gristmill.stage import START, Checked, Context, Recipe, Stage, StageRun, keyed, plain
from gristmill.stop import StopRequested
from gristmill.streaming.config import Remote
from gristmill.streaming.remote import require
from gristmill.tokenizer import Tokenizer
from gristmill.train.checkpoint import Identity, checkpoint_path
from gristmill.train.config import TrainConfig
from gristmill.train.curriculum import curriculum_of
from gristmill.train.display import Display, say_skipped, say_started
from gristmill.train.log import METRICS, MetricsLog
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
from gristmill.train.machine import best_dtype, describe_machine, gemm_flops
from gristmill.train.tracking import Tracking, check_uri

# The estimate of a run's duration, measured with the quickstart on two Zen 4 cores (docs/LOG.md).
EXPECTED_MFU = 0.5
EXPECTED_OTHER_S = 120.0  # of the other stages


class TrainStage(Stage[TrainConfig]):
    """Training: all ranks take part, it can be resumed, and its artifact is the last checkpoint."""

    is_collective = True

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        mix = curriculum_of(recipe["corpus"])
        return {"model": keyed(recipe["model"]), "train": keyed(recipe["train"]), "curriculum": keyed(mix)}

    def find(self, run: StageRun[TrainConfig]) -> Artifact | None:
        """Return the last checkpoint if its held-out loss was measured; a stop may have prevented that."""
        log = MetricsLog(run.folder / METRICS)
        is_validated = not log.file.exists() or log.has("validation", run.config.steps)
        return standing(checkpoint_path(run.folder, run.config.steps), run.key) if is_validated else None

    def make(self, run: StageRun[TrainConfig]) -> Artifact:
        return _Training(run).run()

    def estimate(self, recipe: Recipe) -> str:
        cfg, model, machine, dtype = self.configuration(recipe), recipe["model"], describe_machine(), best_dtype()
        rate = gemm_flops(dtype)
        work = train_flops_per_token(model, cfg.seq_len) * cfg.steps * cfg.batch_tokens
        seconds = work / (rate * EXPECTED_MFU) + EXPECTED_OTHER_S
        return (
            f"{recipe.name}: about {max(1, round(seconds / 60))} min from nothing on this machine ({machine['cpu']}, "
            f"{machine['cores']} cores, {str(dtype).removeprefix('torch.')} at {rate / 1e12:.2f} TFLOP/s)"
        )


def link_metrics(run: Path, training: Path) -> None:
    """Make `metrics.jsonl` in the run folder a link to the current training's."""
    link = run / METRICS
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(training / METRICS, run))


# ---- before the first stage ----------------------------------------------------------------------------


def _check(cfg: TrainConfig, context: Context) -> Checked:
    ranks, model = _ranks(context), context.recipe["model"]
    layout = layout_of(cfg, model, ranks)
    _check_memory(model, ranks)
    check_uri(cfg.tracking)
    if url := cfg.checkpoint.copy_to:
        require("train.checkpoint.copy_to", url)
    return Checked(value=layout)


def _ranks(context: Context) -> Ranks:
    assert isinstance(context.ranks, Ranks)
    return context.ranks


def _check_memory(model: ModelConfig, ranks: Ranks) -> None:
    """Raise InputError if one process on a CPU cannot hold the weights and AdamW's moments."""
    machine = describe_machine()
    needed = TRAINING_BYTES * count_params(model).total_params / 2**30
    memory = machine["memory_gib"]  # 0 if it is unknown
    if ranks.world_size == 1 and machine["gpu"] is None and 0 < memory < needed:
        raise InputError(
            f"model: training takes at least {needed:,.0f} GiB for weights, gradients and moments, and this "
            f"machine has {memory:,.0f} GiB; make the model smaller, or see `gristmill plan` for how to split it"
        )


# ---- training ------------------------------------------------------------------------------------------


class _Training:
    """One training in one run: the loop's events, and what is made of them."""

    def __init__(self, run: StageRun[TrainConfig]) -> None:
        self.cfg, self.folder, self.key, self.layout = run.config, run.folder, run.key, run.checked.value
        self.identity = Identity(run.key, run.settings, run.inputs)
        self.context, self.recipe, self.ranks = run.context, run.context.recipe, _ranks(run.context)
        self.stop = run.context.signals.stop
        self.evaluate: EvaluateConfig = self.recipe["evaluate"]
        self.remote: Remote | None = self.recipe["shards"].source()
        self.artifacts, self.start = run.context.artifacts, run.inputs.get(START)

    def run(self) -> Artifact:
        """Train to the end and return the last checkpoint.

        Raises Stopped when this process, or another rank, was told to stop; what was done is saved.
        """
        if self.start and (problems := verify(self.start.path).problems):
            raise Failure(f"{problems[0]}; remove {self.start.path}, then build it or import it again")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.ranks.rank == 0:
            record_stage(self.context.folder, "train", self.folder, self.context.order)
        signals = self.context.signals
        signals.graceful = True
        events = train(self.job(), self.stop, self.ranks)
        try:
            if self.ranks.rank == 0:
                self.watch(events)
            else:
                self.follow(events)
            if self.is_stopped():
                raise Stopped(self.stop.signum or signal.SIGTERM)  # None: another rank was told to stop
            return load(checkpoint_path(self.folder, self.cfg.steps))
        finally:
            events.close()  # waits for a checkpoint that is being saved, while the folder is still locked
            signals.graceful = False

    def job(self) -> TrainingJob:
        return TrainingJob(
            cfg=self.cfg,
            model_cfg=self.recipe["model"],
            layout=self.layout,
            shards=self.artifacts["shards"].path,
            remote=self.remote,
            tokenizer=self.artifacts["tokenizer"].path,
            start=self.start.path if self.start else None,
            folder=self.folder,
            curriculum=curriculum_of(self.recipe["corpus"]),
            identity=self.identity,
            validate_every=self.evaluate.validation_interval,
        )

    def is_stopped(self) -> bool:
        """Whether this process, or another rank, was told to stop."""
        last = checkpoint_path(self.folder, self.cfg.steps)
        return self.stop.is_set() or not (last / MANIFEST).exists()

    def follow(self, events: Iterator[Event]) -> None:
        """Train and measure held-out loss on a rank that records nothing."""
        for event in events:
            if isinstance(event, ValidationDue):
                self.held_out(event, wanted=False)
        with self.ranks.turn():
            pass  # rank 0 has committed the last checkpoint

    def watch(self, events: Iterator[Event]) -> None:
        """Train, and record the figures."""
        log = MetricsLog(self.folder / METRICS, keep_trying=self.cfg.checkpoint.on_error == "go_on")
        link_metrics(self.context.folder, self.folder)
        tracking = Tracking(self.cfg.tracking, self.context.folder / STATE, self.recipe.name, self.key)
        tracking.params({"model": plain(self.recipe["model"]), "train": keyed(self.cfg)})
        tracking.dataset(self.artifacts["corpus"])
        last: Artifact | None = None
        status = "FAILED"
        try:
            with Display(self.cfg.steps) as display:
                for event in events:
                    if isinstance(event, Saved):
                        last = event.artifact
                    self.record(event, log, tracking, display)
            with self.ranks.turn():
                status = "KILLED" if self.is_stopped() else "FINISHED"
            if last is not None:
                tracking.model(last)
        finally:
            tracking.close(status)

    def record(self, event: Event, log: MetricsLog, tracking: Tracking, display: Display) -> None:
        match event:
            case Started():
                say_started(event, self.cfg.steps)
                log.resume(event.step)
                machine = describe_machine() | event.compute | {"gemm_tflops": event.gemm_flops / 1e12}
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
                is_known = event.resumed and log.has("validation", event.step)
                if bits := self.held_out(event, wanted=not is_known):
                    finite = {name: value for name, value in bits.items() if math.isfinite(value)}
                    log.write("validation", {"step": event.step, "tokens": event.tokens, "bits_per_byte": finite})
                    tracking.metrics({"held_out_bits_per_byte": finite}, event.step)
                    display.held_out(bits["all"])
            case SaveFailed():
                what = "stands, but" if event.stands else "was not saved:"
                said = f"  the checkpoint of step {event.step:,} {what} {event.reason}"
                console.print(said, style="red", markup=False)
                log.write("save_failed", asdict(event))

    def held_out(self, due: ValidationDue, wanted: bool) -> dict[str, float] | None:
        """Bits per byte of the validation split, by all ranks together, if rank 0 wants them.

        None when a rank is told to stop meanwhile: a training that resumes from this step measures them first.
        """
        if not self.ranks.from_first(wanted):
            return None
        assert self.evaluate.context_length is not None
        scorer = ModelScorer(due.model, self.evaluate.context_length, self.ranks, self.stop)
        documents, tokenizer = self.validation
        try:
            return bits_per_byte(documents, scorer, tokenizer)
        except StopRequested:
            return None

    @cached_property
    def validation(self) -> tuple[list[Document], Tokenizer]:
        """The text whose loss is measured during training."""
        corpus, tokenizer = (self.artifacts[name].path for name in ("corpus", "tokenizer"))
        return read_documents(corpus, "validation", self.evaluate.training_bytes), Tokenizer.load(tokenizer)

    def source(self) -> dict[str, Any]:
        """Where remote shards are read from, for a reader of the log who wants to read them again."""
        remote = self.remote
        return {"shards": asdict(remote) | {"cache": str(remote.directory.resolve())}} if remote else {}


def _summary(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['train_tokens']:,} tokens, loss {metrics['final_loss'] or math.nan:.3f}"


TRAIN_STAGE = TrainStage(
    name="train",
    format=5,
    config=TrainConfig,
    more_sections={"model": ModelConfig},
    inputs=("shards", "tokenizer", START),
    check=_check,
    build=None,
    doing="training the model",
    summary=_summary,
)
