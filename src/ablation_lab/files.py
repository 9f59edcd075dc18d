"""Where things are and how JSON is read and written: what every stage shares."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

from ablation_lab import errors
from ablation_lab.errors import LabError


def root() -> Path:
    """The project's folder: `DVC_ROOT` when set, else the nearest one with a dvc.yaml at or above the current one.

    In DVC's temporary experiments this is the main repository, which holds what experiments share: MLflow's store, the
    user's pictures. What a stage reads and writes lies in the current folder instead.
    """
    if os.environ.get("DVC_ROOT"):
        return Path(os.environ["DVC_ROOT"])
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").exists()), here)


def mirror() -> str | None:
    """`ABLAB_DATA_MIRROR`: a base URL, or a folder (a relative one is looked up under the root)."""
    place = os.environ.get("ABLAB_DATA_MIRROR", "").rstrip("/")
    return place if not place or is_url(place) else str(root() / Path(place.removeprefix("file://")).expanduser())


def cache() -> Path:
    """Where downloads are kept for the next time: `ABLAB_CACHE`, else the platform's cache folder."""
    return Path(os.environ.get("ABLAB_CACHE") or platformdirs.user_cache_path("ablation-lab"))


def is_url(place: str) -> bool:
    """Whether a place is an address rather than a folder."""
    return place.startswith(("http://", "https://"))


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Read a stage's output.

    Raises:
        LabError: when it is missing or broken, with the command that makes it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing(path) from None
    except ValueError as error:
        raise LabError(f"{path}: Expected JSON. Found: {error}. Run `dvc repro` to make it again.") from None


def missing(path: Path) -> LabError:
    """The error for a result that an earlier stage has not made."""
    what = "file" if path.parent.exists() else "folder"
    return LabError(
        f"{path}: Expected a result of an earlier stage. Found: no such {what}. Run `dvc repro` to make it."
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON, the same bytes for the same value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def flush(folder: Path) -> None:
    """See to it that a folder's files are on the disk, so that a power loss can't leave half of what has its name."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        opened = os.open(path, os.O_RDONLY)  # a folder's names are on the disk when the folder is
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def whole(folder: Path, by: str = "") -> Iterator[Path]:
    """A folder to fill that gets its name only when the block ends well; until then, what has that name stays.

    It stays too when the process is stopped while the one replaces the other: that is two renames, and the first is
    taken back.

    Args:
        by: part of the unfinished folder's name, where several processes may be filling one.
    """
    part, old = (folder.with_name(folder.name + ending) for ending in (f"{by}.part", ".old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed in between
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except Exception as error:
        error.add_note(f"{errors.WRITING}{folder}")  # who writes to a file that is open doesn't tell which
        raise
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
