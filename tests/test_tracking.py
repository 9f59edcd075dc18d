import multiprocessing
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from conftest import ROOT
from mlflow.tracking import MlflowClient

from ablation_lab import tracking
from ablation_lab.errors import LabError

PLAN = {
    "input": {"rescale": "unit", "augment": {}},
    "model": {"builder": "cnn", "blocks": [{"name": "one", "filters": 3, "dropout": 0.5}], "head": []},
    "train": {"epochs": 2, "optimizer": {"name": "adam"}},
}
HISTORY = [
    {"epoch": 1.0, "loss": 2.0, "val_accuracy": 0.25, "epoch_seconds": 0.5},
    {"epoch": 2.0, "loss": 1.0, "val_accuracy": 0.5, "epoch_seconds": 0.25},
]
FINAL = {"test_accuracy": 0.5, "macro_f1": 0.375}


def identity(seed: int = 0) -> tracking.Identity:
    return tracking.Identity("study", "variant", seed, f"hash-{seed}", PLAN)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty project folder as the root; returns a function that lists all runs of the study."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))

    def runs() -> list:
        client = MlflowClient(f"sqlite:///{tmp_path}/mlruns/mlflow.db")
        return list(client.search_runs([client.get_experiment_by_name("study").experiment_id]))

    return runs


def test_settings_of_a_users_network_are_logged_whatever_they_are():
    settings = {"layers": [{"filters": 16}, {"filters": 32}], "blocks": [{"name": "a", "filters": 8}], "mixed": [{}, 1]}
    assert tracking.flat(settings) == {
        "layers": [{"filters": 16}, {"filters": 32}],
        "blocks.a.filters": 8,
        "mixed": [{}, 1],
    }


def test_a_run_has_the_cells_settings_metrics_and_tags(store, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train@variant-0")
    monkeypatch.setenv("DVC_EXP_NAME", "try")
    with tracking.cell_run(identity()) as run:
        for row in HISTORY:
            run.epoch(row)
        run.metrics({"test_accuracy": 0.5, "test_loss": None, "macro_f1": float("nan")})
    (logged,) = store()
    assert (logged.info.run_name, logged.info.status) == ("variant-0", "FINISHED")
    assert logged.data.params == {
        "seed": "0",
        "input.rescale": "unit",
        "input.augment": "{}",
        "model.builder": "cnn",
        "model.blocks.one.filters": "3",
        "model.blocks.one.dropout": "0.5",
        "model.head": "[]",
        "train.epochs": "2",
        "train.optimizer.name": "adam",
    }
    assert logged.data.metrics == {"loss": 1.0, "val_accuracy": 0.5, "epoch_seconds": 0.25, "test_accuracy": 0.5}
    tags = logged.data.tags
    assert (tags["ablab.variant"], tags["ablab.seed"], tags["ablab.cell_hash"]) == ("variant", "0", "hash-0")
    assert (tags["dvc.stage"], tags["dvc.exp_name"]) == ("train@variant-0", "try")
    assert tags["ablab.host"] and int(tags["ablab.pid"]) > 0


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("broke"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED")]
)
def test_a_run_that_does_not_end_well_says_why(store, error, status):
    with pytest.raises(type(error)), tracking.cell_run(identity()):
        raise error
    (logged,) = store()
    assert logged.info.status == status
    assert logged.data.tags["ablab.reason"].startswith(type(error).__name__)


def test_sync_makes_the_run_of_a_cell_from_the_cache_once(store):
    first = tracking.sync(identity(), HISTORY, FINAL)
    assert tracking.sync(identity(), HISTORY, FINAL) == first
    (logged,) = store()
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics == {"loss": 1.0, "val_accuracy": 0.5, "epoch_seconds": 0.25, **FINAL}


def test_sync_adds_final_metrics_to_the_run_of_the_training(store, tmp_path):
    with tracking.cell_run(identity()) as run:
        for row in HISTORY:
            run.epoch(row)
    for _ in range(2):
        assert tracking.sync(identity(), HISTORY, FINAL) == run.run_id
    (logged,) = store()
    assert logged.data.metrics["macro_f1"] == FINAL["macro_f1"]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    assert [metric.step for metric in client.get_metric_history(run.run_id, "loss")] == [1, 2]
    assert len(client.get_metric_history(run.run_id, "macro_f1")) == 1


def test_a_store_that_does_not_work_is_told_and_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "mlruns").write_text("a file where the folder should be")
    with tracking.cell_run(identity()) as run:
        run.epoch(HISTORY[0])
    assert "warning: MLflow does not take variant-0: " in capsys.readouterr().err


def test_sync_says_when_the_store_does_not_take_it(store, tmp_path, capsys):
    tracking.open_store("study")
    with closing(sqlite3.connect(tmp_path / "mlruns/mlflow.db")) as connection:
        connection.execute("DROP TABLE tags")
        connection.commit()
    with pytest.raises(LabError, match=r"Expected MLflow's store\. Found: "):
        tracking.sync(identity(), HISTORY, FINAL)
    (tmp_path / "mlruns/mlflow.db").write_text("no database")
    with pytest.raises(LabError, match=r"Expected MLflow's store\. Found: "):
        tracking.close_orphans("study")


def test_a_run_whose_process_is_gone_is_closed_with_its_epoch(store):
    gone, alive = tracking.CellRun(identity(0)), tracking.CellRun(identity(1))
    for run in (gone, alive):
        run.start()
        run.epoch(HISTORY[0])
    finished = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    gone.tag({"ablab.pid": finished.stdout.strip()})
    tracking.close_orphans("study")
    found = {run.info.run_name: run for run in store()}
    assert found["variant-0"].info.status == "KILLED"
    assert found["variant-0"].data.tags["ablab.reason"] == "the process ended after epoch 1"
    assert found["variant-1"].info.status == "RUNNING"


def _train(seed: int) -> None:
    with tracking.cell_run(identity(seed)) as run:
        for row in HISTORY:
            run.epoch(row)


def test_several_processes_may_open_a_store_that_is_not_there_yet(store, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.map(_train, range(4), chunksize=1)
    assert sorted(run.info.run_name for run in store()) == [f"variant-{seed}" for seed in range(4)]
    assert {run.info.status for run in store()} == {"FINISHED"}
    with sqlite3.connect(tmp_path / "mlruns/mlflow.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
