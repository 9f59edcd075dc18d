"""`dvc repro` with its cells side by side.

DVC says which cells are due. They are trained by processes of their own, each of which leaves its cell in its place
(`resume.py`). From there they are taken all at once, through DVC, as if its stages had trained them; `dvc repro` does
the rest. What is kept, locked, cached and tracked is what `dvc repro` alone makes.
"""

import importlib.util
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ablation_lab import cell, errors, files, params, resume, runner
from ablation_lab.dvc_command import DVC, due, environment, keep, mend
from ablation_lab.errors import LabError
from ablation_lab.tracking import live

MACS_A_SECOND = 3e9  # of one thread, forward and backward: a first guess, put right by the first cells
PATIENCE = 20  # seconds that a cell has to end after Ctrl-C


@dataclass
class Job:
    """A cell that is due, of the stage `train` or `finetune`: how long it may take in any unit, and how far it is."""

    stage: str
    variant: str
    seed: int
    wanted: str  # the cell's hash: of equal cells one is trained, and DVC's stages share its result
    cost: float
    epochs: int
    threads: int
    row: dict[str, float] = field(default_factory=dict)
    started: float = 0
    seconds: float = 0
    failure: str = ""

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"


def repro(root: Path, jobs: int | None) -> int:
    """Bring the project up to date, `jobs` cells at a time.

    Args:
        jobs: None for as many as the cores have room for.

    Returns:
        The exit status: that of `dvc repro`, or 1 when a cell has failed; the others are then kept.

    Raises:
        LabError: when the code that is running is not the project's.
    """
    here, own = Path(__file__).resolve().parent, (root / "src" / "ablation_lab").resolve()
    if here != own:
        raise LabError(
            f"{root}: Expected this project's own `ablab`, as its code is part of a cell. Found: that of {here}. "
            f"Set its environment up (`make setup`) and use it, or set PYTHONPATH to {root / 'src'}."
        )
    code = cell.training_code(root)
    context = _context()
    mend(root)
    if status := _dvc(root, "repro", "plan"):
        return status
    study = params.load(root / "params.yaml")
    for stage, variants in (("train", study.variants), ("finetune", study.second_names)):
        if stage == "finetune" and variants and (status := _dvc(root, "repro", "select")):
            return status
        cells = {f"{stage}@{variant}-{seed}": (variant, seed) for variant in variants for seed in study.seeds}
        card = files.read_json(root / runner.DATA / "card.json")
        waiting = [_job(stage, *cells[name], root, code, card) for name in due(root, list(cells))] if cells else []
        if not waiting:
            continue
        _side_by_side(waiting, jobs or _room(waiting), context, root, code)
        failed = [job for job in waiting if job.failure]
        left = keep(root, {f"{job.stage}@{job.name}": partial(_take, job) for job in waiting if not job.failure})
        if failed:
            # What has been trained is kept; DVC alone would try the others once more.
            if left:
                _dvc(root, "repro", "--keep-going", "--single-item", *left)
            for job in failed:
                print(f"\nerror: {job.stage}@{job.name}: {job.failure}", file=sys.stderr)
            return 1
    return _dvc(root, "repro")


def _dvc(root: Path, *command: str) -> int:
    return subprocess.run([*DVC, *command], cwd=root, env=environment(), check=False).returncode


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
    """As many cells as there are GPUs, else as the cores have threads for."""
    return len(_gpus()) or max(1, len(_cores()) // max(job.threads for job in waiting))


def _take(job: Job) -> bool:
    """Have a trained cell in its folder; False of one that is equal to another one, whose stage shares its result."""
    result = runner.take(job.variant, job.seed)
    if result and job.stage == "train":
        cell.write_validation(job.variant, job.seed, result)
    return result is not None


def _job(stage: str, variant: str, seed: int, root: Path, code: dict[str, str], card: dict[str, Any]) -> Job:
    file = cell.plan_file(variant, root)
    plan = files.read_json(file)
    facts = files.read_json(cell.plan_file(variant, root, "networks/"))
    settings = plan["train"]
    pictures = (settings["steps_per_epoch"] or 0) * settings["batch_size"]
    pictures = pictures or card["counts"]["train"] * plan["input"]["fraction"]
    frozen = facts.get("frozen", {"macs": 0, "once": False})
    macs = facts["macs"] - (frozen["macs"] if frozen["once"] else 0)
    wanted = cell.cell_hash(files.sha256(file), seed, card["digest"], code)
    cost = settings["epochs"] * pictures * macs / MACS_A_SECOND + 1
    return Job(stage, variant, seed, wanted, cost, settings["epochs"], settings["threads"])


def _side_by_side(waiting: list[Job], jobs: int, context: Any, root: Path, code: dict[str, str]) -> None:
    """Train cells, the longest first; why one has failed is in its `failure`, and in those of its equals."""
    once = {job.wanted: job for job in reversed(waiting)}
    queue = sorted(once.values(), key=lambda job: -job.cost)
    cores, gpus = _cores(), _gpus()
    share = max(1, len(cores) // jobs)
    free = list(range(jobs))
    running: dict[int, tuple[Any, Job, int, Connection]] = {}
    logs = root / resume.FOLDER
    logs.mkdir(exist_ok=True)
    with _view(list(once.values()), jobs) as show:
        try:
            while queue or running:
                while queue and free:
                    job, slot = queue.pop(0), free.pop(0)
                    job.started = time.monotonic()
                    ours, theirs = context.Pipe(duplex=False)
                    # More threads than its share of the cores: then the system shares them out.
                    chosen = [cores[(slot * share + one) % len(cores)] for one in range(share)]
                    chosen = chosen if job.threads <= share else cores
                    gpu = gpus[slot % len(gpus)] if gpus else None
                    log = logs / f"{job.name}.log"
                    arguments = (root, job, code, chosen, gpu, log, theirs)
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
                    process, job, slot, _ = running.pop(sentinel)
                    process.join()
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
    for job in waiting:
        job.failure = once[job.wanted].failure


def _cell(
    root: Path, job: Job, code: dict[str, str], cores: list[int], gpu: str | None, log: Path, told: Connection
) -> None:
    """What a process does: train one cell, its output in a file, each epoch told."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    sys.path.insert(0, str(root))
    os.environ["DVC_STAGE"] = f"{job.stage}@{job.name}"
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    with errors.explained():
        if cell.training_code(root) != code:  # what is imported is not what the cell's hash would say
            raise LabError(
                "src/: Expected the code that `ablab repro` has started with. Found: another. Call it again."
            )
        runner.prepare(job.variant, job.seed, told=told.send)


def _reason(status: int, log: Path) -> str:
    """Why a cell has failed, from what it has written."""
    if status == -signal.SIGKILL:
        return "killed, perhaps as the memory was full. With fewer cells at a time (-j) each has more."
    if status < 0:
        return f"ended by {signal.Signals(-status).name} (its output: {log})"
    lines = log.read_text(errors="replace").strip().splitlines() or [f"exit status {status}"]
    told = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if told:
        return "\n".join(lines[told[-1] :]).removeprefix("error: ")
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return f"{(raised or lines)[-1]} (all of it: {log})"


class _view:
    """What is shown: on a terminal the cells that run, their epochs and accuracies; elsewhere a line a finished one."""

    def __init__(self, waiting: list[Job], jobs: int):
        self.all, self.jobs = waiting, jobs
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, refresh_per_second=2, transient=True)
        self.done: list[Job] = []

    def __enter__(self) -> "_view":
        if self.console.is_terminal:
            self.live.start()
        else:
            print(f"{len(self.all)} cells, {self.jobs} at a time", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def ended(self, job: Job) -> None:
        self.done.append(job)
        told = (
            f"failed: {job.failure.splitlines()[0]}"
            if job.failure
            else f"{job.seconds:.0f} s{_accuracy(job, ', validation accuracy ')}"
        )
        line = f"{job.name}: {told} ({len(self.done)} of {len(self.all)}{self._left()})"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def refresh(self, running: list[Job], queued: int) -> None:
        if not self.console.is_terminal:
            return
        table = Table(box=None, title_justify="left", title=f"{len(self.done)} of {len(self.all)} cells{self._left()}")
        for heading in ("cell", "epoch", "validation accuracy", "seconds"):
            table.add_column(heading, justify="left" if heading == "cell" else "right")
        for job in running:
            epoch = f"{int(job.row.get('epoch', 0))}/{job.epochs}"
            seconds = f"{time.monotonic() - job.started:.0f}"
            table.add_row(job.name, epoch, _accuracy(job), seconds)
        table.add_row(f"{queued} waiting", "", "", "")
        self.live.update(table)

    def _left(self) -> str:
        known = [job for job in self.done if not job.failure]
        if not known:
            return ""
        if len(self.done) == len(self.all):
            return ""
        rest = sum(job.cost for job in self.all) - sum(job.cost for job in self.done)
        spent = sum(job.seconds for job in known) / sum(job.cost for job in known)
        return f", about {max(1, round(rest * spent / self.jobs / 60))} min left"


def _accuracy(job: Job, before: str = "") -> str:
    return f"{before}{job.row['val_accuracy']:.1%}" if "val_accuracy" in job.row else ""
