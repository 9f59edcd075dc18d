"""What a node of a cluster does: train one cell in a work folder of its own, and hand it over through DVC's cache.

Ray sends this module by value, so that it is the head's whatever a node has installed; the project's own code, which
comes with each cell, is imported once it is there.
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

SHARED = "ablation-lab"  # the folder in a shared cache where nodes keep the states of trainings, a project each
VERSIONS = ("ablab.tensorflow", "ablab.keras", "ablab.numpy")
PROOF = "shared"  # a file there that the head writes: a node that reads it sees the same cache


class Board:
    """Where nodes tell how far their cells are; it lives on the head."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    def tell(self, name: str, row: dict[str, float]) -> None:
        self.rows[name] = row

    def read(self) -> dict[str, dict[str, float]]:
        told, self.rows = self.rows, {}
        return told


def work(sent: dict[str, Any], job: dict[str, Any], board: Any) -> dict[str, Any]:
    """Train a cell, unless its state says that it is done, and put it into DVC's cache.

    Args:
        sent: the head's project: its files as a tar, DVC's settings and where its cache is.
        job: the cell: its stage, variant and seed, what it needs of the data, the stages whose result it is.
        board: whom to tell of each epoch; None for nobody.

    Returns:
        `seconds`, and what has failed as `failure`, empty when nothing has.
    """
    started = time.monotonic()
    try:
        folder = _folder(sent)
        shared = _is_shared(sent)
        _set_up(folder, sent, job["needs"], shared)
        _train(folder, sent, job, board)
        _dvc(folder, "repro", "--single-item", *job["stages"])
        if not shared:
            _dvc(folder, "push", "--run-cache", *job["stages"])
    except Exception as error:
        return {"seconds": time.monotonic() - started, "failure": _told(error)}
    return {"seconds": time.monotonic() - started, "failure": ""}


class Refused(Exception):
    """Something that the user can put right."""


def _told(error: Exception) -> str:
    known = sys.modules.get("ablation_lab.errors")
    if isinstance(error, Refused) or (known and isinstance(error, known.LabError)):
        text = str(error)
    else:
        text = (known and known.explanation(error)) or f"{type(error).__name__}: {error}"
    return f"{text} (on {socket.gethostname()})"


def _folder(sent: dict[str, Any]) -> Path:
    import platformdirs
    import ray

    home = Path(os.environ.get("ABLAB_CACHE") or platformdirs.user_cache_path("ablation-lab"))
    return home / "nodes" / ray.get_runtime_context().get_node_id()[:16] / sent["project"]


def _is_shared(sent: dict[str, Any]) -> bool:
    """Whether the head's cache is this node's too.

    Raises:
        Refused: when it isn't, and there is no remote to get data from.
    """
    proof = Path(sent["cache"]) / SHARED / sent["project"] / PROOF
    shared = proof.exists() and proof.read_text() == sent["proof"]
    if not shared and not sent["config"]["core"].get("remote"):
        raise Refused(
            f"{sent['cache']}: Expected DVC's cache of the head here, in a folder that all nodes share "
            "(`dvc cache dir --local /shared/dvc-cache`), or a remote (`dvc remote add --default`). Found: neither."
        )
    return shared


def _set_up(folder: Path, sent: dict[str, Any], needs: list[str], shared: bool) -> None:
    """Make the work folder the head's project, with the data that a cell needs."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    there = folder / ".dvc" / "there.json"
    wanted = {"files": sent["digest"], "needs": needs}
    with FileLock(f"{folder}.lock"):
        if there.exists() and json.loads(there.read_text()) == wanted:
            return
        there.unlink(missing_ok=True)
        for name in ("src", "stages", "networks"):
            shutil.rmtree(folder / name, ignore_errors=True)
        with tarfile.open(fileobj=io.BytesIO(sent["tar"])) as tar:
            tar.extractall(folder, filter="data")
        _configure(folder, sent, shared)
        if shared:
            _dvc(folder, "checkout", "--force", *needs)
        else:
            _dvc(folder, "pull", "--force", "--run-cache", *needs)
        there.write_text(json.dumps(wanted))


def _configure(folder: Path, sent: dict[str, Any], shared: bool) -> None:
    from configobj import ConfigObj

    settings = ConfigObj(sent["config"])
    settings["core"]["no_scm"] = True
    if shared:
        settings["cache"]["dir"] = sent["cache"]
    else:
        settings["cache"].pop("dir", None)
    settings.filename = str(folder / ".dvc" / "config")
    (folder / ".dvc" / "tmp").mkdir(parents=True, exist_ok=True)
    settings.write()
    resume = folder / "resume"
    if shared and not resume.exists():
        # States of trainings lie in the cache's folder: when a node is lost, another one goes on.
        states = Path(sent["cache"]) / SHARED / sent["project"] / "resume"
        states.mkdir(parents=True, exist_ok=True)
        resume.symlink_to(states)


def _train(folder: Path, sent: dict[str, Any], job: dict[str, Any], board: Any) -> None:
    os.chdir(folder)
    os.environ.pop("DVC_ROOT", None)
    os.environ.update(sent["environment"])
    os.environ |= {"PYTHONPATH": str(folder / "src"), "DVC_STAGE": job["stages"][0]}
    sys.path[:0] = [str(folder / "src"), str(folder)]
    for name in [one for one in sys.modules if one.partition(".")[0] == "ablation_lab"]:
        del sys.modules[name]  # what the node has installed
    from ablation_lab import runner
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

    made = {name: value for name, value in sent["made"].items() if name.startswith(("git.", "dvc.exp"))}
    runner.prepare(job["variant"], job["seed"], told=told, tracked=sent["tracked"], made=made)


def _dvc(folder: Path, *command: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    environment |= {"DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(folder / "src")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    called = [sys.executable, "-m", "dvc", "--wait-for-lock", *command]
    done = subprocess.run(called, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"`dvc {' '.join(command)}` failed: {(done.stderr or done.stdout).strip()[-2000:]}")
