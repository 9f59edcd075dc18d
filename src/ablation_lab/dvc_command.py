"""DVC called from `ablab`."""

import contextlib
import os
import sys
from pathlib import Path

DVC = [sys.executable, "-m", "dvc"]


def environment() -> dict[str, str]:
    """What DVC is called with: none of the variables that an outer DVC sets for its stages, and the environment's own
    `python` first, which stages run whether or not the user's shell has activated it."""
    found = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    found["DVC_NO_ANALYTICS"] = "1"
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{found.get('PATH', '')}"
    return found


def mend(root: Path) -> None:
    """Remove DVC's list of locks where DVC was killed while it wrote it and left it empty: nobody can read it then."""
    locks = root / ".dvc/tmp/rwlock"
    if locks.exists() and not locks.stat().st_size:
        locks.unlink()


def due(root: Path, names: list[str]) -> list[str]:
    """The stages that `dvc repro` would run the commands of: changed, and not in the run cache. Their dependencies must
    be up to date."""
    from dvc.repo import Repo
    from dvc.stage.cache import RunCacheNotFoundError
    from dvc_data.hashfile.hash_info import HashInfo

    found = []
    with contextlib.chdir(root), Repo() as repo, repo.lock:
        for name in names:
            stage = repo.stage.load_one(name=name)
            if not stage.changed():
                continue
            stage.save_deps()
            for out in stage.outs:
                out.hash_info = HashInfo()  # what came out last time is not what comes out now
            try:
                repo.stage_cache.restore(stage, dry=True)
            except RunCacheNotFoundError:
                found.append(name)
    return found
