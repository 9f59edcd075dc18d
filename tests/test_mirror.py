"""MLflow made to agree with the files, on cells that were trained for real."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
import urllib.request
from contextlib import closing
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import mlflow
import numpy as np
import one_thread  # noqa: F401
import pytest
from conftest import TINY, agree, client_of, environment, in_mlflow, passed, run, write_params
from mlflow.tracking import MlflowClient
from namespaces import full_disk, read_only
from PIL import Image

from ablation_lab import files, params, prediction
from ablation_lab.errors import LabError
from ablation_lab.tracking import mirror, runs, served, store

SCORED = Path("evaluation/cells.json")


@pytest.fixture
def project(trained_project: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of it to work in."""
    folder = tmp_path / "project"
    shutil.copytree(trained_project, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # These tests remove databases that this process has opened, and MLflow would keep its connections to them. Each
    # command of the product is a process of its own.
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    return folder


def test_live_runs_are_completed_and_a_second_time_changes_nothing(project: Path):
    before = in_mlflow(project)
    receipt = mirror.sync()
    agree(project)
    after = in_mlflow(project)
    assert {name: run.data.tags["ablab.cell_hash"] for name, run in after.items()} == receipt
    assert {run.info.run_id for run in before.values()} == {run.info.run_id for run in after.values()}  # none made anew
    state = {run.info.run_id: run.to_dictionary() for run in after.values()}
    assert mirror.sync() == receipt
    assert {run.info.run_id: run.to_dictionary() for run in in_mlflow(project).values()} == state
    versions = client_of(project).search_model_versions("name = 'tiny'")
    assert len(versions) == 1


def test_the_receipt_is_the_same_in_every_store_and_says_where_the_runs_are(project: Path):
    first = mirror.sync()
    assert mirror.told(first) == "4 cells in MLflow: `ablab ui` shows them"
    shutil.rmtree(project / "mlruns")
    write_params(project, TINY | {"study": TINY["study"] | {"quick": True}})
    output = passed(run(project, "python", "-m", "stages.track"))
    assert f"4 cells in MLflow: `cd {project.name} && ablab ui` shows them" in output
    hashes = {f"{one['variant']}-{one['seed']}": one["cell_hash"] for one in files.read_json(SCORED)}
    assert files.read_json(project / "mlruns/receipt.json") == first == hashes


def test_a_run_says_whether_its_training_diverged(project: Path):
    mirror.sync()
    before = in_mlflow(project)
    assert {one.data.tags["ablab.status"] for one in before.values()} == {"ok"}
    client = client_of(project)
    for one in before.values():  # as an older version has left them
        client.delete_tag(one.info.run_id, "ablab.status")
        client.set_tag(one.info.run_id, mirror.SYNCED, "of an older version")
    scored = files.read_json(SCORED)
    scored[0] |= {"status": "diverged", "test": None, "validation": None}
    files.write_json(SCORED, scored)
    mirror.sync()
    after = in_mlflow(project)
    assert {name: one.info.run_id for name, one in after.items()} == {
        name: one.info.run_id for name, one in before.items()
    }
    experiment = client.get_experiment_by_name("tiny").experiment_id
    for status, names in {"diverged": {"baseline-0"}, "ok": set(after) - {"baseline-0"}}.items():
        found = client.search_runs([experiment], f"tags.ablab.status = '{status}'")
        assert {one.info.run_name for one in found} == names


def test_a_store_that_is_gone_is_made_from_the_files(project: Path):
    mirror.sync()
    live = in_mlflow(project)
    shutil.rmtree(project / "mlruns")
    mirror.sync()
    agree(project)
    rebuilt = in_mlflow(project)
    for name, one in rebuilt.items():
        assert one.data.params == live[name].data.params
        logged = {key: value for key, value in live[name].data.metrics.items() if not key.startswith("system/")}
        assert one.data.metrics == logged
        assert one.data.tags["ablab.from"] == "files"
        assert [data.dataset.digest for data in one.inputs.dataset_inputs] == [
            data.dataset.digest for data in live[name].inputs.dataset_inputs
        ]
        assert one.info.end_time - one.info.start_time == pytest.approx(
            1000 * json.loads((project / one.data.tags["dvc.path"] / "timing.json").read_text())["total_seconds"], abs=2
        )


def test_what_contradicts_the_files_or_is_there_twice_goes_to_the_trash(project: Path):
    mirror.sync()
    client, experiment = client_of(project), client_of(project).get_experiment_by_name("tiny").experiment_id
    kept = in_mlflow(project)
    one = next(mirror.records(params.load(project / "params.yaml"), project)).identity
    for value in (0.123, None):
        again = client.create_run(experiment, tags=runs.tagged(one, "train@x")).info.run_id
        runs.log(client, again, runs.metrics({"loss": value}, 1, 0))
        client.set_terminated(again)
    mirror.sync()
    agree(project)
    assert {run.info.run_id for run in in_mlflow(project).values()} == {run.info.run_id for run in kept.values()}
    client.set_tag(kept[one.name].info.run_id, mirror.SYNCED, "of other files")
    client.log_metric(kept[one.name].info.run_id, "loss", 9.0, step=1)
    mirror.sync()
    agree(project)
    assert in_mlflow(project)[one.name].info.run_id != kept[one.name].info.run_id


def test_what_the_store_missed_of_a_training_is_added(project: Path):
    client = client_of(project)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    record = next(mirror.records(params.load(project / "params.yaml"), project))
    for one in runs.search(client, experiment):
        if one.info.run_name == record.identity.name:
            client.delete_run(one.info.run_id)
    one = record.identity
    half = client.create_run(experiment, tags=runs.tagged(one, "train@baseline-0")).info.run_id
    runs.describe(client, half, one.plan, one.card)
    runs.log(client, half, runs.epoch(record.history[0], 0))
    client.set_terminated(half)
    mirror.sync()
    found = [run_ for run_ in in_mlflow(project).values() if run_.data.tags["ablab.cell_hash"] == one.cell_hash]
    assert [run_.info.run_id for run_ in found] == [half]
    agree(project)


def test_a_parent_run_has_the_means_and_spreads(project: Path):
    mirror.sync()
    client = client_of(project)
    found = runs.search(client, client.get_experiment_by_name("tiny").experiment_id)
    parents = {run.info.run_name: run for run in found if run.data.tags["ablab.level"] == "variant"}
    assert set(parents) == {"baseline", "no_dropout"}
    results = json.loads((project / "reports/results.json").read_text())["variants"]
    for name, parent in parents.items():
        assert parent.data.metrics["test_accuracy"] == pytest.approx(results[name]["test_accuracy"]["mean"])
        assert parent.data.metrics["test_accuracy_std"] == pytest.approx(results[name]["test_accuracy"]["std"])
        assert parent.data.metrics["macs"] == results[name]["macs"]
        assert [one.step for one in client.get_metric_history(parent.info.run_id, "val_accuracy")] == [1, 2]
        for seed in (0, 1):
            child = in_mlflow(project)[f"{name}-{seed}"]
            assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert "model.dropout" in parents["no_dropout"].data.tags["mlflow.note.content"]
    assert "A tiny study" in client.get_experiment_by_name("tiny").tags["mlflow.note.content"]


def test_figures_are_artifacts(project: Path):
    passed(run(project, "ablab", "sync"))  # MLflow remembers, for a process, where a run's artifacts are
    for logged in in_mlflow(project).values():
        folder = Path(logged.info.artifact_uri.removeprefix("file://")) / "figures"
        assert {path.name for path in folder.iterdir()} == {"curves.png", "confusion_matrix.png"}
        for path in folder.iterdir():
            with Image.open(path) as picture:
                assert picture.width > 600 and len(set(picture.convert("L").tobytes())) > 20  # something is drawn


def test_the_champion_is_the_best_on_validation_and_predicts_as_the_report_says(project: Path):
    mirror.sync()
    results = json.loads((project / "reports/results.json").read_text())["variants"]
    means = {
        name: np.mean([cell["validation_accuracy"] for cell in one["cells"].values()]) for name, one in results.items()
    }
    best = max(means, key=lambda name: means[name])
    model, about = served.load("models:/tiny@champion")
    assert about["variant"] == best
    assert about["classes"] == [str(digit) for digit in range(10)]
    pictures = np.load("data/processed/images.npy")[np.load("data/processed/test.npy")]
    with np.load(f"cells/{best}/seed-{about['seed']}/predictions.npz") as file:
        np.testing.assert_allclose(model.predict(pictures), file["test_probabilities"], atol=1e-6)
    with pytest.raises(Exception, match=r"schema|type|uint8"):
        model.predict(pictures.astype(np.float32))
    with store.as_mlflows_own():
        network = mlflow.keras.load_model("models:/tiny@champion")
    np.testing.assert_allclose(network.predict(pictures, verbose=0), model.predict(pictures), atol=1e-6)
    Image.fromarray(pictures[0, :, :, 0]).save("one.png")
    (through,) = prediction.predict("models:/tiny@champion", None, [Path("one.png")], project)
    (direct,) = prediction.predict(best, about["seed"], [Path("one.png")], project)
    assert through == direct
    with pytest.raises(LabError, match=r"models:/tiny@queen: Expected a model in sqlite"):
        served.load("models:/tiny@queen")


@pytest.mark.slow
def test_a_served_champion_answers_with_the_reports_probabilities(project: Path):
    """docs/mlflow.md's command, and a request over HTTP."""
    mirror.sync()
    about = served.load("models:/tiny@champion")[1]
    pictures = np.load("data/processed/images.npy")[np.load("data/processed/test.npy")]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["mlflow", "models", "serve", "--model-uri", "models:/tiny@champion", "--env-manager", "local"]
    server = subprocess.Popen(
        [*command, "--port", str(port)],
        env=environment(project) | {"MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlruns/mlflow.db"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.3)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": pictures.tolist()}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            probabilities = json.load(answer)["predictions"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    with np.load(f"cells/{about['variant']}/seed-{about['seed']}/predictions.npz") as file:
        np.testing.assert_allclose(probabilities, file["test_probabilities"], atol=1e-6)


def test_another_choice_makes_another_champion_and_the_older_one_stays(project: Path):
    mirror.sync()
    client = client_of(project)
    first = client.get_model_version_by_alias("tiny", "champion")
    loser = ({"baseline", "no_dropout"} - {first.tags["ablab.variant"]}).pop()
    for seed in (0, 1):
        path = project / f"cells/{loser}/seed-{seed}/cell.json"
        cell = json.loads(path.read_text())
        path.write_text(json.dumps(cell | {"validation_accuracy": 1.0}))
    mirror.sync()
    assert in_mlflow(project)[f"{loser}-0"].data.metrics["validation_accuracy"] == 1.0  # the latest counts
    second = client.get_model_version_by_alias("tiny", "champion")
    assert (second.tags["ablab.variant"], int(second.version)) == (loser, 2)
    assert len(client.search_model_versions("name = 'tiny'")) == 2


class Candidates:
    """Cells of a project as candidates for the champion of its store, with scores and data of a test's choice."""

    def __init__(self, project: Path):
        mirror.sync()
        self.client, self.runs = client_of(project), in_mlflow(project)
        self.identities = {
            one.identity.name: one.identity for one in mirror.records(params.load(project / "params.yaml"), project)
        }

    def propose(self, name: str, score: float, data: str = "first") -> None:
        one = self.identities[name]
        one = replace(one, study="league", card=one.card | {"digest": data})
        run = self.runs[name]
        served.crown(self.client, one, run.data.tags[mirror.MODEL], run.info.run_id, score)

    def champion(self) -> tuple[str, float]:
        tags = self.client.get_model_version_by_alias("league", "champion").tags
        assert tags["ablab.cell_hash"] == self.identities[f"{tags['ablab.variant']}-{tags['ablab.seed']}"].cell_hash
        return f"{tags['ablab.variant']}-{tags['ablab.seed']}", float(tags["validation_accuracy"])


def test_the_champion_moves_only_to_a_better_score_on_the_same_data(project: Path, capsys):
    league = Candidates(project)
    league.propose("baseline-0", 0.5)
    league.propose("baseline-1", 0.4)  # a worse one, tracked later
    assert league.champion() == ("baseline-0", 0.5)
    league.propose("no_dropout-0", 0.50001)
    assert league.champion() == ("no_dropout-0", 0.50001)
    league.propose("baseline-0", 0.5)  # back to an older state
    league.propose("baseline-1", 0.50001)  # no better
    assert league.champion() == ("no_dropout-0", 0.50001)
    assert len(league.client.search_model_versions("name = 'league'")) == 2
    assert "champion" not in capsys.readouterr().out

    league.propose("no_dropout-1", 0.9, data="other")  # can't be compared
    assert league.champion() == ("no_dropout-0", 0.50001)
    assert "league's champion, version 2, was trained on other data than this project's" in capsys.readouterr().out
    league.client.delete_registered_model_alias("league", "champion")
    league.propose("no_dropout-1", 0.9, data="other")
    assert league.champion() == ("no_dropout-1", 0.9)
    league.propose("baseline-0", 0.95)  # back to the first data
    assert league.champion() == ("no_dropout-1", 0.9)


def test_of_two_that_crown_a_champion_at_once_the_better_one_stays(project: Path, monkeypatch):
    league = Candidates(project)
    move, moves = league.client.set_registered_model_alias, []

    def overtaken(*arguments):
        if not moves:  # the better one comes between this one's look and its move
            moves.append(arguments)
            league.propose("no_dropout-0", 0.9)
        move(*arguments)

    monkeypatch.setattr(league.client, "set_registered_model_alias", overtaken)
    league.propose("baseline-0", 0.5)
    assert moves and league.champion() == ("no_dropout-0", 0.9)


def test_a_champion_of_an_older_version_without_its_data_gives_way(project: Path):
    league = Candidates(project)
    league.propose("baseline-0", 0.5)
    league.client.delete_model_version_tag("league", "1", served.DATA)
    league.propose("baseline-1", 0.4)
    assert league.champion() == ("baseline-1", 0.4)


def test_a_moved_project_serves_its_models(project: Path, tmp_path: Path, monkeypatch):
    mirror.sync()
    moved = tmp_path / "elsewhere"
    monkeypatch.chdir(tmp_path)
    shutil.move(project, moved)
    monkeypatch.chdir(moved)
    mirror.sync()
    agree(moved)
    model, _ = served.load("models:/tiny@champion")
    assert model.predict(np.load("data/processed/images.npy")[:1]).shape == (1, 10)


def test_cells_that_are_not_there_yet_are_left_out(project: Path):
    shutil.rmtree(project / "cells/no_dropout/seed-1")
    shutil.rmtree(project / "evaluation")
    assert list(mirror.sync()) == ["baseline-0", "baseline-1", "no_dropout-0"]
    assert "test_accuracy" not in in_mlflow(project)["baseline-0"].data.metrics
    assert client_of(project).search_model_versions("name = 'tiny'") == []


KILLED_SYNC = """
import os, signal
from ablation_lab.tracking import mirror, served
calls = []
def log(*arguments):
    calls.append(arguments)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return known(*arguments)
known, served.log = served.log, log
mirror.sync()
"""


def test_a_sync_that_is_killed_is_finished_by_the_next_one(project: Path):
    shutil.rmtree(project / "mlruns")
    assert run(project, "python", "-c", KILLED_SYNC).returncode == -signal.SIGKILL
    client = client_of(project)
    found = runs.search(client, client.get_experiment_by_name("tiny").experiment_id)
    assert sorted(one.info.status for one in found) == ["FINISHED", "RUNNING"]
    mirror.sync()
    agree(project)


def test_a_final_metric_counts_also_after_the_clock_was_put_back(project: Path):
    mirror.sync()
    tomorrow = int(1000 * time.time()) + 86_400_000
    run_id = in_mlflow(project)["baseline-0"].info.run_id
    client_of(project).log_metric(run_id, "test_accuracy", 0.25, tomorrow, 0)
    scores = project / "evaluation/cells.json"
    cells = json.loads(scores.read_text())
    cells[0]["test"]["accuracy"] = 0.5
    scores.write_text(json.dumps(cells))
    mirror.sync()
    assert in_mlflow(project)["baseline-0"].data.metrics["test_accuracy"] == 0.5


def _told(project: Path, message: str) -> None:
    """The store is not made to agree, what the files say is as it was, and afterwards all is well."""
    with pytest.raises(LabError, match=message) as told:
        mirror.sync()
    assert str(told.value).endswith("Call `ablab sync` when it works again. Cells and reports are as they were.")


def test_a_database_that_another_program_holds_is_told(project: Path):
    with closing(sqlite3.connect(project / "mlruns/mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        _told(project, r"mlflow\.db: Expected MLflow's store\. Found: .*database is locked\. Another program writes")
    mirror.sync()
    agree(project)


@pytest.mark.parametrize("place", [0, pytest.param(3 * 4096, marks=pytest.mark.slow)])
def test_a_broken_database_is_told_and_made_again_from_the_files(project: Path, place: int):
    database = project / "mlruns/mlflow.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with database.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 4096 * 60)
    broken = database.read_bytes()
    _told(project, r"(not a database|malformed)\. Put a copy of the file back, or move it away: it is made again from")
    assert database.read_bytes() == broken  # it may be worth a repair
    database.rename(project / "broken.db")
    mirror.sync()
    agree(project)


KILLED_WRITER = """
import os, sqlite3
one = sqlite3.connect("mlruns/mlflow.db")
one.execute("UPDATE tags SET value = 'from the database that was removed'")
one.commit()
os._exit(0)
"""


def test_what_a_killed_process_left_of_a_removed_database_is_not_played_into_the_new_one(project: Path):
    passed(run(project, "python", "-c", KILLED_WRITER))
    assert (project / "mlruns/mlflow.db-wal").stat().st_size > 0
    (project / "mlruns/mlflow.db").unlink()
    mirror.sync()
    agree(project)


def test_a_server_that_is_down_is_told(project: Path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@{address}")
        message = r"Expected MLflow's store\. Found: .*Start the server, or see what MLFLOW_TRACKING_URI"
        with pytest.raises(LabError) as told:
            mirror.sync()
        assert "secret" not in str(told.value)
        _told(project, rf"http://user:\*\*\*@{address}: {message}")
    mirror.sync()
    agree(project)


@pytest.mark.slow
def test_a_server_that_accepts_and_never_answers_is_given_up_after_ten_seconds(project: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with ThreadPool(1) as pool:
            track = pool.apply_async(run, (project, "python", "-m", "stages.track"), {"MLFLOW_TRACKING_URI": address})
            with silent.accept()[0]:
                started = time.monotonic()
                done = track.get(60)
        waited = time.monotonic() - started
    assert done.returncode == 1 and f"error: {address}: Expected MLflow's store. Found: " in done.stderr
    assert "give it longer (MLFLOW_HTTP_REQUEST_TIMEOUT, in seconds). Call `ablab sync`" in done.stderr
    assert "Traceback" not in done.stderr
    assert 9 < waited < 20  # with the end of a process of Python's


@pytest.mark.parametrize("disk", ["full", pytest.param("read-only", marks=pytest.mark.slow)])
def test_a_store_on_a_disk_that_takes_nothing_is_told(project: Path, disk: str):
    store, command = project / "mlruns", ("python", "-m", "stages.track")
    done = run(project, *(full_disk(store, 60, *command) if disk == "full" else read_only(store, *command)))
    assert done.returncode == 1
    message = {
        "full": "database or disk is full. Remove files, or move the project to a larger disk.",
        "read-only": "Make its folder writable (mount options, permissions).",
    }
    assert done.stderr.count("error: sqlite:///") == 1 and message[disk] in done.stderr
    assert "Traceback" not in done.stderr
    assert not (store / "receipt.json").exists()  # so that `dvc repro` calls it again
    mirror.sync()
    agree(project)


CUT_OFF = """
import dataclasses, sys
from pathlib import Path
from ablation_lab import params
from ablation_lab.tracking import live, mirror
live.PATIENCE = 3
record = next(mirror.records(params.load(), Path()))
with live.cell_run(dataclasses.replace(record.identity, made=live.provenance())) as run:
    run.epoch(record.history[0])
    print("trains", flush=True)
    sys.stdin.readline()
    run.epoch(record.history[1])
"""


@pytest.mark.slow
def test_a_server_that_dies_in_mid_training_gets_the_rest_later(project: Path, tmp_path: Path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address, database = f"http://127.0.0.1:{port}", f"sqlite:///{tmp_path}/server.db"
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", str(tmp_path / "artifacts")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    bare = environment(project)
    server = subprocess.Popen(command, env=bare | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, **quiet)
    try:
        client = MlflowClient(address, address)
        _until(lambda: _answers(address))
        training = subprocess.Popen(
            ["python", "-c", CUT_OFF],
            env=bare | {"MLFLOW_TRACKING_URI": address},
            **{key: subprocess.PIPE for key in ("stdin", "stdout", "stderr")},
            text=True,
        )
        assert training.stdout.readline() == "trains\n"
        _until(lambda: (one := client.get_experiment_by_name("tiny")) and runs.search(client, one.experiment_id))
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        started = time.monotonic()
        _, errors = training.communicate("go on\n", timeout=60)
        assert time.monotonic() - started < 10
        assert training.returncode == 0 and "warning: MLflow " in errors
        server = subprocess.Popen(command, env=bare | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, **quiet)
        _until(lambda: _answers(address))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        mirror.sync()
        agree(project, client=client)
        model, _ = served.load("models:/tiny@champion")
        assert model.predict(np.load("data/processed/images.npy")[:1]).shape == (1, 10)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _until(works) -> None:
    deadline = time.monotonic() + 60
    while not works():
        assert time.monotonic() < deadline
        time.sleep(0.3)
