"""Where the figures go: a database in the run folder whatever its name, or a URI that MLflow takes."""

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from gristmill.errors import InputError
from gristmill.pipeline import run
from gristmill.stage import Recipe
from gristmill.train.config import TrackingConfig
from gristmill.train.tracking import Tracking, check_uri, local_uri


@pytest.mark.parametrize("name", ["a?b=c", "100%20", "a#b", "plus+and space", "ü", "plain"])
def test_the_database_is_in_the_run_folder_whatever_its_name(name: str, tmp_path: Path) -> None:
    state = tmp_path / name / ".state"
    state.mkdir(parents=True)
    with local_uri(state) as uri, create_engine(uri).begin() as database:
        database.execute(text("create table figures (loss real)"))
    assert [path.name for path in state.iterdir()] == ["mlflow.db"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.timeout(600)  # MLflow creates a database in 5 s, or in minutes next to other work
def test_mlflow_writes_below_a_folder_whose_name_is_no_plain_uri(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("gristmill.train.tracking.LOCAL_PATIENCE_S", 600)  # a busy machine
    state = tmp_path / "100%20?" / ".state"
    state.mkdir(parents=True)
    tracking = Tracking(TrackingConfig(), state, "run", "key")
    tracking.metrics({"loss": 2.5}, 1)
    tracking.close("FINISHED")
    with sqlite3.connect(shutil.copy(state / "mlflow.db", tmp_path / "copy.db")) as database:
        assert database.execute("select key, value, step from metrics").fetchall() == [("loss", 2.5, 1)]
    assert {path.name for path in tmp_path.iterdir()} == {"100%20?", "copy.db"}


def test_a_name_that_no_disk_takes_is_one_error(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be a folder: File name too long; name another"):
        run(tiny_recipe(), tmp_path / ("n" * 300))


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("file:///figures", r"MLflow no longer writes to folders; use sqlite:////folder/mlflow.db"),
        ("./figures", r"MLflow no longer writes to folders"),
        ("gopher://host", r"MLflow does not know gopher://; it knows http, "),
    ],
)
def test_a_uri_that_mlflow_cannot_use_is_refused_before_any_work(
    uri: str, says: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=rf"train\.tracking\.uri={uri}: {says}"):
        run(tiny_recipe("train.tracking.enabled=true", f"train.tracking.uri={uri}"), tmp_path / "run")
    assert not (tmp_path / "run/corpus").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError, match=rf"MLFLOW_TRACKING_URI={uri}: {says}"):
        check_uri(TrackingConfig())
    check_uri(TrackingConfig(enabled=False))


@pytest.mark.parametrize("uri", ["https://host", "sqlite:////a/b.db", "postgresql+psycopg://h/d", "databricks"])
def test_the_uris_that_mlflow_knows_are_taken(uri: str) -> None:
    check_uri(TrackingConfig(uri=uri))


def test_mlflow_s_own_switch_for_folders_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_uri(TrackingConfig(uri="file:///figures"))
