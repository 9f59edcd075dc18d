"""Cells side by side on real Ray clusters: one of the call's own, and two nodes on this machine.

All commands run as in a user's shell: with a home of their own, and an environment that is built from nothing.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, TINY, agree, environment, new_project, passed, run, write_params
from namespaces import hidden
from test_killed import content, states
from test_parallel import phases
from test_team import KEYS, free_port, listens, programs, served, until

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


def bare(home: Path) -> dict[str, str]:
    """The environment of a user's shell on a machine that has the packages, and not the project."""
    home.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    return {"HOME": str(home), "PATH": path, "LANG": "C.UTF-8"}


def processes(home: Path) -> dict[int, str]:
    """The processes that run with a home: their commands by number."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if f"HOME={home}".encode() in (place / "environ").read_bytes().split(b"\0"):
                command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command:  # not a zombie
                    found[int(place.name)] = command
    return found


class Cluster:
    """Nodes of a Ray cluster on this machine, each with a home, so a token and a work folder, of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = free_port()
        here = ray.util.get_node_ip_address()
        self.here, self.address = here, f"{here}:{self.port}"
        self.raylets: dict[str, int] = {}
        self.homes: dict[str, Path] = {}

    def start(self, name: str, *before: str, head: bool = False, cores: int = 1) -> None:
        command = (
            documented("ray start --head", **{"--port=6379": f"--port={self.port}", "10.0.0.1": self.here})
            if head
            else documented("ray start --address=", **{"10.0.0.1:6379": self.address})
        )
        home = self.homes[name] = self.folder / name
        (mode,) = documented("export RAY_AUTH_MODE")[1:]
        clean = bare(home) | dict([mode.split("=")])
        if head:
            make_token(home)
        else:  # as `scp -p` does
            (home / ".ray").mkdir(mode=0o700)
            shutil.copy2(self.token, home / ".ray" / "auth_token")
        # None of its processes may hold this one's pipes.
        with (self.folder / f"{name}.log").open("w") as log:
            start = [*before, *command, f"--num-cpus={cores}"]
            done = subprocess.run(start, env=clean, stdout=log, stderr=log, check=False, timeout=180)
        assert done.returncode == 0, self.log(name)
        (self.raylets[name],) = (number for number, told in processes(home).items() if "raylet/raylet " in told)

    @property
    def head(self) -> Path:
        """The head's home, which is also that of the user there."""
        return next(iter(self.homes.values()))

    @property
    def token(self) -> Path:
        return self.head / ".ray" / "auth_token"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def kill(self, name: str) -> None:
        os.kill(self.raylets.pop(name), signal.SIGKILL)

    def end(self) -> None:
        for home in self.homes.values():
            for number in processes(home):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)

    def work_folders(self, name: str) -> list[Path]:
        return list((self.homes[name] / ".cache" / "ablation-lab" / "nodes").glob("*/*/"))


def make_token(home: Path) -> None:
    """Make the token by the command of docs/parallel.md."""
    command = " ".join(documented("(umask 077"))
    done = subprocess.run(["bash", "-c", command], env=bare(home), capture_output=True, text=True, check=False)
    passed(done)
    assert done.stdout == ""  # a terminal keeps what it shows


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        made.end()


def call(project: Path, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`ablab repro --engine ray` in a bare shell, with the home of a user."""
    command = ["ablab", "repro", "--engine", "ray", *arguments]
    clean = environment(project) | {"HOME": str(home)} | more
    return subprocess.run(command, cwd=project, env=clean, capture_output=True, text=True, check=False, timeout=900)


def started(project: Path, home: Path, told: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The same, going on beside the test, in a process group of its own."""
    command = ["ablab", "repro", "--engine", "ray", *arguments]
    clean = environment(project) | {"HOME": str(home)}
    with told.open("w") as out:
        return subprocess.Popen(command, cwd=project, env=clean, stderr=out, stdout=out, start_new_session=True)


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


NETWORK = """
import os
from keras import Model, layers

def build(image_shape, classes):
    if os.environ.get("DVC_STAGE", "").startswith("train@"):
        print("a network of the user's", flush=True)
        FAIL
    inputs = layers.Input(image_shape)
    return Model(inputs, layers.Dense(classes, activation="softmax")(layers.Flatten()(inputs)))
"""


def broken(project: Path, fail: str) -> None:
    """A study whose only cell fails while it is trained, and not while it is planned."""
    (project / "networks" / "broken.py").write_text(NETWORK.replace("FAIL", fail))
    study = {**TINY, "seeds": [0], "variants": {"baseline": {}}}
    write_params(project, study | {"model": {"builder": "networks.broken:build"}})


def test_it_starts_in_a_bare_shell_ends_its_processes_and_brings_the_log_of_a_failed_cell(
    project: Path, tmp_path: Path
):
    broken(project, 'raise ArithmeticError("this is the end")')
    home = tmp_path / "home"
    done = call(project, home)
    left = processes(home)
    assert done.returncode == 1 and "--address" not in done.stderr, done.stderr
    assert "baseline-0: failed: " in done.stderr and "this is the end" in done.stderr
    log = project / "resume" / "baseline-0.log"
    assert f"Its log: {log}" in done.stderr
    assert all(one in log.read_text() for one in ("a network of the user's", "Traceback", "ArithmeticError"))
    assert left == {}
    assert not (home / ".ray").exists()
    assert not list(home.glob(".cache/ablation-lab/nodes/*"))


def test_a_cluster_that_cannot_start_is_told_without_an_address(project: Path, tmp_path: Path):
    long = tmp_path / ("x" * 100)  # too long for the sockets that Ray makes there
    long.mkdir()
    done = call(project, tmp_path / "home", RAY_TMPDIR=str(long))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "--engine ray: Expected Ray to start on this machine. Found: " in done.stderr
    assert "path length cannot exceed" in done.stderr and str(long / "ray") in done.stderr
    assert "--address" not in done.stderr
    assert processes(tmp_path / "home") == {}


def test_a_missing_token_is_told_with_its_file(project: Path, tmp_path: Path):
    home = tmp_path / "home"
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = call(project, home, "--address", f"127.0.0.1:{server.getsockname()[1]}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "--address: Expected the token of the cluster at 127.0.0.1:" in done.stderr
    assert f"Found: none in {home}/.ray/auth_token, and no variable RAY_AUTH_TOKEN." in done.stderr
    assert "`scp -p 127.0.0.1:.ray/auth_token ~/.ray/`, mode 600" in done.stderr


def test_the_documented_token_is_for_its_user_alone(tmp_path: Path):
    make_token(tmp_path)
    file = tmp_path / ".ray" / "auth_token"
    assert len(file.read_text()) == 64
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_documented_clusters_have_telemetry_off():
    commands = re.findall(r"^ *\$ (ray start .+)$", DOCS, re.MULTILINE)
    assert len(commands) == 2 and all("--disable-usage-stats" in one for one in commands)


@pytest.mark.slow
def test_a_refused_token_is_told_with_where_it_is(project: Path, tmp_path: Path, cluster: Cluster):
    cluster.start("one", head=True)
    assert "Usage stats collection is disabled" in cluster.log("one")
    home = tmp_path / "home"
    file = home / ".ray" / "auth_token"
    file.parent.mkdir(parents=True)
    file.write_text(secrets.token_hex(32))
    file.chmod(0o644)
    done = call(project, home, "--address", cluster.address)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"warning: {file}: Expected mode 600" in done.stderr and "Found: 644" in done.stderr
    assert f"--address: Expected the token of the cluster at {cluster.address}. " in done.stderr
    assert f"Found: another token in {file}." in done.stderr
    assert "Expected the address of" not in done.stderr
    done = call(project, cluster.head, "--address", cluster.address, RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert "Found: another token in the variable RAY_AUTH_TOKEN." in done.stderr and "mode 600," not in done.stderr
    done = call(project, cluster.head, "--address", cluster.address, RAY_AUTH_MODE="disabled")
    assert "Found: none, since RAY_AUTH_MODE is disabled." in done.stderr


def test_no_cluster_at_an_address_is_told(project: Path, tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        done = call(project, tmp_path / "home", "--address", address)
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
    home = tmp_path / "home"
    make_token(home)  # of other clusters of the user's
    token = (home / ".ray" / "auth_token").read_bytes()
    done = call(project, home)
    assert processes(home) == {}
    passed(done)
    assert "2 cells, 2 at a time" in done.stderr
    same(project, reference(tmp_path, phases()))
    assert "Data and pipelines are up to date." in passed(run(project, "dvc", "repro"))
    assert (home / ".ray" / "auth_token").read_bytes() == token


@pytest.mark.slow
def test_the_log_of_a_cell_whose_process_is_lost_comes_too(project: Path, tmp_path: Path):
    broken(project, "os.abort()")
    done = call(project, tmp_path / "home")
    assert done.returncode == 1 and "lost with its process or node, 4 times" in done.stderr, done.stderr
    log = project / "resume" / "baseline-0.log"
    assert f"Its log: {log}" in done.stderr
    assert log.read_text().count("a network of the user's") == 4
    assert processes(tmp_path / "home") == {}


@pytest.mark.slow
def test_two_nodes_make_the_same_bytes_as_one(project: Path, tmp_path: Path, cluster: Cluster):
    share_the_cache(project, tmp_path / "dvc-cache")
    write_params(project, phases())
    study = phases() | {"seeds": [0, 1]}
    write_params(project, study)
    cluster.start("one", head=True)
    cluster.start("two")
    command = documented("ablab repro --engine ray --address", **{"10.0.0.1:6379": cluster.address})
    passed(call(project, cluster.head, *command[4:]))
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
    process = started(project, cluster.head, tmp_path / "told", "--address", cluster.address)
    shared = next_folder(tmp_path / "dvc-cache" / node.SHARED)
    deadline = time.monotonic() + 240
    while len(states(shared)) < 2 or min(states(shared).values()) < 20:
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "told").read_text()
        time.sleep(0.1)
    cluster.kill("two")
    assert process.wait(600) == 0, (tmp_path / "told").read_text()
    logs = "".join(path.read_text() for path in (shared / "resume").glob("*.log"))
    assert re.search(r"goes on after epoch \d\d+", logs)
    same(project, reference(tmp_path, study))


def next_folder(parent: Path) -> Path:
    deadline = time.monotonic() + 240
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
    done = call(project, cluster.head, "--address", cluster.address)
    assert "baseline" not in str(re.findall(r"Running stage 'train@.+'", passed(done)))  # it came from the remote
    (folder,) = cluster.work_folders("one")
    assert (folder / ".dvc" / "cache" / "files").is_dir()
    same(project, reference(tmp_path, phases()))


@pytest.mark.slow
def test_keys_of_a_remote_come_from_the_head_s_local_settings(project: Path, tmp_path: Path, cluster: Cluster):
    rclone, port = programs("rclone")["rclone"], free_port()
    (tmp_path / "objects" / "dvc").mkdir(parents=True)
    serve = [rclone, "serve", "s3", str(tmp_path / "objects"), "--addr", f"127.0.0.1:{port}"]
    serve += ["--auth-key", f"{KEYS['AWS_ACCESS_KEY_ID']},{KEYS['AWS_SECRET_ACCESS_KEY']}"]
    write_params(project, phases())
    passed(run(project, *documented("dvc remote add --default", **{"s3://bucket/dvc": "s3://dvc/ablation-lab"})))
    passed(run(project, "dvc", "remote", "modify", "--local", "storage", "endpointurl", f"http://127.0.0.1:{port}"))
    cluster.start("one", *hidden(project), head=True, cores=2)
    with served(serve, tmp_path / "rclone.log", {}):
        until(lambda: listens(port), "rclone")
        done = call(project, cluster.head, "--address", cluster.address, **KEYS)  # in the head's shell alone
        assert done.returncode == 1, done.stderr
        assert "Unable to locate credentials" in done.stderr
        assert "The keys of the remote storage belong in the environment of `ray start` on each node" in done.stderr
        assert "`dvc remote modify --local storage …`" in done.stderr
        for name in ("baseline-0", "no_dropout-0"):
            log = project / "resume" / f"{name}.log"
            assert f"Its log: {log}" in done.stderr and "Unable to locate credentials" in log.read_text()
        wrong = documented("dvc remote modify --local storage access_key_id", KEY="another")
        passed(run(project, *wrong))
        passed(run(project, *documented("dvc remote modify --local storage secret_access_key", SECRET="key")))
        done = call(project, cluster.head, "--address", cluster.address)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        passed(run(project, "dvc", "remote", "modify", "--local", "storage", "access_key_id", "user"))
        passed(run(project, "dvc", "remote", "modify", "--local", "storage", "secret_access_key", "secret"))
        done = call(project, cluster.head, "--address", cluster.address)
        assert "baseline" not in str(re.findall(r"Running stage 'train@.+'", passed(done)))
    (folder,) = cluster.work_folders("one")
    assert (folder / ".dvc" / "config").stat().st_mode & 0o777 == 0o600
    assert "secret" in (folder / ".dvc" / "config").read_text()


@pytest.mark.slow
def test_ctrl_c_ends_the_cells_on_all_nodes(project: Path, tmp_path: Path):
    study = {**TINY, "train": TINY["train"] | {"epochs": 2000}}
    write_params(project, study)
    home, told = tmp_path / "home", tmp_path / "told"
    process = started(project, home, told, "-j", "2")
    shared = next_folder(project / ".dvc" / "cache" / node.SHARED)
    deadline = time.monotonic() + 240
    while len(states(shared)) < 2:
        assert time.monotonic() < deadline and process.poll() is None, told.read_text()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert processes(home) == {}
    text = told.read_text()
    assert "interrupted: what was finished is kept" in text and "Traceback" not in text
    write_params(project, TINY)
    passed(call(project, home))
    agree(project)


@pytest.mark.slow
@pytest.mark.parametrize("begun", ["gcs_server", "raylet/raylet", "-m dvc"])
def test_ctrl_c_while_it_starts_leaves_no_process(project: Path, tmp_path: Path, begun: str):
    home, told = tmp_path / "home", tmp_path / "told"
    process = started(project, home, told)
    deadline = time.monotonic() + 240
    while not any(begun in command for command in processes(home).values()):
        assert time.monotonic() < deadline and process.poll() is None, told.read_text()
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    assert processes(home) == {}


def test_what_no_node_has_room_for_is_told(monkeypatch):
    there = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"CPU": 16.0, "GPU": 2.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: there)
    assert cluster_module._too_large({"CPU": 4}) == ""
    assert "Expected a node with 8 CPU. Found: at most 4 CPU." in cluster_module._too_large({"CPU": 8})
    assert "Found: at most 4 CPU, 0 GPU." in cluster_module._too_large({"CPU": 1, "GPU": 1})
