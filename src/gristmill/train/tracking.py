"""MLflow, one way: figures go out, nothing comes back, and training never waits for it.

One background thread talks to the tracking server, in batches. When the server fails, tracking stops with one warning
and training continues; `metrics.jsonl` stays the truth. Only this file imports MLflow.
"""

import logging
import math
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from gristmill.artifact import Artifact
from gristmill.errors import InputError
from gristmill.progress import console
from gristmill.train.config import TrackingConfig

FLUSH_EVERY_S = 10.0
# At the end, with what was asked and has not answered: a server may be dead, a database here is only slow.
SERVER_PATIENCE_S, LOCAL_PATIENCE_S = 10.0, 60.0
MAX_PARAM_CHARS = 500  # MLflow refuses longer values on some backends
STORES = ("http", "https", "databricks", "databricks-uc", "uc", "postgresql", "mysql", "sqlite", "mssql")  # MLflow's


def check_uri(cfg: TrackingConfig) -> None:
    """Raises InputError when MLflow cannot use the tracking URI, before any work is done."""
    name = "train.tracking.uri" if cfg.uri else "MLFLOW_TRACKING_URI"
    uri = cfg.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not cfg.enabled or not uri:
        return
    scheme = uri.partition(":")[0].partition("+")[0].lower()
    if scheme in STORES:
        return
    if scheme == "file" or "://" not in uri:
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
            return
        raise InputError(
            f"{name}={uri}: MLflow no longer writes to folders; use sqlite:////folder/mlflow.db or the URL of a "
            "server, or leave it out for a database in the run folder"
        )
    raise InputError(f"{name}={uri}: MLflow does not know {scheme}://; it knows {', '.join(STORES)}")


@contextmanager
def local_uri(state: Path) -> Iterator[str]:
    """The URI of the database in `state`. MLflow and SQLAlchemy read `?` and `%` in a URI in different ways: a folder
    with such a name is given to them as a link without these characters."""
    folder = state.resolve()
    if re.fullmatch(r"[\w/.-]+", str(folder), re.ASCII):
        yield f"sqlite:///{folder}/mlflow.db"
        return
    with tempfile.TemporaryDirectory(prefix="gristmill-") as place:
        link = Path(place) / "state"
        link.symlink_to(folder)
        yield f"sqlite:///{link}/mlflow.db"


class Tracking:
    """A run in MLflow. `key` names the training, so that a resumed one continues the same MLflow run."""

    def __init__(self, cfg: TrackingConfig, state: Path, name: str, key: str) -> None:
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._cfg, self._state, self._name, self._key = cfg, state, name, key
        self._uri = cfg.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
        self._thread: threading.Thread | None = None
        self._asked = time.monotonic()  # when the thread began what it does, or infinity when it waits for work
        if cfg.enabled:
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()

    def params(self, config: Mapping[str, Any]) -> None:
        self._put(("params", {key: str(value)[:MAX_PARAM_CHARS] for key, value in flatten(config).items()}))

    def dataset(self, artifact: Artifact) -> None:
        self._put(("dataset", artifact))

    def metrics(self, figures: Mapping[str, Any], step: int) -> None:
        flat = flatten(figures).items()
        numbers = {key.replace("/", "."): float(value) for key, value in flat if isinstance(value, int | float)}
        self._put(("metrics", (numbers, step, int(time.time() * 1000))))

    def model(self, artifact: Artifact) -> None:
        self._put(("model", artifact))

    def _put(self, item: tuple[str, Any]) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._queue.put(item)

    def close(self, status: str) -> None:
        """Send what is left and end the run as "FINISHED", "KILLED" or "FAILED"."""
        self._put(("close", status))
        patience_s = SERVER_PATIENCE_S if self._uri.startswith("http") else LOCAL_PATIENCE_S
        while self._thread is not None and self._thread.is_alive() and time.monotonic() - self._asked < patience_s:
            self._thread.join(0.1)

    def _work(self) -> None:
        try:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            from mlflow import MlflowClient

            logging.getLogger("mlflow").setLevel(logging.WARNING)  # it would write into the live display
            logging.getLogger("alembic").setLevel(logging.WARNING)
            self._asked = time.monotonic()
            with nullcontext(self._uri) if self._uri else local_uri(self._state) as uri:
                session = _Session(MlflowClient(uri), self._cfg.experiment, self._name, self._key)
                while session.open:
                    self._asked = math.inf
                    item = self._queue.get()
                    self._asked = time.monotonic()
                    session.take(*item)
        except ImportError:
            console.print("  tracking is off: MLflow is not installed (pip install mlflow-skinny)")
        except Exception as failure:  # whatever a remote server does, training continues
            said = f"  tracking stopped, training continues: {type(failure).__name__}: {str(failure)[:300]}"
            console.print(said, markup=False)


class _Session:
    """The worker thread's side: an open MLflow run and the metrics that wait to be sent."""

    def __init__(self, client: Any, experiment: str, name: str, key: str) -> None:
        self.client, self.open = client, True
        found = client.get_experiment_by_name(experiment)
        self.experiment_id = found.experiment_id if found else client.create_experiment(experiment)
        known = client.search_runs([self.experiment_id], f"tags.`gristmill.key` = '{key}'", max_results=1)
        tags = {"gristmill.key": key}
        run = known[0] if known else client.create_run(self.experiment_id, tags=tags, run_name=name)
        self.run_id, self.is_new = run.info.run_id, not known
        if known:
            client.update_run(self.run_id, "RUNNING")
        self.sent_up_to: dict[str, int] = {}
        self.waiting: list[Any] = []
        self.sent = time.monotonic()

    def take(self, what: str, value: Any) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param

        match what:
            case "params" if self.is_new:  # MLflow refuses to change one
                self.client.log_batch(self.run_id, params=[Param(k, v) for k, v in value.items()])
            case "dataset":
                entry = Dataset(value.kind, value.content[:36], "gristmill", str(value.path))
                self.client.log_inputs(
                    self.run_id, [DatasetInput(entry, [InputTag("mlflow.data.context", "training")])]
                )
            case "metrics":
                numbers, step, at_ms = value
                for name, number in numbers.items():
                    if step > self._last_step(name):  # what a killed process sent is not sent again
                        self.waiting.append(Metric(name, number, at_ms, step))
            case "model":
                model = self.client.create_logged_model(
                    self.experiment_id,
                    name=f"step-{value.metrics['step']}",
                    source_run_id=self.run_id,
                    tags={"gristmill.content": value.content, "gristmill.path": str(value.path)},
                )
                self.client.finalize_logged_model(model.model_id, "READY")
                self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, value.metrics["step"])])
            case "close":
                self.open = False
        if self.waiting and (not self.open or time.monotonic() - self.sent > FLUSH_EVERY_S):
            for start in range(0, len(self.waiting), 1000):  # MLflow's limit for one call
                self.client.log_batch(self.run_id, metrics=self.waiting[start : start + 1000])
            self.waiting, self.sent = [], time.monotonic()
        if not self.open:
            self.client.set_terminated(self.run_id, value)

    def _last_step(self, name: str) -> int:
        """The step of this metric that the server got last before this process began; after a roll-back it had more."""
        if name not in self.sent_up_to:
            known = [] if self.is_new else self.client.get_metric_history(self.run_id, name)
            self.sent_up_to[name] = max(((m.timestamp, m.step) for m in known), default=(0, -1))[1]
        return self.sent_up_to[name]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are left out."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif not isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = value
    return flat
