"""DVC called from `ablab`, and what `make repro` calls before it."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ablation_lab import errors, params
from ablation_lab.errors import LabError

DVC = [sys.executable, "-m", "dvc"]


def environment() -> dict[str, str]:
    """What DVC is called with: none of the variables that an outer DVC sets for its stages, and the environment's own
    `python` first, which stages run whether or not the user's shell has activated it."""
    found = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    found["DVC_NO_ANALYTICS"] = "1"
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{found.get('PATH', '')}"
    return found


def call(root: Path, *command: str) -> int:
    """Run DVC in a project, its output where this process' own goes; the exit status."""
    return subprocess.run([*DVC, *command], cwd=root, env=environment(), check=False).returncode


def prepare(root: Path) -> None:
    """Check params.yaml and mend DVC's list of locks, before DVC reads either.

    DVC unfolds every alias of params.yaml, without a bound on memory or time.

    Raises:
        LabError: for the mistakes in params.yaml.
    """
    params.load(root / "params.yaml")
    mend(root)


def mend(root: Path) -> None:
    """Remove DVC's list of locks where DVC was killed while it wrote it and left it empty: nobody can read it then."""
    locks = root / ".dvc/tmp/rwlock"
    for _ in range(2):
        if not locks.exists() or locks.stat().st_size:
            return
        time.sleep(0.2)  # it is empty for a moment whenever DVC writes it
    locks.unlink(missing_ok=True)


def due(root: Path, names: list[str]) -> list[str]:
    """The stages whose commands `dvc repro` would run: changed, and not in DVC's cache. What they need must be there.

    Raises:
        LabError: with DVC's own words, when another DVC is at work, for one.
    """
    from dvc.stage.cache import RunCacheNotFoundError
    from dvc_data.hashfile.hash_info import HashInfo

    found = []
    with _stages(root) as stages:
        for name in names:
            stage = stages[name]
            if not stage.changed():
                continue
            if not stage.changed_stage() and not stage.changed_deps() and stage.outs_cached():
                continue  # checked out
            stage.save_deps()
            for out in stage.outs:
                out.hash_info = HashInfo()  # what came out last time is not what comes out now
            try:
                stage.repo.stage_cache.restore(stage, dry=True)
            except RunCacheNotFoundError:
                found.append(name)
    return found


def keep(
    root: Path, makers: Mapping[str, Callable[[], bool]], kept_one: Callable[[str], None] = lambda name: None
) -> list[str]:
    """Make the outputs of stages in this process, and keep, cache and lock them as `dvc repro` does.

    DVC alone writes the whole of dvc.lock once for each stage: seconds a cell in a study of hundreds.

    Args:
        makers: what makes a stage's outputs, by its name; False where it can't.
        kept_one: called with the name of each stage whose outputs are in DVC's cache.

    Returns:
        The stages that are left to `dvc repro`.

    Raises:
        LabError: as `due`.
    """
    kept: list[Any] = []
    with _stages(root) as stages:
        try:
            for name, make in makers.items():
                stage = stages[name]
                stage.remove_outs()
                if make():
                    stage.save()
                    stage.commit()
                    kept.append(stage)
                    kept_one(name)
        finally:
            if kept:
                kept[0].dvcfile.dump_stages(kept, update_pipeline=False)
    return [name for name in makers if name not in {stage.name for stage in kept}]


def locked(root: Path) -> list[str]:
    """The stages in dvc.lock, in its order."""
    path = root / "dvc.lock"
    return re.findall(r"^  (\S+):$", path.read_text(encoding="utf-8"), re.MULTILINE) if path.exists() else []


def put_in_order(root: Path, before: list[str]) -> None:
    """Move the stages that are new in dvc.lock into the order of dvc.yaml, in which `dvc repro` adds them.

    Args:
        before: the stages that were there already; these stay where they are, as with `dvc repro`.
    """
    from dvc.utils.serialize import modify_yaml

    added = [name for name in locked(root) if name not in before]
    if not added:
        return
    with _stages(root) as stages:
        wanted = [name for name in stages if name in added]
        if wanted != added:
            with modify_yaml(root / "dvc.lock") as lock:
                for name in wanted:
                    lock["stages"][name] = lock["stages"].pop(name)


@contextlib.contextmanager
def _stages(root: Path) -> Iterator[Mapping[str, Any]]:
    """DVC's stages by name, while nobody else may change them. To load each by itself would read all files each
    time."""
    from dvc.dvcfile import PROJECT_FILE, load_file
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with contextlib.chdir(root), Repo() as repo, repo.lock:
            yield load_file(repo, PROJECT_FILE).stages
    except DvcException as error:
        raise LabError(f"DVC: {error}") from None


if __name__ == "__main__":
    with errors.explained():
        prepare(Path())
