"""One cell from its plan to its folder: trained, or taken from where it is already, and tracked in MLflow.

TensorFlow is imported when there is something to train.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ablation_lab import cell, files, resume
from ablation_lab.tracking import live

DATA = Path("data/processed")
Told = Callable[[dict[str, float]], None]


def run_cell(variant: str, seed: int, root: Path = Path()) -> dict[str, Any] | None:
    """Make a cell's folder, all of it or nothing.

    Its training was finished before (`prepare`), goes on where it was killed, or is done now.

    Returns:
        What `cell.json` holds. None when whoever started this process is gone: then the finished cell stays in its
        place, as it will be asked for again.
    """
    parent = os.getppid()
    out = cell.folder(variant, seed, root)
    with resume.alone(variant, seed, root) as waited:
        hashes = identify(variant, seed, root)
        if waited and cell.is_finished(out, hashes["cell_hash"]):
            print(f"{variant}-{seed}: trained by that process")
            return files.read_json(out / cell.RESULT)
        with resume.place(hashes["cell_hash"]) as place:
            make(variant, seed, hashes, place, root)
            result = files.read_json(place / resume.READY / cell.RESULT)
            if os.getppid() != parent:
                resume.leave(place)
                return None
            resume.take(place, out)
    return result


def prepare(
    variant: str,
    seed: int,
    root: Path = Path(),
    told: Told = lambda row: None,
    tracked: bool = True,
    made: dict[str, str] | None = None,
) -> None:
    """Train a cell and leave it in its place, from where its stage takes it.

    Args:
        told: called after each epoch with its row of `history.csv` and `epoch_seconds`.
        tracked: whether MLflow is told while it is trained; if not, the stage `track` tells it all.
        made: what this process can't know of what the cell is made with, such as the commit on another machine.
    """
    hashes = identify(variant, seed, root)
    wanted, out = hashes["cell_hash"], cell.folder(variant, seed, root)
    before = cell.is_finished(out, wanted)
    with resume.place(wanted, wait=True) as place:
        if not before and cell.is_finished(out, wanted):
            return  # by the process that was waited for
        make(variant, seed, hashes, place, root, told, tracked, made)
        resume.leave(place)


def take(stage: str, variant: str, seed: int, root: Path = Path()) -> bool:
    """Have what a stage, `train` or `finetune`, makes of a prepared cell; it stays in its place until DVC has it
    (`taken`). False where the cell isn't prepared: one that equals it has taken it, say."""
    with resume.alone(variant, seed, root):
        wanted = identify(variant, seed, root)["cell_hash"]
        with resume.place(wanted) as place:
            if not resume.is_ready(place, wanted):
                return False
            result = files.read_json(place / resume.READY / cell.RESULT)
            resume.copy(place, cell.folder(variant, seed, root))
    if stage == "train":
        cell.write_validation(variant, seed, result, root)
    return True


def taken(cell_hash: str) -> None:
    """Give a cell's place up."""
    with resume.place(cell_hash) as place:
        resume.drop(place)


def identify(variant: str, seed: int, root: Path = Path()) -> dict[str, str]:
    """The hashes that `cell.json` holds."""
    card = files.read_json(root / DATA / "card.json")
    return cell.hashes(files.sha256(cell.plan_file(variant, root)), seed, card["digest"], root)


def make(
    variant: str,
    seed: int,
    hashes: dict[str, str],
    place: Path,
    root: Path,
    told: Told = lambda row: None,
    tracked: bool = True,
    made: dict[str, str] | None = None,
) -> None:
    """Train a cell in its place, unless it is there. A cell that another variant has finished already, under the same
    plan, data, code and seed, is shared. A cell of the second phase starts from the weights of the selected variant's
    cell with the same seed."""
    ready = place / resume.READY
    if resume.is_ready(place, hashes["cell_hash"]):
        print(f"{variant}-{seed}: trained already")
        return
    plan, card = files.read_json(cell.plan_file(variant, root)), files.read_json(root / DATA / "card.json")
    told_of = (hashes["cell_hash"], hashes["variant_hash"], plan, card, live.provenance() | (made or {}))
    identity = live.Identity(cell.study_name(root), variant, seed, *told_of)
    with live.cell_run(identity) if tracked else nullcontext() as run:
        twin = cell.finished_twin(variant, seed, hashes["cell_hash"], root)
        with files.whole(ready) as folder:
            if twin:
                print(f"{identity.name}: the same training as {twin.parent.name}-{seed}, result shared")
                shutil.copytree(twin, folder, dirs_exist_ok=True)
                if run:
                    for row in cell.history(folder):
                        run.epoch(row)
            else:

                def report(row: dict[str, float]) -> None:
                    if run:
                        run.epoch(row)
                    told(row)

                _train(identity, hashes, place, folder, report, root)
            files.flush(folder)
        result = files.read_json(ready / cell.RESULT)
        if run:
            run.metrics({key: result[key] for key in ("train_accuracy", "validation_accuracy", "best_epoch")})
            run.outcome = result["status"]


def _train(
    identity: live.Identity, hashes: dict[str, str], place: Path, folder: Path, report: Told, root: Path
) -> None:
    from ablation_lab import training

    start = cell.start(identity.seed, root) if "start" in identity.plan else None
    how = (identity.name, report, start, place / "state")
    result = training.train(identity.plan, identity.seed, root / DATA, folder, *how)
    files.write_json(folder / cell.RESULT, result | hashes)
    timing = files.read_json(folder / cell.TIMING)
    files.write_json(folder / cell.TIMING, timing | {"made": identity.made})
