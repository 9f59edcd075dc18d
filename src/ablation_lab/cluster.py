"""Cells side by side on a Ray cluster: an existing one, or one that is started on this machine for the call.

Each cell is a task with its need of cores and GPUs. Nodes work in folders of their own (`node.py`) and share results
through DVC's cache, in a folder that all see or by a remote, from where the head's `dvc repro` takes them. The cell of
a node that is lost is given to another one, and goes on from its last state.
"""

import hashlib
import io
import os
import secrets
import shutil
import socket
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from ablation_lab import cell, files, node, resume
from ablation_lab.dvc_command import call, due
from ablation_lab.errors import LabError
from ablation_lab.jobs import Engine, Job, View, check_code
from ablation_lab.tracking import live

# What a node needs of the project beside data and plans, which are in DVC's cache.
SENT = ("dvc.yaml", "dvc.lock", "params.yaml", ".dvcignore", "stages", "src/ablation_lab", "networks", "weights")
NEEDED = ("data/processed", "plan")
REACHED = 10  # seconds for a cluster's first answer
LOGS = 60  # seconds for the nodes to send the logs of failed cells
TRIES = 3  # more, of a cell whose node or process is lost (its own errors end it at once), and of ending processes


@contextmanager
def engine(root: Path, code: dict[str, str], address: str | None) -> Iterator[Engine]:
    """What trains cells on a Ray cluster.

    Args:
        code: the training code that the cells' hashes have (`cell.training_code`).
        address: as `ray start` tells it; None starts a cluster of this machine's cores and GPUs.

    Raises:
        LabError: without Ray, when another call is at work, or when the cluster can't be reached.
    """
    ray = _ray(address)
    (root / resume.FOLDER).mkdir(exist_ok=True)
    try:
        lock = FileLock(root / resume.FOLDER / "ray.lock").acquire(timeout=0)
    except Timeout:
        raise LabError(f"{root}: Expected no other `ablab repro --engine ray` at work. Found: one.") from None
    with lock, _connected(ray, address):

        def train(waiting: list[Job], at_a_time: int | None) -> None:
            check_code(root, code)
            _side_by_side(waiting, at_a_time, root, address)

        yield train


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "ablation-lab"}
    here = {} if address else {"include_dashboard": False}
    token, node_id = "" if address else os.environ["RAY_AUTH_TOKEN"], ""
    try:
        try:
            if address:
                _check_mode()
                _knock(address)
            ray.init(address=address or "local", **quiet, **here)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise LabError(_not_connected(ray, address, error)) from None
        node_id = ray.get_runtime_context().get_node_id()
        if token:
            del os.environ["RAY_AUTH_TOKEN"]  # Ray keeps it; DVC and its stages don't get it
        yield
    finally:
        ray.shutdown(wait_for_processes=True)
        if token:
            _end(token)
        if token and node_id:
            shutil.rmtree(node.nodes() / node_id, ignore_errors=True)


def _end(token: str) -> None:
    """End what is left of a cluster of the call's own: Ray leaves processes when it is interrupted while it starts."""
    for _ in range(TRIES):  # one that is ended may have started another
        left = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("RAY_AUTH_TOKEN") == token:
                    process.kill()
                    left.append(process)
        if not left:
            return
        psutil.wait_procs(left, timeout=REACHED)


def _ray(address: str | None) -> Any:
    # Ray reads these variables when it is imported, and the processes that it starts inherit them.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")  # seconds until a refused token is reported, not 20
    else:
        # A token of this call, in no file: no other user of this machine can use the cluster.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        import ray
    except ImportError:
        raise LabError(
            "--engine ray: Expected Ray in this environment. Found: none. Install it on every node: "
            "`make setup` does, or `pip install 'ablation-lab[ray]'`."
        ) from None
    return ray


def _not_connected(ray: Any, address: str | None, error: Exception) -> str:
    """The message about a cluster that can't be started, or reached."""
    found = str(error).strip().partition("\n")[0]
    if not address:
        place = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "session_latest" / "logs"
        return (
            f"--engine ray: Expected Ray to start on this machine. Found: {found}. Its logs are in {place}. "
            "`ablab repro` without --engine ray trains cells side by side without Ray."
        )
    # Ray raises a refused token as a connection that fails, with the cause in its text.
    if isinstance(error, ray.exceptions.AuthenticationError) or "AuthenticationError" in str(error.__cause__):
        host = address.removeprefix("ray://").rpartition(":")[0] or "HEAD"
        return (
            f"--address: Expected the token of the cluster at {address}. Found: {_token()}. Copy it from the machine "
            f"on which `ray get-auth-token --generate` made it (`scp -p {host}:.ray/auth_token ~/.ray/`, mode 600). "
            "Ray reads RAY_AUTH_TOKEN first, then the file that RAY_AUTH_TOKEN_PATH names, then ~/.ray/auth_token."
        )
    return (
        f"--address: Expected the address of a running Ray cluster with this Python and Ray {ray.__version__}, "
        f"such as `ray start --head` prints. Found: {address} ({found})."
    )


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def _token() -> str:
    """Which token Ray has sent to a cluster that refused it."""
    mode, file = os.environ["RAY_AUTH_MODE"], _token_file()
    if mode.lower() != "token":
        return f"none, since RAY_AUTH_MODE is {mode}"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "another token in the variable RAY_AUTH_TOKEN"
    if file.is_file() and file.stat().st_size:
        return f"another token in {file}"
    return f"none in {file}, and no variable RAY_AUTH_TOKEN"


def _check_mode() -> None:
    file = _token_file()
    if not os.environ.get("RAY_AUTH_TOKEN") and file.is_file() and (mode := file.stat().st_mode & 0o777) & 0o077:
        expected = f"warning: {file}: Expected mode 600, as whoever reads this token can use the cluster."
        print(f"{expected} Found: {mode:o}. `chmod 600 {file}`", file=sys.stderr)


def _knock(address: str) -> None:
    """See whether somebody is there: Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():  # `auto` is Ray's to find
        socket.create_connection((host, int(port)), timeout=REACHED).close()


def _side_by_side(waiting: list[Job], at_a_time: int | None, root: Path, address: str | None) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.cloudpickle.register_pickle_by_value(node)
    gpus = ray.cluster_resources().get("GPU", 0)
    # Beside this process: the node of another one may be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kept: Any = ray.remote(num_cpus=0)(node.Board)
    board = kept.options(scheduling_strategy=here).remote()
    task = ray.remote(max_calls=1, max_retries=TRIES)(node.work)  # a process each: its threads are fixed at its start
    sent = _sent(root, waiting)
    shared = not address or _all_see(sent)
    if not shared and sent["config"]["core"].get("remote"):
        _call(root, "push", *sent["needs"])
    queue = list(waiting)
    running: dict[Any, Job] = {}
    project = ray.put(sent)
    with View(waiting, at_a_time or _room(waiting, gpus)) as show:
        try:
            while queue or running:
                while queue and len(running) < (at_a_time or len(waiting)):
                    job = queue.pop(0)
                    needs = {"CPU": job.threads} | ({"GPU": job.devices} if gpus else {})
                    job.started = time.monotonic()
                    job.failure = _too_large(needs)
                    if job.failure:
                        show.ended(job)
                        continue
                    asked = task.options(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), name=job.name)
                    running[asked.remote(project, _told(job), board)] = job
                done, _ = ray.wait(list(running), timeout=1) if running else ([], [])
                for name, row in _news(board).items():
                    next(job for job in waiting if job.name == name).row = row
                for one in done:
                    job = running.pop(one)
                    _take(job, one)
                    show.ended(job)
                trained = [job for job in running.values() if job.row]
                show.refresh(trained, len(queue) + len(running) - len(trained))
        finally:
            for one in running:
                ray.cancel(one, force=True)
            (Path(sent["cache"]) / node.SHARED / sent["project"] / sent["proof"]).unlink(missing_ok=True)
    _bring_logs(root, sent, [job for job in waiting if job.failure])
    good = [job.stage_name for job in waiting if not job.failure]
    if not good:
        return
    if not shared:
        _call(root, "fetch", "--run-cache", *sent["needs"])
    elif missing := due(root, good):
        raise LabError(
            f"{sent['cache']}: Expected what nodes have trained. Found: nothing of {', '.join(missing)}. "
            "See that all nodes use this cache."
        )
    _call(root, "repro", "--single-item", *([] if shared else ["--pull"]), *good)


def _call(root: Path, *command: str) -> None:
    if call(root, *command):
        raise LabError(f"`dvc {' '.join(command)}`: Expected it to end well. Found: the messages above.")


def _all_see(sent: dict[str, Any]) -> bool:
    """Whether each node has the head's cache."""
    import ray

    asked = _on_each_node(node.sees)
    return all(ray.get([one.remote(sent["cache"], sent["project"], sent["proof"]) for one in asked]))


def _on_each_node(function: Callable[..., Any]) -> list[Any]:
    """A function as a task of each node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0)(function)
    places = [one["NodeID"] for one in ray.nodes() if one["Alive"]]
    return [task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(one, soft=True)) for one in places]


def _too_large(needs: Mapping[str, float]) -> str:
    """What a cell lacks that no node has room for: Ray would wait for such a node for ever."""
    import ray

    there = [one["Resources"] for one in ray.nodes() if one["Alive"]]
    if any(all(one.get(kind, 0) >= number for kind, number in needs.items()) for one in there):
        return ""
    most = {kind: max((one.get(kind, 0) for one in there), default=0) for kind in needs}
    wanted, found = (", ".join(f"{number:g} {kind}" for kind, number in one.items()) for one in (needs, most))
    return f"train.threads, train.replicas: Expected a node with {wanted}. Found: at most {found}."


def _news(board: Any) -> dict[str, dict[str, float]]:
    import ray

    try:
        return ray.get(board.read.remote(), timeout=10)
    except ray.exceptions.RayError:
        return {}  # how far cells are is not worth their end


def _take(job: Job, done: Any) -> None:
    import ray

    try:
        result = ray.get(done)
    except ray.exceptions.RayError as error:
        # The last line says what; all of it is about Ray's own.
        job.failure = f"lost with its process or node, {TRIES + 1} times: {str(error).strip().splitlines()[-1]}"
        return
    job.seconds, job.failure = result["seconds"], result["failure"]


def _bring_logs(root: Path, sent: dict[str, Any], failed: list[Job]) -> None:
    """Write what failed cells have printed to `resume/<cell>.log` on the head, and name that file in their failures."""
    import ray

    if not failed:
        return
    names = [job.name for job in failed]
    asked = [one.remote(sent["cache"], sent["project"], names) for one in _on_each_node(node.logs)]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=LOGS)
    found: dict[str, tuple[float, bytes]] = {}
    for one in ready:
        with suppress(ray.exceptions.RayError):  # a node that is lost
            for name, (age, log) in ray.get(one).items():
                found[name] = min(found.get(name, (age, log)), (age, log))
    for job in failed:
        age, log = found.get(job.name, (float("inf"), b""))
        if age < time.monotonic() - job.started:  # else an earlier call's
            file = root / resume.FOLDER / f"{job.name}.log"
            file.write_bytes(log)
            job.failure += f"\nIts log: {file}"


def _room(waiting: list[Job], gpus: float) -> int:
    import ray

    return int(gpus or max(1, ray.cluster_resources().get("CPU", 1) // max(job.threads for job in waiting)))


def _told(job: Job) -> dict[str, Any]:
    stated = {"stage": job.stage, "name": job.name, "variant": job.variant, "seed": job.seed}
    return stated | {"wanted": job.wanted, "stage_name": job.stage_name}


def _sent(root: Path, waiting: list[Job]) -> dict[str, Any]:
    """What nodes are given of the project, and where they share results."""
    from dvc.repo import Repo

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", dereference=True) as tar:
        for name in SENT:
            if (root / name).exists():
                tar.add(root / name, name, filter=_wanted)
    with Repo(str(root)) as repo:
        cache = Path(repo.cache.local_cache_dir)
        config = {section: dict(repo.config[section]) for section in ("core", "cache")}
        if remote := config["core"].get("remote"):
            config[f'remote "{remote}"'] = dict(repo.config["remote"][remote])
    needs = set(NEEDED)
    for job in waiting:
        if job.stage == "finetune":
            start = files.read_json(cell.start_file(job.seed, root))["variant"]
            needs |= {cell.SELECTION, cell.folder(start, job.seed).as_posix()}
    project = hashlib.sha256(f"{socket.gethostname()}:{root.resolve()}".encode()).hexdigest()[:16]
    proof = f"seen-{os.urandom(16).hex()}"
    shared = cache / node.SHARED / project
    shared.mkdir(parents=True, exist_ok=True)
    (shared / proof).touch()
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    tracked = "://" in uri and not uri.startswith(("sqlite:", "file:"))  # a server, that nodes reach too
    passed_on = ("ABLAB_DATA_MIRROR", *(("MLFLOW_",) if tracked else ()))
    return {
        "tar": packed.getvalue(),
        "digest": hashlib.sha256(packed.getvalue()).hexdigest(),
        "project": project,
        "needs": sorted(needs),
        "cache": str(cache),
        "proof": proof,
        "config": config,
        "made": live.provenance(),
        "tracked": tracked,
        "environment": {key: value for key, value in os.environ.items() if key.startswith(passed_on)},
    }


def _wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name or member.name.endswith((".egg-info", ".part")) else member
