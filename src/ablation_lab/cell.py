"""A cell: one variant trained with one seed. Its identity, its folder, its files."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ablation_lab import files
from ablation_lab.errors import LabError

# What training writes; equal cells have equal bytes in all of them but TIMING.
WEIGHTS = "network.weights.h5"
ARCHITECTURE = "architecture.json"
HISTORY = "history.csv"
PREDICTIONS = "predictions.npz"
UNTRAINED = "untrained.npz"  # probabilities of a few test pictures before training, and their positions in that part
RESULT = "cell.json"
TIMING = "timing.json"

VALIDATION = "validation"  # results on the validation part, see validation_file
SELECTION = "selection"  # where the second phase's plans are, once the first phase's best variant is known


def folder(variant: str, seed: int, root: Path = Path()) -> Path:
    """Where a cell's files are."""
    return root / "cells" / variant / f"seed-{seed}"


def plan_file(variant: str, root: Path = Path(), what: str = "") -> Path:
    """Where a variant's plan is: that of the first phase or, of what was selected, that of the second.

    Args:
        what: `networks/` for what is worth knowing, nothing for what fixes a result.
    """
    planned = root / "plan" / f"{what}{variant}.json"
    selected = root / SELECTION / f"{what}{variant}.json"
    return selected if selected.exists() and not planned.exists() else planned


def validation_file(variant: str, seed: int, root: Path = Path()) -> Path:
    """Where a first-phase cell's result on the validation part is.

    It is an output of `train` of its own: `select` depends on these alone, since the second phase's cells, which come
    out of its choice, lie beside those of the first.
    """
    return root / VALIDATION / variant / f"seed-{seed}.json"


def write_validation(variant: str, seed: int, result: dict[str, Any], root: Path = Path()) -> None:
    """Write what `select` chooses by."""
    keys = ("status", "validation_accuracy", "validation_loss", "cell_hash")
    files.write_json(validation_file(variant, seed, root), {key: result[key] for key in keys})


def start(seed: int, root: Path = Path()) -> Path:
    """The weights that the second phase's cells of a seed start from.

    Raises:
        LabError: when they are not those that were selected.
    """
    selected = files.read_json(start_file(seed, root))
    path = folder(selected["variant"], seed, root) / WEIGHTS
    if not path.exists():
        raise files.missing(path)
    if files.sha256(path) != selected["sha256"]:
        raise LabError(f"{path}: Expected the weights that were selected. Found: others. Run `dvc repro`.")
    return path


def start_file(seed: int, root: Path = Path()) -> Path:
    """Where the cell that the second phase starts from is named, with the sha256 of its weights."""
    return root / SELECTION / "start" / f"seed-{seed}.json"


def study_name(root: Path = Path()) -> str:
    """The current study's name."""
    return YAML(typ="safe", pure=True).load((root / "params.yaml").read_text(encoding="utf-8"))["study"]["name"]


def training_code(root: Path = Path()) -> dict[str, str]:
    """The library's files that the `train` stage depends on, as dvc.yaml lists them, each with its sha256; those of
    `finetune` are the same."""
    pipeline = YAML(typ="safe", pure=True).load((root / "dvc.yaml").read_text(encoding="utf-8"))
    paths = sorted(path for path in pipeline["stages"]["train"]["deps"] if path.startswith("src/"))
    return {path: hashlib.sha256((root / path).read_bytes()).hexdigest() for path in paths}


def cell_hash(plan_hash: str, seed: int | None, data_digest: str, code: dict[str, str]) -> str:
    """The sha256 of all that fixes a cell's result: resolved configuration, seed, processed data and training code.

    Without a seed it is what a variant's cells have in common.
    """
    identity = {"plan": plan_hash, "seed": seed, "data": data_digest, "code": code}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def hashes(plan_hash: str, seed: int, data_digest: str, root: Path = Path()) -> dict[str, str]:
    """By which `cell.json` tells what a cell was made from; `variant_hash` is what a variant's cells have in common."""
    code = training_code(root)
    cell, variant = (cell_hash(plan_hash, one, data_digest, code) for one in (seed, None))
    return {"cell_hash": cell, "variant_hash": variant, "plan_hash": plan_hash, "data_digest": data_digest}


def is_finished(folder: Path, wanted: str) -> bool:
    """Whether a folder holds the finished cell with this hash."""
    try:
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))["cell_hash"] == wanted
    except (OSError, ValueError, KeyError):
        return False  # another process is writing it, say


def history(folder: Path) -> list[dict[str, float]]:
    """A cell's epochs: the rows of `history.csv`, each with its `epoch_seconds`."""
    seconds = files.read_json(folder / TIMING)["epoch_seconds"]
    with (folder / HISTORY).open(encoding="utf-8", newline="") as file:
        rows = [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)]
    return [row | {"epoch_seconds": spent} for row, spent in zip(rows, seconds, strict=True)]


def finished_twin(variant: str, seed: int, wanted: str, root: Path = Path()) -> Path | None:
    """Another folder that holds the finished cell with this hash: a variant that resolves to the same network."""
    for found in sorted(root.glob(f"cells/*/seed-{seed}")):
        if found.parent.name != variant and is_finished(found, wanted):
            return found
    return None
