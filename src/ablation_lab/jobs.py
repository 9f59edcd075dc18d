"""The cells that are due, and what is shown of them while they are trained side by side."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ablation_lab import cell, files
from ablation_lab.errors import LabError
from ablation_lab.words import counted, duration

# Of a training on a GPU: CUDA's own bytes, with room for what its libraries work with, and copies of a number: of a
# weight, its gradient and what an optimizer remembers; of what a layer gives, its gradient.
GPU_CONTEXT, A_WEIGHT, A_VALUE = 10**9, 4 * 4, 2 * 4
MACS_A_SECOND = 3e9  # of one thread, forward and backward: a first guess, put right by the first cells


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
    devices: int  # GPUs, where there are some
    memory: int  # bytes that it may need on each, a guess
    row: dict[str, float] = field(default_factory=dict)
    started: float = 0
    seconds: float = 0
    failure: str = ""
    remark: Callable[["Job"], str] | None = None  # what there is to say of a cell once it is trained

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"

    @property
    def stage_name(self) -> str:
        """What DVC calls it."""
        return f"{self.stage}@{self.name}"


class Engine(Protocol):
    """What trains cells side by side, in the order given; why one has failed is in its job's `failure`.

    How many at a time: None for as many as there is room for.
    """

    def __call__(self, waiting: list[Job], at_a_time: int | None, /) -> None: ...


def job(stage: str, variant: str, seed: int, root: Path, code: dict[str, str], card: dict[str, Any]) -> Job:
    """A cell that is due, from its plan and the card of its data."""
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
    values = (
        sum(math.prod(size or 1 for size in layer["output_shape"]) for layer in facts["layers"])
        * settings["batch_size"]
    )
    devices = settings["replicas"] or 1
    # The pictures may lie there, each number a byte, or the features in their place.
    fed = frozen["bytes"] if frozen["once"] else math.prod(card["image_shape"]) * sum(card["counts"].values())
    there = fed if settings["data_on"] != "host" else 0
    memory = GPU_CONTEXT + there + A_WEIGHT * facts["parameters"] + A_VALUE * values // devices
    return Job(stage, variant, seed, wanted, cost, settings["epochs"], settings["threads"], devices, memory)


def check_code(root: Path, code: dict[str, str]) -> None:
    """See that what is imported now is what the cells' hashes say.

    Raises:
        LabError: when it has been edited since.
    """
    if cell.training_code(root) != code:
        raise LabError("src/: Expected the code that `ablab repro` has started with. Found: another. Call it again.")


class View:
    """What is shown: on a terminal the cells that run, their epochs and accuracies; elsewhere a line a finished one."""

    def __init__(self, waiting: list[Job], jobs: int):
        self.all, self.jobs = waiting, jobs
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, refresh_per_second=2, transient=True)
        self.done: list[Job] = []

    def __enter__(self) -> "View":
        if self.console.is_terminal:
            self.live.start()
        else:
            print(f"{counted(len(self.all), 'cell')}, {self.jobs} at a time", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def ended(self, job: Job) -> None:
        self.done.append(job)
        result = _result(job)
        told = (
            f"failed: {job.failure.splitlines()[0]}"
            if job.failure
            else ", ".join([duration(job.seconds), *([result] if result else [])])
        )
        line = f"{job.name}: {told} ({len(self.done)} of {len(self.all)}{self._left()})"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        if not job.failure and job.remark and (remark := job.remark(job)):
            self.console.print(f"warning: {remark}", markup=False, highlight=False, soft_wrap=True)

    def refresh(self, running: list[Job], queued: int) -> None:
        if not self.console.is_terminal:
            return
        table = Table(box=None, title_justify="left", title=f"{self._done()}{self._left()}")
        for heading in ("cell", "epoch", "validation accuracy", "seconds"):
            table.add_column(heading, justify="left" if heading == "cell" else "right")
        for job in running:
            epoch = f"{int(job.row.get('epoch', 0))}/{job.epochs}"
            seconds = f"{time.monotonic() - job.started:.0f}"
            shown = "diverged" if _diverged(job) else _accuracy(job)
            table.add_row(job.name, epoch, shown, seconds)
        table.add_row(f"{queued} waiting", "", "", "")
        self.live.update(table)

    def _done(self) -> str:
        return f"{len(self.done)} of {counted(len(self.all), 'cell')}"

    def _left(self) -> str:
        known = [job for job in self.done if not job.failure]
        if not known:
            return ""
        if len(self.done) == len(self.all):
            return ""
        rest = sum(job.cost for job in self.all) - sum(job.cost for job in self.done)
        spent = sum(job.seconds for job in known) / sum(job.cost for job in known)
        return f", about {duration(rest * spent / self.jobs)} left"


def _diverged(job: Job) -> bool:
    """Whether the last epoch's losses are no numbers: `training.Recorder` ends such a training, which hasn't failed."""
    return not all(math.isfinite(job.row.get(key, 0)) for key in ("loss", "val_loss"))


def _accuracy(job: Job) -> str:
    return f"{job.row['val_accuracy']:.1%}" if "val_accuracy" in job.row else ""


def _result(job: Job) -> str:
    """What a cell that ended has reached; nothing of one that was trained before."""
    if _diverged(job):
        return f"diverged in epoch {int(job.row['epoch'])}"
    return f"validation accuracy {_accuracy(job)}" if _accuracy(job) else ""
