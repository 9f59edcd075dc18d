"""Cells side by side on real Ray clusters: one of the call's own, and two nodes on this machine."""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TINY, agree, environment, new_project, passed, run, write_params
from namespaces import hidden
from test_killed import content, states
from test_parallel import phases

from ablation_lab import cluster as cluster_module
from ablation_lab import node

ray = pytest.importorskip("ray")
DOCS = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")


def documented(command: str, **values: str) -> list[str]:
    """A command as docs/parallel.md has it, with values of this machine in place of its examples."""
    lines = re.findall(r"^ *\$ (.+?)(?: +#.*)?$", DOCS, re.MULTILINE)
    (line,) = {found for found in lines if found.startswith(command)}
    for example, value in values.items():
        assert example in line
        line = line.replace(example, value)
    return line.split()


class Cluster:
    """Nodes of a Ray cluster on this machine, each with a cache folder, so a work folder, of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("", 0))
            self.port = probe.getsockname()[1]
        here = ray.util.get_node_ip_address()
        self.here, self.address = here, f"{here}:{self.port}"
        self.raylets: dict[str, int] = {}

    def start(self, name: str, *before: str, head: bool = False, cores: int = 1) -> None:
        command = (
            documented("ray start --head", **{"--port=6379": f"--port={self.port}", "10.0.0.1": self.here})
            if head
            else documented("ray start --address=", **{"10.0.0.1:6379": self.address})
        )
        there = self._raylets()
        with_cores = [*before, *command, f"--num-cpus={cores}", "--disable-usage-stats"]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_", "ABLAB_"))}
        clean |= {"ABLAB_CACHE": str(self.folder / name), "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}"}
        # None of its processes may hold this one's pipes.
        with (self.folder / f"{name}.log").open("w") as log:
            done = subprocess.run(with_cores, env=clean, stdout=log, stderr=log, check=False, timeout=120)
        assert done.returncode == 0, (self.folder / f"{name}.log").read_text()
        (self.raylets[name],) = self._raylets() - there

    def kill(self, name: str) -> None:
        os.kill(self.raylets.pop(name), signal.SIGKILL)

    def work_folders(self, name: str) -> list[Path]:
        return list((self.folder / name / "nodes").glob("*/*/"))

    def _raylets(self) -> set[int]:
        found = subprocess.run(
            ["pgrep", "-f", f"raylet/raylet .*{self.port}"], capture_output=True, text=True, check=False
        )
        return {int(one) for one in found.stdout.split()}


@pytest.fixture(autouse=True)
def token(monkeypatch):
    """What Ray lets a client in by, and else keeps in the user's home."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        for name in list(made.raylets):
            made.kill(name)
        subprocess.run(["pkill", "-9", "-f", f"gcs_server.*{made.port}"], check=False)


def call(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(project, "ablab", "repro", "--engine", "ray", *arguments)


def reference(folder: Path, study: dict) -> dict[str, bytes]:
    """What `dvc repro` alone makes of a study."""
    project = new_project(folder / "reference" / "project")
    write_params(project, study)
    passed(run(project, "dvc", "repro"))
    return content(project)


def same(project: Path, wanted: dict[str, bytes]) -> None:
    made = content(project)
    assert [name for name in made.keys() | wanted.keys() if made.get(name) != wanted.get(name)] == []
    agree(project)


def share_the_cache(project: Path, folder: Path) -> None:
    command = documented("dvc cache dir --local", **{"/shared/dvc-cache": str(folder)})
    passed(run(project, *command))


def test_no_cluster_at_an_address_is_told(project: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        done = call(project, "--address", address)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "--address: Expected the address of a running Ray cluster" in done.stderr and address in done.stderr
    assert not (project / "data").exists()


def test_a_node_that_sees_no_cache_and_no_remote_says_so(tmp_path):
    sent = {"cache": str(tmp_path), "project": "one", "proof": "seen-1", "config": {"core": {}}}
    with pytest.raises(node.Refused, match=r"Expected DVC's cache of the head here.+`dvc cache dir --local /shared"):
        node._is_shared(sent)
    assert not node._is_shared(sent | {"config": {"core": {"remote": "origin"}}})
    proof = tmp_path / node.SHARED / "one" / "seen-2"  # another call's
    proof.parent.mkdir(parents=True)
    proof.touch()
    with pytest.raises(node.Refused):
        node._is_shared(sent)
    proof.with_name("seen-1").touch()
    assert node._is_shared(sent)


@pytest.mark.slow
def test_a_cluster_of_the_calls_own_makes_what_dvc_makes(project: Path, tmp_path: Path):
    write_params(project, phases())
    done = call(project)
    passed(done)
    assert "2 cells, 2 at a time" in done.stderr
    same(project, reference(tmp_path, phases()))
    assert "Data and pipelines are up to date." in passed(run(project, "dvc", "repro"))


@pytest.mark.slow
def test_two_nodes_make_the_same_bytes_as_one(project: Path, tmp_path: Path, cluster: Cluster):
    share_the_cache(project, tmp_path / "dvc-cache")
    write_params(project, phases())
    study = phases() | {"seeds": [0, 1]}
    write_params(project, study)
    cluster.start("one", head=True)
    cluster.start("two")
    command = documented("ablab repro --engine ray --address", **{"10.0.0.1:6379": cluster.address})
    passed(run(project, *command))
    for name in ("one", "two"):  # both have worked
        (folder,) = cluster.work_folders(name)
        assert list(folder.glob("cells/*/seed-?/cell.json"))
    same(project, reference(tmp_path, study))


@pytest.mark.slow
def test_the_cells_of_a_lost_node_go_on_at_another(project: Path, tmp_path: Path, cluster: Cluster):
    study = phases()
    study["train"]["epochs"] = 300
    share_the_cache(project, tmp_path / "dvc-cache")
    write_params(project, study)
    cluster.start("one", head=True)
    cluster.start("two")
    command = ["ablab", "repro", "--engine", "ray", "--address", cluster.address]
    with (tmp_path / "told").open("w") as told:
        process = subprocess.Popen(command, cwd=project, env=environment(project), stderr=told, stdout=told)
        shared = next_folder(tmp_path / "dvc-cache" / node.SHARED)
        deadline = time.monotonic() + 120
        while len(states(shared)) < 2 or min(states(shared).values()) < 20:
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "told").read_text()
            time.sleep(0.1)
        cluster.kill("two")
        assert process.wait(300) == 0, (tmp_path / "told").read_text()
    logs = "".join(path.read_text() for path in (shared / "resume").glob("*.log"))
    assert re.search(r"goes on after epoch \d\d+", logs)
    same(project, reference(tmp_path, study))


def next_folder(parent: Path) -> Path:
    deadline = time.monotonic() + 120
    while not list(parent.glob("*/")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (found,) = parent.glob("*/")
    return found


@pytest.mark.slow
def test_a_remote_does_where_no_folder_is_shared(project: Path, tmp_path: Path, cluster: Cluster):
    write_params(project, phases())
    passed(run(project, *documented("dvc remote add --default", **{"s3://bucket/dvc": str(tmp_path / "remote")})))
    cluster.start("one", *hidden(project), head=True, cores=2)
    done = call(project, "--address", cluster.address)
    assert "baseline" not in str(re.findall(r"Running stage 'train@.+'", passed(done)))  # it came from the remote
    (folder,) = cluster.work_folders("one")
    assert (folder / ".dvc" / "cache" / "files").is_dir()
    same(project, reference(tmp_path, phases()))


@pytest.mark.slow
def test_ctrl_c_ends_the_cells_on_all_nodes(project: Path, tmp_path: Path):
    study = {**TINY, "train": TINY["train"] | {"epochs": 2000}}
    write_params(project, study)
    command = ["ablab", "repro", "--engine", "ray", "-j", "2"]
    with (tmp_path / "told").open("w") as told:
        process = subprocess.Popen(
            command, cwd=project, env=environment(project), stderr=told, stdout=told, start_new_session=True
        )
        shared = next_folder(project / ".dvc" / "cache" / node.SHARED)
        deadline = time.monotonic() + 120
        while len(states(shared)) < 2:
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "told").read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    text = (tmp_path / "told").read_text()
    assert "interrupted: what was finished is kept" in text and "Traceback" not in text
    time.sleep(2)
    before = states(shared)
    time.sleep(3)
    assert states(shared) == before  # nobody trains
    write_params(project, TINY)
    passed(call(project))
    agree(project)


def test_what_no_node_has_room_for_is_told(monkeypatch):
    there = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"CPU": 16.0, "GPU": 2.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: there)
    assert cluster_module._too_large({"CPU": 4}) == ""
    assert "Expected a node with 8 CPU. Found: at most 4 CPU." in cluster_module._too_large({"CPU": 8})
    assert "Found: at most 4 CPU, 0 GPU." in cluster_module._too_large({"CPU": 1, "GPU": 1})
