"""What a node of a cluster does: train one cell in a work folder of its own, and hand it over through DVC's cache.

Ray sends this module by value, so that it is the head's whatever a node has installed; the project's own code, which
comes with each cell, is imported once it is there.
"""

import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock

SHARED = "ablation-lab"  # the folder in a shared cache where nodes keep the states of trainings, a project each
VERSIONS = ("ablab.tensorflow", "ablab.keras", "ablab.numpy")
TRIES = 3  # of sending a cell to a remote
LOG = 1_000_000  # bytes of a log's end that the head is given
# What stores say of a key that is missing, wrong or not allowed to do this.
KEYS = re.compile(r"credential|access.?(key|denied)|signature|forbidden|unauthorized|authenticat|\b40[13]\b", re.I)
FORGOTTEN = 30 * 24 * 3600  # seconds after which a work folder that nobody has used goes


class Board:
    """Where nodes tell how far their cells are; it lives on the head."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    def tell(self, name: str, row: dict[str, float]) -> None:
        self.rows[name] = row

    def read(self) -> dict[str, dict[str, float]]:
        told, self.rows = self.rows, {}
        return told


def sees(cache: str, project: str, proof: str) -> bool:
    """Whether the head's cache is this node's too: the head has written a file there."""
    return (Path(cache) / SHARED / project / proof).exists()


def logs(cache: str, project: str, names: list[str]) -> dict[str, tuple[float, bytes]]:
    """How old this node's logs of cells are, in seconds, and how they end."""
    import ray

    found = {}
    here = nodes() / ray.get_runtime_context().get_node_id() / project
    for name in names:
        for folder in (Path(cache) / SHARED / project, here):
            log = folder / "resume" / f"{name}.log"
            if log.is_file():
                found[name] = (time.time() - log.stat().st_mtime, log.read_bytes()[-LOG:])
    return found


def work(sent: dict[str, Any], job: dict[str, Any], board: Any) -> dict[str, Any]:
    """Train a cell, unless it is done, and put it into DVC's cache.

    Args:
        sent: the head's project: its files as a tar, DVC's settings and where its cache is.
        job: the cell: its stage, variant, seed and hash.
        board: whom to tell of each epoch.

    Returns:
        `seconds`, and what has failed as `failure`, empty when nothing has.
    """
    started, failure = time.monotonic(), ""
    try:
        folder = _folder(sent)
        shared = _is_shared(sent)
        with _logged(_resume(folder, sent, shared) / f"{job['name']}.log"):
            _set_up(folder, sent, shared)
            _train(folder, sent, job, board)
            if not shared:
                _send(folder, job["stage_name"])
    except Exception as error:
        failure = _told(error, sent)
    return {"seconds": time.monotonic() - started, "failure": failure}


@contextmanager
def _logged(log: Path) -> Iterator[None]:
    """What the process prints goes to a file, after what others have printed of the same cell."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise


class Refused(Exception):
    """Something that the user can put right."""


def _told(error: Exception, sent: dict[str, Any]) -> str:
    known = sys.modules.get("ablation_lab.errors")
    if isinstance(error, Refused) or (known and isinstance(error, known.LabError)):
        text = str(error)
    else:
        text = (known and (known.explanation(error) or known.reason(error))) or f"{type(error).__name__}: {error}"
    where = ""
    if isinstance(error, Refused) and KEYS.search(text) and (remote := sent["config"]["core"].get("remote")):
        where = (
            f"\nThe keys of the remote {remote} belong in the environment of `ray start` on each node, or on the head "
            f"in DVC's local configuration (`dvc remote modify --local {remote} …`), which is sent to the nodes. "
            "See docs/parallel.md."
        )
    return f"{text} (on {socket.gethostname()}){where}"


def nodes() -> Path:
    """Where a machine's nodes have their work folders, each in one that is called by its id."""
    import platformdirs

    return Path(os.environ.get("ABLAB_CACHE") or platformdirs.user_cache_path("ablation-lab")) / "nodes"


def _folder(sent: dict[str, Any]) -> Path:
    import ray

    return nodes() / ray.get_runtime_context().get_node_id() / sent["project"]


def _is_shared(sent: dict[str, Any]) -> bool:
    """Whether the head's cache is this node's too.

    Raises:
        Refused: when it isn't, and there is no remote to get data from.
    """
    shared = sees(sent["cache"], sent["project"], sent["proof"])
    if not shared and not sent["config"]["core"].get("remote"):
        raise Refused(
            f"{sent['cache']}: Expected DVC's cache of the head here, in a folder that all nodes share "
            "(`dvc cache dir --local /shared/dvc-cache`), or a remote (`dvc remote add --default`). Found: neither."
        )
    return shared


def _resume(folder: Path, sent: dict[str, Any], shared: bool) -> Path:
    """Where the states and logs of trainings lie: in a shared cache, where another node goes on from them when this one
    is lost, else in the work folder."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    found = folder / "resume"
    with FileLock(f"{folder}.lock"):
        if shared:
            _link(found, Path(sent["cache"]) / SHARED / sent["project"] / "resume")
        else:
            if found.is_symlink():
                found.unlink()
            found.mkdir(parents=True, exist_ok=True)
    return found


def _set_up(folder: Path, sent: dict[str, Any], shared: bool) -> None:
    """Make the work folder the head's project, with the data that cells need."""
    from filelock import FileLock

    for old in folder.parent.parent.glob("*/"):
        if time.time() - old.stat().st_mtime > FORGOTTEN:
            shutil.rmtree(old, ignore_errors=True)
    os.utime(folder.parent)
    there = folder / ".dvc" / "there"
    stated = [sent["digest"], sent["needs"], sent["config"], sent["cache"], shared]
    wanted = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
    with FileLock(f"{folder}.lock"):
        if there.exists() and there.read_text() == wanted:
            return
        there.unlink(missing_ok=True)
        for name in ("src", "stages", "networks"):
            shutil.rmtree(folder / name, ignore_errors=True)
        with tarfile.open(fileobj=io.BytesIO(sent["tar"])) as tar:
            tar.extractall(folder, filter="data")
        _configure(folder, sent, shared)
        if shared:
            _dvc(folder, "checkout", "--force", *sent["needs"])
        else:
            _dvc(folder, "pull", "--force", "--run-cache", *sent["needs"])
        there.write_text(wanted)


def _link(link: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and link.readlink() == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    shutil.rmtree(link, ignore_errors=True)
    link.symlink_to(target)


def _configure(folder: Path, sent: dict[str, Any], shared: bool) -> None:
    from configobj import ConfigObj

    settings = ConfigObj(sent["config"])
    settings["core"]["no_scm"] = True
    settings["cache"].pop("dir", None)
    if shared:
        settings["cache"]["dir"] = sent["cache"]
    (folder / ".dvc" / "tmp").mkdir(parents=True, exist_ok=True)
    written = folder / ".dvc" / "config"
    written.touch(mode=0o600)
    with written.open("wb") as file:  # with a remote's credentials, perhaps
        settings.write(file)


def _train(folder: Path, sent: dict[str, Any], job: dict[str, Any], board: Any) -> None:
    os.chdir(folder)
    os.environ.pop("DVC_ROOT", None)
    os.environ.update(sent["environment"])
    os.environ |= {"PYTHONPATH": str(folder / "src"), "DVC_STAGE": job["stage_name"]}
    sys.path[:0] = [str(folder / "src"), str(folder)]
    for name in [one for one in sys.modules if one.partition(".")[0] == "ablation_lab"]:
        del sys.modules[name]  # what the node has installed
    from ablation_lab import dvc_command, runner
    from ablation_lab.tracking import live

    here = live.provenance()
    for name in VERSIONS:
        if here[name] != sent["made"][name]:
            package = name.partition(".")[2]
            raise Refused(
                f"{package}: Expected {sent['made'][name]}, as on the head, since results depend on it. "
                f"Found: {here[name]}. Set this node up from the same requirements.lock."
            )

    def told(row: dict[str, float]) -> None:  # and nobody waits for it
        board.tell.remote(job["name"], row)

    made = {name: value for name, value in sent["made"].items() if name.startswith(("git.", "dvc.exp", "mlflow.user"))}
    with _alone(folder):
        waiting = dvc_command.due(folder, [job["stage_name"]])
    if not waiting:
        return  # the same cell's process was lost after it had been done
    runner.prepare(job["variant"], job["seed"], told=told, tracked=sent["tracked"], made=made)
    with _alone(folder):
        makers = {job["stage_name"]: partial(runner.take, job["stage"], job["variant"], job["seed"])}
        if dvc_command.keep(folder, makers):
            raise Refused(f"{job['stage_name']}: Expected the cell that was trained. Found: none.")
    runner.taken(job["wanted"])


def _alone(folder: Path) -> "BaseFileLock":
    """DVC lets one process at a time work in a folder."""
    from filelock import FileLock

    return FileLock(f"{folder}.dvc.lock")


def _send(folder: Path, stage: str) -> None:
    for left in reversed(range(TRIES)):
        try:
            return _dvc(folder, "push", "--run-cache", stage)
        except Refused:
            if not left:
                raise
            time.sleep(10)


def _dvc(folder: Path, *command: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    environment |= {"DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(folder / "src")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    called = [sys.executable, "-m", "dvc", "--wait-for-lock", *command]
    done = subprocess.run(called, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"`dvc {' '.join(command)}` failed: {(done.stderr or done.stdout).strip()[-2000:]}")
