"""The evaluation stage: scores validation and test, runs the baselines, draws samples, writes `evaluation.json`."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gristmill import progress
from gristmill.artifact import Built, canonical
from gristmill.evaluate import baselines
from gristmill.evaluate.bits_per_byte import bits_per_byte
from gristmill.evaluate.config import EvaluateConfig
from gristmill.evaluate.documents import Document, read_documents
from gristmill.evaluate.samples import sample
from gristmill.evaluate.scorer import Scorer
from gristmill.stage import Stage, StageRun

if TYPE_CHECKING:
    from gristmill.tokenizer import Tokenizer


def build_evaluation(cfg: EvaluateConfig, corpus: Path, tokenizer: "Tokenizer", scorer: Scorer, out: Path) -> Built:
    """Write `out/evaluation.json`; the metrics are its figures without the samples.

    The baselines and the samples use the test documents: all of these are looked at once, at the end. Figures that are
    infinite or NaN are left out, and `not_finite` names them: they must not cost the results of a training.
    """
    validation = read_documents(corpus, "validation", cfg.validation_bytes)
    test = read_documents(corpus, "test", cfg.test_bytes)
    figures: dict[str, Any] = {
        "validation": _score("validation", validation, scorer, tokenizer),
        "test": _score("test", test, scorer, tokenizer),
        "baselines": {
            "xz_document": baselines.xz_each(test),
            "xz": baselines.xz_whole(test),
            "trigram": baselines.trigram(test, corpus, tokenizer),
        },
    }
    if left_out := _drop_not_finite(figures, ""):
        figures["not_finite"] = left_out
        progress.console.print(f"  not finite, left out: {', '.join(left_out)}", style="yellow", markup=False)
    with progress.bar("completing held-out prompts") as advance:
        samples = sample(test, scorer, tokenizer, cfg, advance)
    (out / "evaluation.json").write_bytes(canonical(figures | samples))
    return Built(metrics=figures | {name: samples[name] for name in ("parse_share",) if name in samples})


def _drop_not_finite(figures: dict[str, Any], path: str) -> list[str]:
    """Remove infinite and NaN figures at any depth; returns their names."""
    left_out = []
    for name, value in list(figures.items()):
        if isinstance(value, dict):
            left_out += _drop_not_finite(value, f"{path}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            left_out.append(f"{path}{name}")
            del figures[name]
    return left_out


def _score(split: str, documents: list[Document], scorer: Scorer, tokenizer: "Tokenizer") -> dict[str, Any]:
    num_bytes = sum(document.num_bytes for document in documents)
    with progress.bar(f"scoring {split}", num_bytes) as advance:
        figures = bits_per_byte(documents, scorer, tokenizer, advance)
    return {"bits_per_byte": figures, "documents": len(documents), "bytes": num_bytes}


# ---- the stage -----------------------------------------------------------------------------------------


def evaluation_stage(load_scorer: "Callable[[Path, int], tuple[Scorer, Tokenizer]]") -> Stage[EvaluateConfig]:
    """The stage that evaluates a checkpoint. load_scorer: opens a checkpoint with a context length."""

    def build(run: StageRun[EvaluateConfig], out: Path) -> Built:
        assert run.config.context_length is not None  # the recipe fills it in
        scorer, tokenizer = load_scorer(run.inputs["train"].path, run.config.context_length)
        return build_evaluation(run.config, run.inputs["corpus"].path, tokenizer, scorer, out)

    return Stage(
        name="evaluate",
        format=2,
        config=EvaluateConfig,
        inputs=("corpus", "train"),
        build=build,
        doing="scoring held-out text beside the baselines",
        summary=_summary,
    )


def _summary(metrics: Mapping[str, Any]) -> str:
    compared = metrics["baselines"]
    figures = metrics["test"]["bits_per_byte"], compared["xz_document"], compared["trigram"]
    ours, xz, trigram = (f"{bits['all']:.3f}" if "all" in bits else "no finite number of" for bits in figures)
    return f"{ours} bits per byte on the test split (xz per document {xz}, trigram {trigram})"
