"""Runs as they look in MLflow, whether a training writes them or its files do."""

import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from ablation_lab import errors
from ablation_lab.tracking import live, store
from ablation_lab.tracking.live import Identity

CELL, VARIANT = "cell", "variant"  # what a run is of: `ablab.level`
VIEW = "variants"  # the view of MLflow's page that shows the latter
REASON, HOST, PID = "ablab.reason", "ablab.host", "ablab.pid"
STATUS = "ablab.status"  # of a trained cell: `ok` or `diverged`
DIGEST = 36  # letters that MLflow has for a data set's digest
METRICS, PAIRS = 800, 100  # metrics, tags and parameters in a request: 1,000 in all
NAME = re.compile(r"(?=.{1,100}$)\w[\w. :-]*(/[\w :-]+)*")  # of MLflow's 250 letters and no path to elsewhere


def describe(client: MlflowClient, run_id: str, plan: Mapping[str, Any], card: Mapping[str, Any]) -> None:
    """Give a run its parameters, the resolved configuration, and the data set as its input. Twice is once."""
    log(client, run_id, params=flat(plan))
    profile = {key: card[key] for key in ("counts", "classes", "image_shape", "digest")}
    data = Dataset(
        name=card["name"],
        digest=card["digest"][:DIGEST],
        source_type="local",
        source=json.dumps({"uri": "data/processed"}),
        profile=json.dumps(profile, ensure_ascii=False),
    )
    client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])


def log(
    client: MlflowClient,
    run_id: str,
    metrics: Sequence[Metric] = (),
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
) -> None:
    """Log in as few requests as MLflow's limits allow."""
    pairs = [Param(key, str(value)) for key, value in (params or {}).items()]
    labels = [RunTag(key, value) for key, value in (tags or {}).items()]
    while metrics or labels or pairs:
        client.log_batch(run_id, metrics[:METRICS], pairs[:PAIRS], labels[:PAIRS])
        metrics, pairs, labels = metrics[METRICS:], pairs[PAIRS:], labels[PAIRS:]


def metrics(values: Mapping[str, float | None], step: int, milliseconds: int) -> list[Metric]:
    """As MLflow takes them; those that don't exist (None) or are no numbers are left out."""
    return [
        Metric(key, value, milliseconds, step)
        for key, value in values.items()
        if value is not None and math.isfinite(value)
    ]


def epoch(row: Mapping[str, float], milliseconds: int) -> list[Metric]:
    """A row of the history, at its epoch's number."""
    return metrics({key: value for key, value in row.items() if key != "epoch"}, int(row["epoch"]), milliseconds)


def tagged(identity: Identity, stage: str) -> dict[str, str]:
    """The tags by which a cell's run is found, read and traced."""
    folder = f"cells/{identity.variant}/seed-{identity.seed}"
    note = (
        f"Variant `{identity.variant}`, seed {identity.seed}: DVC's stage `{stage}`, its files are in `{folder}/`.\n\n"
    )
    note += f"`dvc repro {stage}` makes them, or takes them from DVC's cache."
    return identity.made | {
        "ablab.level": CELL,
        "ablab.variant": identity.variant,
        "ablab.seed": str(identity.seed),
        "ablab.cell_hash": identity.cell_hash,
        "ablab.variant_hash": identity.variant_hash,
        "dvc.stage": stage,
        "dvc.path": folder,
        "mlflow.note.content": note,
        "mlflow.source.name": stage,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": identity.made.get("git.commit", ""),
    }


def here() -> dict[str, str]:
    """Who makes a run, until it is done: by this it is known when its maker has died."""
    return live.user() | {HOST: socket.gethostname(), PID: str(os.getpid())}


class LiveRun:
    """The run of a training that goes on, with the machine's load every ten seconds. Each step may be tried again."""

    def __init__(self, identity: Identity, stage: str, started: int):
        self.identity, self.stage, self.started = identity, stage, started
        self.client: MlflowClient | None = None
        self.run_id = ""
        self.load: SystemMetricsMonitor | None = None

    def log(self, rows: Sequence[tuple[Mapping[str, float | None], int, int]]) -> None:
        """Log metrics, each with its step and its time; before the first ones, make the run."""
        one = self.identity
        if self.client is None:
            self.client, experiment = store.open_store(one.study)
            tags = tagged(one, self.stage)
            self.run_id = self.client.create_run(experiment, self.started, tags, one.name).info.run_id
        if self.load is None:
            describe(self.client, self.run_id, {**one.plan, "seed": one.seed}, one.card)
            self.load = SystemMetricsMonitor(self.run_id, tracking_uri=store.uri())
            self.load.start()
        log(self.client, self.run_id, [metric for row in rows for metric in metrics(*row)])

    def end(self, status: str, reason: str, ended: int | None, outcome: str) -> None:
        if self.client and self.load:
            self.load.finish()
            tags = {REASON: errors.COLOURS.sub("", reason), STATUS: outcome}
            log(self.client, self.run_id, tags={key: value for key, value in tags.items() if value})
            self.client.set_terminated(self.run_id, status, ended)


def search(client: MlflowClient, experiment: str, query: str = "") -> list[Run]:
    """All runs that a query finds, the oldest first."""
    found: list[Run] = []
    token: str | None = ""
    while token is not None:
        order = ["attributes.start_time ASC"]
        page = client.search_runs([experiment], query, max_results=1000, order_by=order, page_token=token or None)
        found += page
        token = page.token or None
    return found


def close_orphans(study: str) -> None:
    """End the runs of processes of this machine that are gone as KILLED, with the epoch that they reached."""
    with store.explained():
        client, experiment = store.open_store(study)
        query = f"attributes.status = 'RUNNING' and tags.`{HOST}` = '{socket.gethostname()}'"
        for run in search(client, experiment, query):
            if not _alive(int(run.data.tags.get(PID, 0)), run.info.start_time):
                epochs = client.get_metric_history(run.info.run_id, "loss")
                reached = max((metric.step for metric in epochs), default=0)
                client.set_tag(run.info.run_id, REASON, killed(reached))
                now = max(int(1000 * time.time()), run.info.start_time)  # the clock may have been put back
                client.set_terminated(run.info.run_id, "KILLED", now)


def killed(epoch: int) -> str:
    """Why the run of a process that is gone has ended."""
    return f"the process ended after epoch {epoch}"


def _alive(pid: int, started: int) -> bool:
    """Whether the process that began a run still is; another one may have got its number since."""
    try:
        return psutil.Process(pid).create_time() * 1000 <= started
    except psutil.NoSuchProcess:
        return False


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names; a list of layers goes by the layers' names.

    What MLflow has no name for, such as the weights of classes called `a & b`, stays one value.
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value):
            value = {layer["name"]: {k: v for k, v in layer.items() if k != "name"} for layer in value}
        if isinstance(value, dict) and value and all(NAME.fullmatch(inner) for inner in value):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
