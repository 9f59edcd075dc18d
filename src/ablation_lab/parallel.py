"""Cells side by side on this machine.

They are trained by processes of their own, each of which leaves its cell in its place (`resume.py`).
"""

import importlib.util
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ablation_lab import errors, gpu, resume, runner
from ablation_lab.jobs import Engine, Job, View, check_code
from ablation_lab.tracking import live

MOST_ON_A_GPU = 4
# How TensorFlow's own code ends where it doesn't get the memory that it asks for.
BROKEN = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)
FEWER = "Fewer cells at a time (-j) have more each; or make train.batch_size or the network smaller."
PATIENCE = 20  # seconds that a cell has to end after Ctrl-C


@contextmanager
def engine(root: Path, code: dict[str, str]) -> Iterator[Engine]:
    """What trains cells on this machine; where TensorFlow is imported beforehand, this begins here.

    Args:
        code: the training code that the cells' hashes have (`cell.training_code`).
    """
    context = _context()

    def train(waiting: list[Job], at_a_time: int | None) -> None:
        _side_by_side(waiting, at_a_time or _room(waiting), context, root, code)

    yield train


def _context() -> Any:
    """How processes are started: from one that has imported TensorFlow already, where no GPU is in the way."""
    if _gpus():
        return multiprocessing.get_context("spawn")  # CUDA doesn't outlive a fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ablation_lab.training", "ablation_lab.runner", *live.LOGGER])
    from multiprocessing import forkserver

    with _deaf():
        forkserver.ensure_running()  # while DVC plans
    return context


@contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C is for this process, which ends those that it has started; they inherit this."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them; none where TensorFlow has no CUDA (`make gpu`)."""
    if importlib.util.find_spec("nvidia") is None:
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [one for one in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if one and one != "-1"]
    found = [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
    return found or (["0"] if Path("/dev/dxg").exists() else [])  # the latter on Windows


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


def _room(waiting: list[Job]) -> int:
    """As many cells as the GPUs have room for, else as the cores have threads for."""
    threads = max(1, len(_cores()) // max(job.threads for job in waiting))
    gpus, several = len(_gpus()), max(job.devices for job in waiting)
    if not gpus:
        return threads
    if several > 1:
        return max(1, gpus // several)
    return min(gpus * on_a_gpu(waiting, gpu.free_memory()), max(gpus, threads))


def on_a_gpu(waiting: list[Job], free: int) -> int:
    """How many cells a GPU has memory for; small ones leave it idle most of the time.

    Args:
        free: bytes that are free on the fullest GPU; 0 when nobody knows.
    """
    return min(MOST_ON_A_GPU, max(1, free // max(job.memory for job in waiting)))


def _side_by_side(waiting: list[Job], jobs: int, context: Any, root: Path, code: dict[str, str]) -> None:
    queue = list(waiting)
    cores, gpus = _cores(), _gpus()
    share, several = max(1, len(cores) // jobs), max(job.devices for job in waiting)
    free = list(range(jobs))
    running: dict[int, tuple[Any, Job, int, Connection]] = {}
    logs = root / resume.FOLDER
    logs.mkdir(exist_ok=True)
    with View(waiting, jobs) as show:
        try:
            while queue or running:
                while queue and free:
                    job, slot = queue.pop(0), free.pop(0)
                    job.started = time.monotonic()
                    ours, theirs = context.Pipe(duplex=False)
                    # More threads than its share of the cores: then the system shares them out.
                    chosen = [cores[(slot * share + one) % len(cores)] for one in range(share)]
                    chosen = chosen if job.threads <= share else cores
                    # One that more cells than one have is shared by its memory.
                    given = [gpus[(slot * several + one) % len(gpus)] for one in range(job.devices)] if gpus else []
                    log = logs / f"{job.name}.log"
                    arguments = (root, job, code, chosen, given, log, theirs)
                    process = context.Process(target=_cell, args=arguments, name=job.name)
                    with _deaf():
                        process.start()
                        running[process.sentinel] = (process, job, slot, ours)
                    theirs.close()
                telling = {ours: job for _, job, _, ours in running.values() if not ours.closed}
                ready = wait([*running, *telling], timeout=1)
                for pipe in telling.keys() & set(ready):
                    try:
                        telling[pipe].row = pipe.recv()
                    except EOFError:
                        pipe.close()
                for sentinel in running.keys() & set(ready):
                    process, job, slot, pipe = running.pop(sentinel)
                    process.join()
                    with suppress(EOFError, OSError):  # closed already: all epochs are known
                        while pipe.poll():
                            job.row = pipe.recv()
                    job.seconds = time.monotonic() - job.started
                    if process.exitcode:
                        job.failure = _reason(process.exitcode, logs / f"{job.name}.log")
                    free.append(slot)
                    show.ended(job)
                show.refresh([job for _, job, _, _ in running.values()], len(queue))
        finally:
            for process, *_ in running.values():
                process.terminate()
            for process, *_ in running.values():
                process.join(PATIENCE)
                process.kill()


def _cell(
    root: Path, job: Job, code: dict[str, str], cores: list[int], gpus: list[str], log: Path, told: Connection
) -> None:
    """What a process does: train one cell, its output in a file, each epoch told."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    sys.path.insert(0, str(root))
    os.environ["DVC_STAGE"] = job.stage_name
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(gpus))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)

    def tell(row: dict[str, float]) -> None:
        with suppress(OSError):  # nobody listens any more: whoever asks next takes the cell
            told.send(row)

    with errors.explained():
        check_code(root, code)
        runner.prepare(job.variant, job.seed, told=tell)


def _reason(status: int, log: Path) -> str:
    """Why a cell has failed, from what it has written."""
    written = log.read_text(errors="replace") if log.exists() else ""  # it may end before its first line
    text = errors.COLOURS.sub("", written).strip()
    if status == -signal.SIGKILL:
        return f"killed, perhaps as the memory was full. {FEWER}"
    if status < 0:
        name = signal.Signals(-status).name
        if status in BROKEN and (errors.NO_MEMORY.search(text) or _is_limited()):
            return f"out of memory: TensorFlow ended by {name}. {FEWER} (Its output: {log})"
        hint = f", as TensorFlow may when it gets no memory. {FEWER}" if status in BROKEN else ""
        return f"ended by {name}{hint} (its output: {log})"
    whole = f" (all of it: {log})" if "Traceback (most recent call last)" in text else ""
    lines = text.splitlines() or [f"exit status {status}"]
    told = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if told:
        return "\n".join(lines[told[-1] :]).removeprefix("error: ") + whole
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return f"{(raised or lines)[-1]} (all of it: {log})"


def _is_limited() -> bool:
    """Whether the memory of this process, and so of those that it has started, has a limit (`ulimit -v`)."""
    import resource

    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
