"""A training's run in MLflow, written by a process of its own (`logger`).

So a store that is slow or gone never holds a training up, MLflow is imported while TensorFlow works, and the run of a
training that is killed is closed all the same. What the store has missed is added by the next `track`.
"""

import getpass
import json
import multiprocessing
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import IO, Any

from ablation_lab import errors

# What logs, and what imports MLflow for it: a process that has them can be forked into a logger.
LOGGER = ("ablation_lab.tracking.logger", "ablation_lab.tracking.runs")
PATIENCE = 10  # seconds that the store has after a training for what it has not taken yet


@dataclass(frozen=True)
class Identity:
    """What a run is of.

    Args:
        study: the study's name, MLflow's experiment.
        variant, seed: the cell.
        cell_hash: of all that fixes the cell's result.
        variant_hash: the same without the seed.
        plan: the resolved configuration, the run's parameters.
        card: the data card of the processed data.
        made: what the training is made with, as `provenance` tells it.
    """

    study: str
    variant: str
    seed: int
    cell_hash: str
    variant_hash: str
    plan: dict[str, Any]
    card: dict[str, Any]
    made: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"


CLOCK = time.time() - time.monotonic()  # one look at it: a clock that is set in mid-training moves no times of a run


def _now() -> int:
    """Milliseconds since 1970, MLflow's time."""
    return int(1000 * (CLOCK + time.monotonic()))


def provenance() -> dict[str, str]:
    """What a training is made with, as MLflow's tags: commit, experiment of DVC's, process, machine, versions."""
    commit = _git("rev-parse", "HEAD")
    names = ("tensorflow", "keras", "numpy", "dvc", "mlflow")
    tags = {
        "git.commit": commit,
        # DVC writes its lock while it runs.
        "git.dirty": str(bool(_git("status", "--porcelain", "--", ".", ":!dvc.lock"))).lower() if commit else "",
        "dvc.exp_name": os.environ.get("DVC_EXP_NAME", ""),
        **user(),
        "ablab.host": socket.gethostname(),
        "ablab.pid": str(os.getpid()),
        "ablab.platform": platform.platform(),
        "ablab.python": platform.python_version(),
    } | {f"ablab.{name}": version(name) for name in names}
    return {key: value for key, value in tags.items() if value}


def user() -> dict[str, str]:
    """Whose process this is, by the tag that MLflow has for it; empty where the system has no name for the user."""
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, ImportError, OSError):  # in a container, for one, with a number that no user has
        return {}


def _git(*command: str) -> str:
    # Without its lock: a commit of the user's may be under way.
    try:
        found = subprocess.run(["git", "--no-optional-locks", *command], capture_output=True, text=True, check=False)
    except OSError:
        return ""  # git is not installed
    return found.stdout.strip() if found.returncode == 0 else ""


class CellRun:
    """One cell's run while it is trained. Trouble with the store is told once and never stops the training.

    `outcome`, the tag `ablab.status`, is set once it is known: `ok` or `diverged`.
    """

    def __init__(self, identity: Identity):
        self.identity, self.outcome = identity, ""
        # Those of `ablab repro` come from one process, which has imported MLflow once for all of them.
        forkable = multiprocessing.parent_process() is not None and sys.modules.keys() >= set(LOGGER)
        self._lines, self._ended, self._kill = _forked() if forkable else _started()
        stage = os.environ.get("DVC_STAGE") or f"train@{identity.name}"
        self._send(identity=asdict(identity), stage=stage, time=_now())

    def epoch(self, row: Mapping[str, float]) -> None:
        """Log one row of the history at its epoch's number."""
        self.metrics({key: value for key, value in row.items() if key != "epoch"}, int(row["epoch"]))

    def metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Log some metrics; those that don't exist (None) or are no numbers are left out."""
        self._send(metrics=dict(values), step=step, time=_now())

    def end(self, status: str = "FINISHED", reason: str = "") -> None:
        """Close the run as FINISHED, FAILED or KILLED, and wait a little for what the store has still to take."""
        self._send(status=status, reason=reason, time=_now(), outcome=self.outcome)
        with suppress(BrokenPipeError):  # the logger has said why it ended
            self._lines.close()
        if not self._ended(PATIENCE):
            self._kill()
            self._ended(PATIENCE)
            lost = f"warning: MLflow has not taken all of {self.identity.name} in {PATIENCE} s"
            print(f"{lost}; the stage `track` and `ablab sync` add the rest", file=sys.stderr)

    def _send(self, **message: Any) -> None:
        try:
            self._lines.write(json.dumps(message) + "\n")
            self._lines.flush()
        except (BrokenPipeError, ValueError):
            pass  # the logger has said why it ended; a closed pipe is a ValueError


# Where a logger reads its lines; whether it has ended within so many seconds; its violent end.
Logger = tuple[IO[str], Callable[[float], bool], Callable[[], None]]


def _started() -> Logger:
    # A session of its own: Ctrl-C is for the training, which says how it ended.
    process = subprocess.Popen(
        [sys.executable, "-m", LOGGER[0]], stdin=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True
    )
    assert process.stdin is not None

    def ended(seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return process.poll() is not None

    return process.stdin, ended, process.kill


def _forked() -> Logger:
    lines, pipe = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=sys.modules[LOGGER[0]].forked, args=(lines, pipe))
    process.start()
    os.close(lines)

    def ended(seconds: float) -> bool:
        process.join(seconds)
        return process.exitcode is not None

    return os.fdopen(pipe, "w", encoding="utf-8"), ended, process.kill


@contextmanager
def cell_run(identity: Identity) -> Iterator[CellRun]:
    """A run that ends as FINISHED, as KILLED after Ctrl-C or SIGTERM, as FAILED after any other exception."""
    run = CellRun(identity)
    try:
        yield run
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        run.end("KILLED" if stopped else "FAILED", errors.reason(error))
        raise
    run.end()
