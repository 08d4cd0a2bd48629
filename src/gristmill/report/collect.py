"""What a report says, read from a run folder: artifacts' manifests, the evaluation, the drops, metrics.jsonl.

Reads only; computes no pictures. An unfinished run is no special case: what is not there yet is absent or None.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gristmill import artifact
from gristmill.artifact import Artifact
from gristmill.current import find_stages
from gristmill.errors import Failure, InputError
from gristmill.report.speed import Speed, speed
from gristmill.train.log import METRICS, Record, read_metrics

BASELINES = ("trigram", "xz", "xz_document")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page and report.json are made of.

    `run` is the folder as the user names it (it appears in the commands to copy). `order` names all stages of a run,
    `stages` has the finished ones, and `seconds` their wall-clock seconds. `train`, `validation` and `resumes` are the
    records of metrics.jsonl by kind, in order, and `speed` is the training's, computed from them. `skipped`: stages
    that this recipe cannot run, and why.
    """

    name: str
    run: Path
    order: Sequence[str]
    stages: Mapping[str, Artifact]
    recipe: Mapping[str, Any]
    machine: Mapping[str, Any]
    seconds: Mapping[str, float]
    train: tuple[Record, ...] = ()
    validation: tuple[Record, ...] = ()
    resumes: tuple[Record, ...] = ()
    speed: Speed = field(default_factory=Speed)
    evaluation: Mapping[str, Any] | None = None
    drops: Mapping[str, Any] | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    model_type: str | None = None  # of the export

    @property
    def missing(self) -> list[str]:
        """Stages that have not run yet, in their order."""
        return [name for name in self.order if name not in self.stages and name not in self.skipped]

    def metrics(self, stage: str) -> Mapping[str, Any]:
        return self.stages[stage].metrics if stage in self.stages else {}

    def sources(self) -> list[str]:
        """All names of sources, sorted: a source's place in this list is its colour throughout the page."""
        names = set(self.stages["corpus"].manifest["sources"]) if "corpus" in self.stages else set()
        for record in self.train:
            names |= set(record.get("source_tokens", {}))
        return sorted(names)


# ---- reading a run -------------------------------------------------------------------------------------


def collect(
    run: Path,
    *,
    order: Sequence[str],
    stages: Mapping[str, Path],
    recipe: Mapping[str, Any],
    machine: Mapping[str, Any],
    seconds: Mapping[str, float],
    skipped: Mapping[str, str] | None = None,
) -> Report:
    """Read the artifacts of the given stages (their directories) and the run's metrics.jsonl.

    Raises InputError where a directory is no artifact or a stage is unknown, Failure where a file is damaged.
    """
    unknown = sorted(set(stages) - set(order))
    if unknown:
        raise InputError(f"stages={unknown} are not stages of a run; they are {', '.join(order)}")
    artifacts = {name: artifact.load(stages[name]) for name in order if name in stages}
    records = read_metrics(run / METRICS)
    by_kind = {kind: tuple(r for r in records if r.get("kind") == kind) for kind in ("train", "validation", "resume")}
    exported = _read_json(artifacts.get("export"), "config.json")
    measured = speed([r for r in records if r.get("kind") in ("train", "machine")], machine)
    return Report(
        name=run.resolve().name,
        run=run,
        order=tuple(order),
        stages=artifacts,
        recipe=recipe,
        machine={**machine, **({"gemm_tflops": measured.gemm_tflops} if measured.gemm_tflops else {})},
        seconds={name: seconds[name] for name in order if name in seconds},
        speed=measured,
        train=by_kind["train"],
        validation=by_kind["validation"],
        resumes=by_kind["resume"],
        evaluation=_read_json(artifacts.get("evaluate"), "evaluation.json"),
        drops=_read_json(artifacts.get("corpus"), "drops.json"),
        skipped=skipped or {},
        model_type=exported.get("model_type") if isinstance(exported, Mapping) else None,
    )


def collect_run(run: Path, order: Sequence[str]) -> Report:
    """Read a run folder: its manifest names the current artifacts.

    Where there is no manifest yet (the run was interrupted), the stages are the ones that the last call recorded and
    the recipe consists of their configurations. Raises InputError where there is nothing to report.
    """
    if (run / artifact.MANIFEST).exists():
        manifest = artifact.load(run).manifest
        if manifest["kind"] != "run":
            raise InputError(
                f"{run} holds an artifact of kind {manifest['kind']!r}; a report needs the run folder above it"
            )
        said = manifest["metrics"]
        stages = {name: run / path for name, path in said["stages"].items()}
        return collect(
            run,
            order=order,
            stages=stages,
            recipe=manifest["config"],
            machine=said.get("machine", {}),
            seconds=said.get("seconds", {}),
            skipped=said.get("skipped", {}),
        )
    stages = find_stages(run, order)
    if not stages and not (run / METRICS).exists():
        raise InputError(
            f"{run} is not a run folder: it has no {artifact.MANIFEST}, no {METRICS} and no stage's artifact"
        )
    recipe = {name: artifact.load(path).manifest["config"] for name, path in stages.items()}
    return collect(run, order=order, stages=stages, recipe=recipe, machine={}, seconds={})


def _read_json(stage: Artifact | None, name: str) -> Any:
    if stage is None or not (stage.path / name).exists():
        return None
    try:
        return json.loads((stage.path / name).read_bytes())
    except ValueError:
        raise Failure(
            f"{stage.path / name} is damaged: not JSON; remove {stage.path} and run again to rebuild it"
        ) from None


# ---- bits per byte and licenses -----------------------------------------------------------------------


def held_out(report: Report) -> Mapping[str, float]:
    """Bits per byte of the test split: "all" and each source."""
    measured: Mapping[str, float] = (report.evaluation or {}).get("test", {}).get("bits_per_byte", {})
    return measured


def validation_bits(report: Report) -> Mapping[str, float]:
    """Bits per byte of the validation split: the evaluation's, else the last that training measured."""
    measured = (report.evaluation or {}).get("validation", {}).get("bits_per_byte", {})
    return measured or (report.validation[-1].get("bits_per_byte", {}) if report.validation else {})


def baselines(report: Report) -> dict[str, Mapping[str, float]]:
    said = (report.evaluation or {}).get("baselines", {})
    return {name: said.get(name, {}) for name in BASELINES}


def by_source(bits: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in bits.items() if name != "all"}


def licenses(report: Report) -> dict[str, int]:
    """SPDX expression -> bytes of kept text under it, summed over the corpus's sources; most first."""
    total: dict[str, int] = {}
    for source in report.stages["corpus"].manifest["sources"].values() if "corpus" in report.stages else ():
        for license, num_bytes in source["licenses"].items():
            total[license] = total.get(license, 0) + num_bytes
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))
