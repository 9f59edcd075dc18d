"""MLflow: the store, and a run per cell. The only module that imports mlflow."""

import logging
import math
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
import numpy as np
import psutil
from filelock import FileLock
from mlflow.entities import Metric, Param, RunTag
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec
from ruamel.yaml import YAML

from ablation_lab import files
from ablation_lab.errors import LabError

STORE = "mlruns"

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # they tell of every table that they make


def uri() -> str:
    """`MLFLOW_TRACKING_URI` when set, else the sqlite database under the root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(files.root() / STORE / 'mlflow.db').resolve()}"


def open_store(experiment: str) -> tuple[MlflowClient, str]:
    """Connect to the store and find the study's experiment; whoever comes first makes them.

    Several processes that open a missing database at once break it for good, hence the lock. Write-ahead logging lets
    them write side by side afterwards; the setting stays in the file.

    Returns:
        The client and the experiment's id.
    """
    if not uri().startswith("sqlite:///"):
        client = MlflowClient(uri(), uri())
        return client, _experiment(client, experiment, None)
    database = Path(uri().removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(database.with_suffix(".lock")):
        if not database.exists():
            with closing(sqlite3.connect(database)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
        client = MlflowClient(uri(), uri())
        return client, _experiment(client, experiment, (database.parent / "artifacts" / experiment).as_uri())


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        return client.create_experiment(name, artifacts)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def study_name(root: Path = Path()) -> str:
    """The current study's name, MLflow's experiment."""
    return YAML(typ="safe", pure=True).load((root / "params.yaml").read_text(encoding="utf-8"))["study"]["name"]


@dataclass
class Identity:
    """What a run is of: the cell, and its resolved configuration."""

    study: str
    variant: str
    seed: int
    cell_hash: str
    plan: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"


class CellRun:
    """One cell's run in MLflow. Trouble with the store is told once and never stops a training."""

    def __init__(self, identity: Identity):
        self.identity = identity
        self.client: MlflowClient | None = None
        self.run_id = ""

    def start(self) -> None:
        with self._tolerant():
            client, experiment = open_store(self.identity.study)
            run = client.create_run(experiment, run_name=self.identity.name, tags=_tags(self.identity))
            self.client, self.run_id = client, run.info.run_id
            params = [Param(key, str(value)) for key, value in flat(self.identity.plan).items()]
            client.log_batch(self.run_id, params=[*params, Param("seed", str(self.identity.seed))])

    def epoch(self, row: dict[str, float]) -> None:
        """Log one row of the history, in one batch, at its epoch's number."""
        step = int(row["epoch"])
        self.metrics({key: value for key, value in row.items() if key != "epoch"}, step)

    def metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Log some metrics in one batch; those that don't exist (None) or are no numbers are left out."""
        now = int(time.time() * 1000)
        numbers = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
        if self.client:
            with self._tolerant():
                self.client.log_batch(self.run_id, [Metric(key, value, now, step) for key, value in numbers.items()])

    def model(self, network: Any, classes: list[str]) -> None:
        """Log a Keras network that takes raw pictures, 0 to 255."""
        from mlflow import keras as mlflow_keras  # brings TensorFlow with it, which only training needs

        if not self.client:
            return
        signature = ModelSignature(
            Schema([TensorSpec(np.dtype("uint8"), tuple(size or -1 for size in network.input_shape), "image")]),
            Schema([TensorSpec(np.dtype("float32"), (-1, len(classes)), "probabilities")]),
        )
        with self._tolerant():
            mlflow.set_tracking_uri(uri())
            with mlflow.start_run(run_id=self.run_id):
                mlflow_keras.log_model(
                    network,
                    name="model",
                    signature=signature,
                    # Named here, since finding them out would import TensorFlow a second time.
                    pip_requirements=[f"{name}=={version(name)}" for name in ("tensorflow", "keras", "numpy")],
                    metadata={"classes": classes},
                )

    def tag(self, values: dict[str, str]) -> None:
        if self.client:
            with self._tolerant():
                self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in values.items()])

    def end(self, status: str = "FINISHED") -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        if self.client:
            with self._tolerant():
                self.client.set_terminated(self.run_id, status)

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        # A store can fail in ways that MLflow, SQLAlchemy and the network each name differently.
        try:
            yield
        except Exception as error:
            self.client = None
            print(f"warning: MLflow does not take {self.identity.name}: {_first_line(error)}", file=sys.stderr)


@contextmanager
def cell_run(identity: Identity) -> Iterator[CellRun]:
    """A run that ends as FINISHED, as KILLED after Ctrl-C or SIGTERM, as FAILED after any other exception."""
    run = CellRun(identity)
    run.start()
    try:
        yield run
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        run.tag({"ablab.reason": f"{type(error).__name__}: {error}"[:500]})
        run.end("KILLED" if stopped else "FAILED")
        raise
    run.end()


def close_orphans(study: str) -> None:
    """End the runs of processes of this machine that are gone as KILLED, with the epoch that they reached."""
    with _explained():
        client, experiment = open_store(study)
        query = f"attributes.status = 'RUNNING' and tags.`ablab.host` = '{socket.gethostname()}'"
        for run in client.search_runs([experiment], query, max_results=1000):
            if not psutil.pid_exists(int(run.data.tags.get("ablab.pid", 0))):
                epochs = client.get_metric_history(run.info.run_id, "loss")
                reached = max((metric.step for metric in epochs), default=0)
                client.set_tag(run.info.run_id, "ablab.reason", f"the process ended after epoch {reached}")
                client.set_terminated(run.info.run_id, "KILLED")


def sync(identity: Identity, history: list[dict[str, float]], final: dict[str, float]) -> str:
    """Make MLflow agree with a cell's files.

    A finished run with the cell's hash gets the final metrics that it lacks. Where there is none (the cell came from
    DVC's cache, or from elsewhere) it is made from the files.

    Returns:
        The run's id.
    Raises:
        LabError: when the store does not work.
    """
    with _explained():
        client, experiment = open_store(identity.study)
        query = f"tags.`ablab.cell_hash` = '{identity.cell_hash}' and tags.`ablab.variant` = '{identity.variant}'"
        found = client.search_runs([experiment], f"{query} and attributes.status = 'FINISHED'", max_results=1)
    run = CellRun(identity)
    if found:
        run.client, run.run_id = client, found[0].info.run_id
        logged = found[0].data.metrics
        run.metrics({key: value for key, value in final.items() if logged.get(key) != value})
    else:
        run.start()
        for row in history:
            run.epoch(row)
        run.metrics(final)
        run.end()
    if run.client is None:
        raise LabError(
            f"{uri()}: Expected a store that takes {identity.name}. Found: it does not, see above. "
            "Call `ablab sync` when it works again."
        )
    return run.run_id


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise LabError(f"{uri()}: Expected MLflow's store. Found: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names; a list of layers goes by the layers' names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value):
            value = {layer["name"]: {k: v for k, v in layer.items() if k != "name"} for layer in value}
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _tags(identity: Identity) -> dict[str, str]:
    tags = {
        "ablab.variant": identity.variant,
        "ablab.seed": str(identity.seed),
        "ablab.cell_hash": identity.cell_hash,
        "ablab.host": socket.gethostname(),
        "ablab.pid": str(os.getpid()),
        "dvc.stage": os.environ.get("DVC_STAGE", ""),
        "dvc.exp_name": os.environ.get("DVC_EXP_NAME", ""),
        "git.commit": _git_commit(),
    }
    return {key: value for key, value in tags.items() if value}


def _git_commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else ""
