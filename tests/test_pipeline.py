"""A whole run, from text to report, and what happens when it is run again."""

import json
import math
import shutil
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import gristmill

from gristmill import artifact
from gristmill.current import find_checkpoint
from gristmill.errors import Failure, InputError
from gristmill.evaluate import read_documents
from gristmill.evaluate.trigram import Trigram
from gristmill.inference.quantizing import test_documents as documents_for
from gristmill.inference.scorer import ModelScorer
from gristmill.pipeline import rewrite_report, run
from gristmill.report import figures
from gristmill.report.batch import batch_text
from gristmill.session import locked
from gristmill.stage import Recipe
from gristmill.streaming import Batches, MixPhase
from gristmill.tokenizer import Tokenizer
from gristmill.train.config import TrackingConfig
from gristmill.train.figures import Step
from gristmill.train.log import MetricsLog, read_metrics
from gristmill.train.tracking import Tracking

MakeRecipe = Callable[..., Recipe]

FIGURES = [
    "total_params", "active_params", "train_tokens", "train_seconds", "tokens_per_second", "validation_bits_per_byte",
    "held_out_bits_per_byte", "xz_document_bits_per_byte", "xz_bits_per_byte", "trigram_bits_per_byte",
    "export_max_logit_diff",
]  # fmt: skip


def keys(folder: Path) -> dict[str, str]:
    return artifact.load(folder).manifest["metrics"]["stages"]


def test_a_run_leaves_a_report_with_every_figure(tiny_run: Path) -> None:
    report = json.loads((tiny_run / "report.json").read_text())
    for name in FIGURES:
        assert isinstance(report[name], int | float), name
    unknown = [figure.key for figure in figures.FIGURES if report[figure.key] is None]
    assert unknown in ([], ["mfu_data_sheet"])  # only GPUs have a data sheet: every other figure is written by a stage
    assert report["train_tokens"] == 8 * 256
    assert report["export_max_logit_diff"] < 1e-4
    assert (tiny_run / "report.html").stat().st_size > 10_000


def test_a_run_verifies_and_each_damaged_file_is_named(tiny_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy, symlinks=True)
    assert artifact.verify(copy).problems == []
    files = [
        file
        for file in sorted(copy.rglob("*"))
        if file.is_file() and not file.is_symlink() and ".state" not in file.parts
    ]
    not_covered = set(artifact.verify(copy).not_covered)
    for file in files:
        if str(file) in not_covered:
            continue
        good = file.read_bytes()
        middle = len(good) // 2
        file.write_bytes(good[:middle] + bytes([good[middle] ^ 0xFF]) + good[middle + 1 :])
        try:
            problems = artifact.verify(copy).problems
        except Failure as damage:  # the run's own manifest
            problems = [str(damage)]
        assert any(file.name in problem for problem in problems), file
        file.write_bytes(good)
    assert {Path(line).name for line in not_covered} == {".state"}


def test_what_stands_is_not_run_again(
    tiny_run: Path, tiny_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {
        file: file.stat().st_mtime_ns for file in tiny_run.rglob("*") if file.is_file() and ".state" not in file.parts
    }
    run(tiny_recipe(), tiny_run)
    said = capsys.readouterr().err
    assert said.count("stands") == 6
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_change_redoes_what_depends_on_it_and_nothing_else(
    tiny_run: Path, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_run, folder, symlinks=True)
    before = keys(folder)
    run(tiny_recipe("train.optimizer.lr=0.02"), folder)
    after = keys(folder)
    assert {name for name in before if before[name] != after[name]} == {"train", "evaluate", "export"}
    run(tiny_recipe("evaluate.samples=2"), folder)
    third = keys(folder)
    assert {name for name in before if before[name] != third[name]} == {"evaluate", "export"}
    assert artifact.verify(folder).problems == []


def test_going_back_to_a_setting_brings_its_own_figures_back(
    tiny_run: Path, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_run, folder, symlinks=True)
    first = (folder / "metrics.jsonl").read_text()
    run(tiny_recipe("train.steps=2"), folder)
    assert (folder / "metrics.jsonl").read_text() != first
    run(tiny_recipe(), folder)
    assert (folder / "metrics.jsonl").read_text() == first
    assert json.loads((folder / "report.json").read_text())["train_tokens"] == 8 * 256


def test_the_training_of_the_last_call_is_current_until_the_run_is_finished(
    tiny_run: Path, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_run, folder, symlinks=True, copy_function=shutil.copyfile)  # without times
    (folder / "manifest.json").unlink()
    first = find_checkpoint(folder)
    assert first == folder / keys(tiny_run)["train"]
    run(tiny_recipe("train.steps=2"), folder, until="train")
    second = find_checkpoint(folder)
    assert second is not None
    assert second.name == "step-00000002"
    rewrite_report(folder)
    report = json.loads((folder / "report.json").read_text())
    assert report["missing_stages"] == ["evaluate", "export"]  # those of the first are not the second's
    assert report["stages"]["train"]["path"] == second.relative_to(folder).as_posix()
    run(tiny_recipe(), folder, until="train")
    assert find_checkpoint(folder) == first
    shutil.rmtree(folder / ".state")
    with pytest.raises(InputError, match="2 trainings and nothing says which"):
        find_checkpoint(folder)
    with pytest.raises(InputError, match="nothing says which train is current"):
        rewrite_report(folder)


def test_lineage_takes_a_folder_with_nothing_but_a_training(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "train", tmp_path / "run/train")
    (training,) = (tmp_path / "run/train").iterdir()
    expected = gristmill("lineage", tiny_run / keys(tiny_run)["train"])
    for path in (tmp_path / "run", training):
        shown = gristmill("lineage", path)
        assert (shown.returncode, shown.stdout) == (0, expected.stdout), shown.stderr


def test_held_out_loss_is_measured_on_the_corpus_of_the_model_not_on_the_newest(
    tiny_run: Path, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_run, folder, symlinks=True)
    model, corpus = folder / keys(tiny_run)["train"], folder / keys(tiny_run)["corpus"]
    run(tiny_recipe("corpus.split.test=0.3"), folder, until="corpus")
    assert len(list((folder / "corpus").iterdir())) == 2
    texts = [document.text for document in documents_for(model)]
    assert texts == [document.text for document in read_documents(corpus, "test")]
    shutil.rmtree(corpus)
    assert documents_for(model) == []


def test_a_report_that_was_deleted_is_written_again(tiny_run: Path, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_run, folder, symlinks=True)
    (folder / "report.html").unlink()
    run(tiny_recipe(), folder)
    assert artifact.verify(folder).problems == []


def test_a_run_without_one_of_its_artifacts_does_not_verify(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_run, folder, symlinks=True)
    corpus = folder / keys(folder)["corpus"]
    (corpus / "manifest.json").unlink()
    (problem,) = artifact.verify(folder).problems
    assert str(corpus) in problem


def test_diverged_training_is_one_clear_failure(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"diverged; lower train\.optimizer\.lr"):
        run(tiny_recipe("train.optimizer.lr=1e20"), tmp_path)


def test_an_out_that_is_a_file_is_refused(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is or lies below a file"):
        run(tiny_recipe(), tmp_path / "file")


def test_figures_reach_mlflow_and_a_dead_server_stops_nothing(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/tracking.db"
    run(tiny_recipe("train.tracking.enabled=true", f"train.tracking.uri={uri}"), tmp_path / "a", until="train")
    client = MlflowClient(uri)
    (logged,) = client.search_runs([client.get_experiment_by_name("gristmill").experiment_id])
    history = client.get_metric_history(logged.info.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(1, 9))
    assert logged.info.status == "FINISHED"
    assert logged.inputs.dataset_inputs[0].dataset.name == "corpus"
    assert logged.outputs.model_outputs
    dead = "sqlite:////nowhere/at/all.db"
    run(tiny_recipe("train.tracking.enabled=true", f"train.tracking.uri={dead}"), tmp_path / "b", until="train")


def test_a_resumed_run_goes_on_in_its_mlflow_run_and_sends_nothing_twice(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/tracking.db"
    recipe = tiny_recipe("train.tracking.enabled=true", f"train.tracking.uri={uri}")

    def dies(log: MetricsLog, step: Step) -> None:
        if step.step == 7:  # after the checkpoint of step 6; step 7 is sent by the time the process ends
            raise MemoryError
        train(log, step)

    train = MetricsLog.train
    monkeypatch.setattr(MetricsLog, "train", dies)
    with pytest.raises(MemoryError):
        run(recipe, tmp_path / "run", until="train")
    monkeypatch.undo()
    (checkpoint,) = (tmp_path / "run").glob("train/*/step-00000006")
    shutil.rmtree(checkpoint)  # so it goes on from step 4, and steps 5 and 6 come again
    run(recipe, tmp_path / "run", until="train")
    client = MlflowClient(uri)
    (logged,) = client.search_runs([client.get_experiment_by_name("gristmill").experiment_id])
    assert logged.info.status == "FINISHED"
    for name in ("loss", "source_tokens.notes", "grad_norm"):
        assert [point.step for point in client.get_metric_history(logged.info.run_id, name)] == list(range(1, 9))
    (bits,) = (n for n in logged.data.metrics if n == "held_out_bits_per_byte.all")
    assert [point.step for point in client.get_metric_history(logged.info.run_id, bits)] == [2, 4, 6, 8]


def test_figures_after_a_roll_back_reach_mlflow_also_when_the_process_ends_soon_after(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    def send(*figures: tuple[int, float]) -> None:
        tracking = Tracking(TrackingConfig(uri=uri), tmp_path, "run", "key")
        for step, loss in figures:
            tracking.metrics({"loss": loss}, step)
            time.sleep(0.002)  # MLflow orders them by the millisecond
        tracking.close("KILLED")

    uri = f"sqlite:///{tmp_path}/tracking.db"
    send((1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (3, 2.0))  # back to step 2, and killed
    send((3, 2.0), (4, 2.0))
    client = MlflowClient(uri)
    (logged,) = client.search_runs([client.get_experiment_by_name("gristmill").experiment_id])
    points = sorted(client.get_metric_history(logged.info.run_id, "loss"), key=lambda point: point.timestamp)
    assert [(point.step, point.value) for point in points[-3:]] == [(4, 1.0), (3, 2.0), (4, 2.0)]
    assert logged.data.metrics["loss"] == 2.0


def test_a_tracking_server_that_never_answers_costs_a_bounded_wait_at_the_end(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gristmill.train.tracking.SERVER_PATIENCE_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # it takes connections and says nothing
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        folder = run(tiny_recipe("train.tracking.enabled=true", f"train.tracking.uri={uri}"), tmp_path, until="train")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 9))


def test_a_global_step_can_be_looked_at(tiny_run: Path) -> None:
    checkpoint = artifact.load(tiny_run / keys(tiny_run)["train"])
    tokenizer, shards = (Tokenizer.load(tiny_run / keys(tiny_run)["tokenizer"]), tiny_run / keys(tiny_run)["shards"])
    curriculum = [MixPhase(**phase) for phase in checkpoint.manifest["config"]["curriculum"]]
    batch = Batches(shards, 64, 4, 8, curriculum, 0).batch(5)
    said = "\n".join(batch_text(tiny_run, 5, full=True))
    for tokens, documents in zip(batch.tokens, batch.document_ids, strict=True):
        for number in range(documents.max() + 1):
            ids = tokens[documents == number]
            assert tokenizer.decode(ids[ids != tokenizer.eot_id].tolist()) in said
    assert said.startswith("step 5 of 8: 4 sequences of 64 tokens, stage 1 of the curriculum")
    assert said == "\n".join(batch_text(checkpoint.path, 5, full=True))
    assert max(map(len, batch_text(tiny_run, 5))) < 120
    with pytest.raises(InputError, match="--step 8 must be from 0 to 7"):
        batch_text(tiny_run, 8)


def test_the_same_recipe_gives_the_same_bits_elsewhere(tiny_run: Path, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    again = run(tiny_recipe(), tmp_path / "elsewhere")
    for name, path in keys(tiny_run).items():
        assert artifact.load(tiny_run / path).content == artifact.load(again / keys(again)[name]).content, name


def test_metrics_are_complete_and_in_order(tiny_run: Path) -> None:
    records = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 9))
    assert [r["step"] for r in records if r["kind"] == "validation"] == [2, 4, 6, 8]


def test_lineage_reaches_the_sources_and_their_licenses(tiny_run: Path) -> None:
    def leaves(node: artifact.Origin) -> set[tuple[str, str]]:
        if node.kind == "source":
            return {(node.name, license) for license in node.detail["licenses"]}
        return {leaf for parent in node.inputs for leaf in leaves(parent)}

    assert leaves(artifact.lineage(tiny_run)) == {("notes", "CC0-1.0"), ("verse", "MIT")}
    assert leaves(artifact.lineage(tiny_run / keys(tiny_run)["export"])) == {("notes", "CC0-1.0"), ("verse", "MIT")}


def test_a_second_run_on_one_folder_is_refused(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(Failure, match="in use by another"):
        run(tiny_recipe(), tmp_path)


def test_stages_run_up_to_the_one_that_is_asked_for(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(tiny_recipe(), tmp_path, until="shards")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".state", "corpus", "shards", "tokenizer"]


def test_a_dense_model_goes_the_whole_way(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = run(tiny_recipe("model.ffn=dense", "train.steps=2"), tmp_path)
    report = json.loads((folder / "report.json").read_text())
    assert report["total_params"] == report["active_params"]
    assert report["export_max_logit_diff"] < 1e-4


def test_a_model_without_a_published_layout_ends_with_its_report_and_says_so_first(
    tiny_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe("train.balance=bias", "model.moe_router_bias=true", "train.dtype=bfloat16", "train.steps=2")
    for _ in range(2):
        run(recipe, tmp_path)
        said = capsys.readouterr().err
        assert said.index("export will be skipped: no published layout has moe_router_bias") < said.index("corpus")
    rewrite_report(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["finished"]
    assert 0 < report["held_out_bits_per_byte"] < 20
    assert "moe_router_bias" in report["skipped_stages"]["export"]
    assert "The export was skipped: no published layout" in (tmp_path / "report.html").read_text()
    assert sorted(keys(tmp_path)) == ["corpus", "evaluate", "shards", "tokenizer", "train"]
    assert artifact.verify(tmp_path).problems == []


def test_figures_that_are_not_finite_cost_no_report(
    tiny_run: Path, tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run", symlinks=True)
    monkeypatch.setattr(Trigram, "bits", lambda self, documents: [math.inf for _ in documents])
    monkeypatch.setattr(ModelScorer, "loglikelihood", lambda self, sequences: [math.nan for _ in sequences])
    run(tiny_recipe("evaluate.sample_tokens=4"), tmp_path / "run")
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["finished"]
    assert report["xz_bits_per_byte"] > 0
    assert report["trigram_bits_per_byte"] is report["held_out_bits_per_byte"] is None


def test_a_compiled_training_reaches_its_report(
    tiny_run: Path, tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # tracing, without C++
    torch._dynamo.reset()
    shutil.copytree(tiny_run, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run/train")
    run(tiny_recipe("train.compile=true"), tmp_path / "run")
    eager, compiled = (read_metrics(folder / "metrics.jsonl") for folder in (tiny_run, tmp_path / "run"))
    for kind, figure in (("train", "loss"), ("validation", "bits_per_byte")):
        theirs, ours = ([r[figure] for r in records if r["kind"] == kind] for records in (eager, compiled))
        assert len(theirs) == len(ours) > 0
        for a, b in zip(theirs, ours, strict=True):
            assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer={kind: gpt4, table: nowhere}"], "nowhere"),
        (["train.checkpoint.copy_to=nosuch://bucket"], "fsspec knows no protocol 'nosuch'"),
        (["shards.remote=nosuch://bucket"], "fsspec knows no protocol 'nosuch'"),
        (["train.parallel.expert=2"], "train.parallel"),
        (["train.seq_len=1"], "evaluate.context_length"),
        (["model.d_model=1048576"], r"training takes at least [\d,]+ GiB"),
    ],
)
def test_what_a_later_stage_cannot_use_is_refused_before_the_first_stage(
    overrides: list[str], message: str, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny_recipe(*overrides), tmp_path / "run")
    assert not (tmp_path / "run/corpus").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{path: nowhere, license: MIT}", "corpus.sources.mine.path"),
        ("{path: EMPTY, license: MIT}", "corpus.sources.mine"),
        ("{path: BINARY, license: MIT}", "binary"),
        ("{path: EMPTY}", "corpus.sources.mine.license"),
        ("{path: EMPTY, license: GPL-3.0-only}", "GPL-3.0-only"),
    ],
)
def test_unusable_sources_are_refused_before_anything_is_written(
    source: str, message: str, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BINARY").mkdir()
    (tmp_path / "BINARY" / "a.bin").write_bytes(bytes(range(256)) * 50)
    source = source.replace("EMPTY", str(tmp_path / "EMPTY")).replace("BINARY", str(tmp_path / "BINARY"))
    with pytest.raises(InputError, match=message):
        run(tiny_recipe(f"corpus.sources={{mine: {source}}}"), tmp_path / "run")
