"""Runs of trainings, live: the store, the process that logs, and what happens when either is gone."""

import getpass
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from multiprocessing.pool import ThreadPool

import pytest
from conftest import ROOT, passed, run
from mlflow.tracking import MlflowClient

from ablation_lab.errors import LabError
from ablation_lab.tracking import live, runs, store

PLAN = {
    "input": {"rescale": "unit", "augment": {}},
    "model": {"builder": "cnn", "blocks": [{"name": "one", "filters": 3, "dropout": 0.5}], "head": []},
    "train": {"epochs": 2, "optimizer": {"name": "adam"}, "class_weights": {"cats & dogs": 2.0, "$(touch pwned)": 1.0}},
}
CARD = {
    "name": "digits",
    "classes": ["cats & dogs", "$(touch pwned)"],
    "counts": {"train": 2, "validation": 1, "test": 1},
    "image_shape": [8, 8, 1],
    "digest": "0123456789" * 6 + "0123",
}
HISTORY = [
    {"epoch": 1.0, "loss": 2.0, "val_accuracy": 0.25, "epoch_seconds": 0.5},
    {"epoch": 2.0, "loss": 1.0, "val_accuracy": 0.5, "epoch_seconds": 0.25},
]


def identity(seed: int = 0) -> live.Identity:
    return live.Identity("study", "variant", seed, f"hash-{seed}", "hash", PLAN, CARD, live.provenance())


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty project folder as the root, also for the processes that log."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def found(root) -> list:
    client = MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db")
    return list(client.search_runs([client.get_experiment_by_name("study").experiment_id]))


def test_settings_of_a_users_network_are_logged_whatever_they_are():
    settings = {"layers": [{"filters": 16}, {"filters": 32}], "blocks": [{"name": "a", "filters": 8}], "mixed": [{}, 1]}
    settings |= {"weights": {"cat": 2, "T-shirt/top": 3}, "other": {"../x": 1}, "long": {"a" * 101: 1}}
    assert runs.flat(settings) == {
        "layers": [{"filters": 16}, {"filters": 32}],
        "blocks.a.filters": 8,
        "mixed": [{}, 1],
        "weights.cat": 2,
        "weights.T-shirt/top": 3,
        "other": {"../x": 1},
        "long": {"a" * 101: 1},
    }


def test_a_run_has_the_cells_settings_metrics_tags_and_data(root, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train@variant-0")
    monkeypatch.setenv("DVC_EXP_NAME", "try")
    with live.cell_run(identity()) as run:
        for row in HISTORY:
            run.epoch(row)
            time.sleep(0.2)
        run.metrics({"train_accuracy": 0.5, "validation_accuracy": None, "best_epoch": float("nan")})
        run.outcome = "diverged"
    (logged,) = found(root)
    assert (logged.info.run_name, logged.info.status) == ("variant-0", "FINISHED")
    # The training's times, not those of the process that logs.
    assert 400 <= logged.info.end_time - logged.info.start_time < 2000
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
        # A parameter of MLflow's can't be called like these classes.
        "train.class_weights": "{'cats & dogs': 2.0, '$(touch pwned)': 1.0}",
    }
    assert logged.data.metrics == {"loss": 1.0, "val_accuracy": 0.5, "epoch_seconds": 0.25, "train_accuracy": 0.5}
    tags = logged.data.tags
    assert (tags["ablab.variant"], tags["ablab.seed"], tags["ablab.cell_hash"]) == ("variant", "0", "hash-0")
    assert (tags["dvc.stage"], tags["dvc.exp_name"], tags["dvc.path"]) == (
        "train@variant-0",
        "try",
        "cells/variant/seed-0",
    )
    assert (tags["ablab.host"], tags["ablab.pid"]) == (socket.gethostname(), str(os.getpid()))
    assert (tags["mlflow.user"], tags["ablab.status"]) == (getpass.getuser(), "diverged")
    assert tags["ablab.tensorflow"].startswith("2.") and tags["git.dirty"] in ("true", "false")
    (data,) = logged.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits", CARD["digest"][:36])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("\x1b[1mbroke\x1b[0m in \x1b[38;5;34mcall\x1b[0m()"), "FAILED"),  # as Keras colours it
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
    ],
)
def test_a_run_that_does_not_end_well_says_why(root, error, status):
    with pytest.raises(type(error)), live.cell_run(identity()):
        raise error
    (logged,) = found(root)
    assert logged.info.status == status
    reason = logged.data.tags["ablab.reason"]
    assert reason.startswith(type(error).__name__) and "\x1b" not in reason
    assert status == "KILLED" or reason == "ValueError: broke in call()"
    assert "ablab.status" not in logged.data.tags


BARE = "from ablation_lab.tracking import mirror; import mlflow.telemetry as t; print(t.get_telemetry_client())"


def test_mlflows_telemetry_is_off_in_a_users_own_shell(tmp_path):
    environment = [f"PATH={os.environ['PATH']}", f"HOME={tmp_path}", f"PYTHONPATH={ROOT / 'src'}"]
    assert passed(run(tmp_path, "env", "-i", *environment, sys.executable, "-c", BARE)) == "None\n"


NAMELESS = """
import os
from ablation_lab.tracking import live
for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
os.setuid(54321)
print(live.user())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="becomes a user whom the system has no name for, which only root may")
def test_a_user_without_a_name_has_no_tag(tmp_path):
    assert passed(run(tmp_path, "python", "-c", NAMELESS, PYTHONPATH=str(ROOT / "src"))) == "{}\n"


KILLED = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from test_tracking import HISTORY, identity
from ablation_lab.tracking import live
with live.cell_run(identity()) as run:
    run.epoch(HISTORY[0])
    print("trains", flush=True)
    time.sleep(60)
"""


def test_a_training_that_is_killed_has_its_run_closed_at_once(root):
    script = KILLED.format(tests=str(ROOT / "tests"))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout.readline() == "trains\n"
        training.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not (root / "mlruns/mlflow.db").exists() or not (closed := _closed(root)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert closed == [("KILLED", "the process ended after epoch 1")]


def _closed(root) -> list:
    with closing(sqlite3.connect(root / "mlruns/mlflow.db")) as database:
        try:
            closed = "SELECT status, value FROM runs JOIN tags USING (run_uuid) WHERE key = ? AND status != 'RUNNING'"
            return database.execute(closed, ("ablab.reason",)).fetchall()
        except sqlite3.OperationalError:
            return []  # its tables are being made


def test_a_store_that_does_not_work_is_told_once_and_stops_nothing(root, capfd):
    (root / "mlruns").write_text("a file where the folder should be")
    with live.cell_run(identity()) as run:
        for row in HISTORY:
            run.epoch(row)
    assert capfd.readouterr().err.count("warning: MLflow does not take variant-0: ") == 1


def test_a_server_that_never_answers_holds_nothing_up(root, monkeypatch, capfd):
    monkeypatch.setattr(live, "PATIENCE", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with live.cell_run(identity()) as run:
            for number in range(2000):
                run.epoch(HISTORY[0] | {"epoch": number})
            assert time.monotonic() - started < 2
        assert time.monotonic() - started < 5
    assert "MLflow has not taken all of variant-0 in 1 s" in capfd.readouterr().err


def test_trouble_with_the_store_is_told(root):
    store.open_store("study")
    with closing(sqlite3.connect(root / "mlruns/mlflow.db")) as connection:
        connection.execute("DROP TABLE tags")
        connection.commit()
    with pytest.raises(LabError, match=r"Expected MLflow's store\. Found: .*Call `ablab sync` when it works again"):
        runs.close_orphans("study")


def begin(seed: int, pid: int) -> str:
    client, experiment = store.open_store("study")
    tags = runs.tagged(identity(seed), "train") | {"ablab.pid": str(pid)}
    run_id = client.create_run(experiment, run_name=f"variant-{seed}", tags=tags).info.run_id
    runs.log(client, run_id, runs.epoch(HISTORY[0], 0))
    return run_id


def test_a_run_whose_process_is_gone_is_closed_with_its_epoch(root):
    over = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    begin(0, int(over.stdout))
    begin(1, os.getpid())
    begin(2, 1)
    with closing(sqlite3.connect(root / "mlruns/mlflow.db")) as connection:
        # Its number belongs to a process that began later: another one.
        connection.execute("UPDATE runs SET start_time = 0 WHERE name = 'variant-2'")
        connection.commit()
    runs.close_orphans("study")
    by_name = {run.info.run_name: run for run in found(root)}
    assert {name: run.info.status for name, run in by_name.items()} == {
        "variant-0": "KILLED",
        "variant-1": "RUNNING",
        "variant-2": "KILLED",
    }
    assert by_name["variant-0"].data.tags["ablab.reason"] == "the process ended after epoch 1"


def test_a_run_from_before_the_clock_was_put_back_does_not_end_before_it_starts(root):
    over = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    begin(0, int(over.stdout))
    tomorrow = int(1000 * time.time()) + 86_400_000
    with closing(sqlite3.connect(root / "mlruns/mlflow.db")) as connection:
        connection.execute("UPDATE runs SET start_time = ?", (tomorrow,))
        connection.commit()
    runs.close_orphans("study")
    (closed,) = found(root)
    assert (closed.info.status, closed.info.end_time) == ("KILLED", tomorrow)


JUMPS = """
import sys, time
day = 86400
known, time.time = time.time, lambda: known() + day
sys.path.insert(0, {tests!r})
from test_tracking import HISTORY, identity
from ablation_lab.tracking import live
with live.cell_run(identity()) as run:
    run.epoch(HISTORY[0])
    time.time = lambda: known() - day
    run.epoch(HISTORY[1])
"""


def test_a_clock_that_is_put_back_in_mid_training_moves_no_times_of_its_run(root, monkeypatch):
    passed(run(ROOT, "python", "-c", JUMPS.format(tests=str(ROOT / "tests")), DVC_ROOT=str(root)))
    (logged,) = found(root)
    assert (logged.info.status, logged.data.metrics["loss"]) == ("FINISHED", 1.0)
    client = MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db")
    times = [one.timestamp for one in client.get_metric_history(logged.info.run_id, "loss")]
    assert [logged.info.start_time, *times, logged.info.end_time] == sorted(
        [logged.info.start_time, *times, logged.info.end_time]
    )
    assert 0 <= logged.info.end_time - logged.info.start_time < 60_000


def _train(seed: int) -> None:
    with live.cell_run(identity(seed)) as run:
        for row in HISTORY:
            run.epoch(row)


def test_several_processes_may_open_a_store_that_is_not_there_yet(root, monkeypatch):
    monkeypatch.setattr(live, "PATIENCE", 60)
    with ThreadPool(4) as pool:  # each training has its own process that logs
        pool.map(_train, range(4), chunksize=1)
    assert sorted(run.info.run_name for run in found(root)) == [f"variant-{seed}" for seed in range(4)]
    assert {run.info.status for run in found(root)} == {"FINISHED"}
    with closing(sqlite3.connect(root / "mlruns/mlflow.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


AFTERWARDS = """
import sys
from pathlib import Path
from ablation_lab.tracking import store
client, run_id = store.connect(), sys.argv[1]
print(Path(client.download_artifacts(run_id, "note.txt")).read_text())
client.log_artifact(run_id, "more.txt")
"""


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_store_that_was_moved_finds_its_artifacts(tmp_path, monkeypatch, how):
    old, new = tmp_path / "a folder", tmp_path / "another"
    old.mkdir()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(old))
    run_id = begin(0, os.getpid())
    (tmp_path / "note.txt").write_text("here")
    store.connect().log_artifact(run_id, str(tmp_path / "note.txt"))
    shutil.move(old, new) if how == "moved" else shutil.copytree(old, new)
    (tmp_path / "more.txt").write_text("there")
    assert passed(run(tmp_path, "python", "-c", AFTERWARDS, run_id, DVC_ROOT=str(new))) == "here\n"
    assert {path.name for path in new.rglob("*.txt")} == {"note.txt", "more.txt"}
    assert {path.name for path in old.rglob("*.txt")} == (set() if how == "moved" else {"note.txt"})


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://TOKEN@host/path", "https://***@host/path"),
        ("https://TOKEN:@host", "https://***@host"),
        ("http://user:secret@host:5000", "http://user:***@host:5000"),
        ("postgresql://user@host/db", "postgresql://user@host/db"),
        ("postgresql://user:se@cret@host/db", "postgresql://user:***@host/db"),
        ("postgresql://h/db?user=u&password=x&sslmode=on", "postgresql://h/db?user=u&password=***&sslmode=on"),
        ("mysql://h/db?sslpassword=x more", "mysql://h/db?sslpassword=*** more"),
        ("http://host:5000/a@b?user=c", "http://host:5000/a@b?user=c"),
    ],
)
def test_a_message_has_no_password_of_an_address(address, shown):
    assert store.masked(f"at {address}") == f"at {shown}"
