"""Where a cell is while it is trained: a folder of its own, `resume/<cell hash>/` below the project's root.

There a training keeps its state (`checkpoint.py`), and there it leaves the finished cell as a whole, which is then
moved to where DVC wants it. So a training that was killed goes on, and one whose result nobody has taken (DVC was
killed, and not what it had started) is not done again.
"""

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ablation_lab import cell, files

FOLDER = "resume"
READY = "cell"  # the finished cell in its place
SUMS = "sums.json"  # of a finished cell's files, beside it: what is left for later is checked
FORGOTTEN = 30 * 24 * 3600  # seconds after which a place that nobody has asked for goes


@contextmanager
def alone(variant: str, seed: int, root: Path = Path()) -> Iterator[bool]:
    """Let no other process make the same cell's folder: wait until one that does is done.

    After a `kill -9` of DVC, which ends DVC and not what it has started, the training goes on without it.

    Yields:
        Whether there was such a process.
    """
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    lock, who = FileLock(folder / f"{variant}-{seed}.lock"), folder / f"{variant}-{seed}.pid"
    waited = False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waited, pid = True, "unknown"
        with suppress(OSError):
            pid = who.read_text()
        print(f"{variant}-{seed} is being trained here already, by process {pid}: waiting for its result", flush=True)
        lock.acquire()
    try:
        who.write_text(str(os.getpid()))
        yield waited
    finally:
        who.unlink(missing_ok=True)
        lock.release()


@contextmanager
def place(cell_hash: str, wait: bool = False) -> Iterator[Path]:
    """A cell's place, for one process at a time.

    Args:
        cell_hash: all that fixes the cell's result; another setting is another place.
        wait: for another process that has the place; else this one gets a place for itself, without what was kept, that
            goes afterwards.
    """
    root = files.root() / FOLDER
    root.mkdir(exist_ok=True)
    _forget(root)
    lock = FileLock(root / f"{cell_hash}.lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        with tempfile.TemporaryDirectory(prefix=f"{cell_hash}.", dir=root) as own:
            yield Path(own) / "place"
        return
    try:
        yield root / cell_hash
    finally:
        lock.release()


def is_ready(place: Path, cell_hash: str) -> bool:
    """Whether a finished cell was left here, as a whole: each of its files is checked."""
    try:
        sums = json.loads((place / SUMS).read_text(encoding="utf-8"))
        return cell.is_finished(place / READY, cell_hash) and sums == _sums(place / READY)
    except (OSError, ValueError):
        return False


def leave(place: Path) -> None:
    """Leave the finished cell for later."""
    part = place / f"{SUMS}.part"
    files.write_json(part, _sums(place / READY))
    part.replace(place / SUMS)
    files.flush(place)


def _sums(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): files.sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def take(place: Path, out: Path) -> None:
    """Move the finished cell from its place to a folder, whatever was there, and give the place up."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        shutil.rmtree(out)
    try:
        (place / READY).rename(out)
    except OSError as error:
        if error.errno != errno.EXDEV:  # another disk
            raise
        with files.whole(out) as part:
            shutil.copytree(place / READY, part, dirs_exist_ok=True)
    drop(place)


def copy(place: Path, out: Path) -> None:
    """Have the finished cell in a folder too, whatever was there; by links, where the disk has them."""
    shutil.rmtree(out, ignore_errors=True)
    with files.whole(out) as part:
        shutil.copytree(place / READY, part, dirs_exist_ok=True, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def drop(place: Path) -> None:
    """Remove a place with all that is in it; what a kill leaves of it is no finished cell, and of states the last."""
    (place / SUMS).unlink(missing_ok=True)
    for state in sorted(place.glob("state/*.npz")):
        state.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)


def _forget(root: Path) -> None:
    for old in root.glob("*/"):
        with suppress(OSError, Timeout):
            if time.time() - old.stat().st_mtime > FORGOTTEN:
                with FileLock(root / f"{old.name[:64]}.lock", timeout=0):
                    drop(old)
