"""Where a cell is while it is trained: a folder of its own, `resume/<cell hash>/` below the project's root.

There a training keeps its state (`checkpoint.py`), and there it leaves the finished cell as a whole, which is then
moved to where DVC wants it. So a training that was killed goes on, and one whose result nobody has taken (DVC was
killed, and not what it had started) is not done again.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ablation_lab import files

FOLDER = "resume"
READY = "cell"  # the finished cell in its place
FORGOTTEN = 30 * 24 * 3600  # seconds after which a place that nobody has asked for goes


@contextmanager
def alone(variant: str, seed: int, root: Path = Path()) -> Iterator[None]:
    """Let no other process make the same cell's folder: wait until one that does is done.

    After a `kill -9` of DVC, which ends DVC and not what it has started, the training goes on without it.
    """
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    lock, who = FileLock(folder / f"{variant}-{seed}.lock"), folder / f"{variant}-{seed}.pid"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        pid = who.read_text() if who.exists() else "unknown"
        print(f"{variant}-{seed} is being trained here already, by process {pid}: waiting for its result", flush=True)
        lock.acquire()
    try:
        who.write_text(str(os.getpid()))
        yield
    finally:
        who.unlink(missing_ok=True)
        lock.release()


@contextmanager
def place(cell_hash: str, wait: bool = False) -> Iterator[Path]:
    """A cell's place, for one process at a time.

    Args:
        cell_hash: all that fixes the cell's result; another setting is another place.
        wait: for another process that has the place; else this one gets a place for itself, without what was kept.
    """
    root = files.root() / FOLDER
    root.mkdir(exist_ok=True)
    _forget(root)
    lock, found = FileLock(root / f"{cell_hash}.lock"), root / cell_hash
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        found = root / f"{cell_hash}.{os.getpid()}"
    try:
        yield found
    finally:
        lock.release()


def take(place: Path, out: Path) -> None:
    """Move the finished cell from its place to a folder, whatever was there, and give the place up."""
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(place / READY, out)
    shutil.rmtree(place, ignore_errors=True)


def _forget(root: Path) -> None:
    for old in root.glob("*/"):
        with suppress(OSError, Timeout), FileLock(root / f"{old.name[:64]}.lock", timeout=0):
            if time.time() - old.stat().st_mtime > FORGOTTEN:
                shutil.rmtree(old, ignore_errors=True)
