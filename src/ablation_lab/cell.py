"""A cell: one variant trained with one seed. Its identity, its folder, its files."""

import csv
import hashlib
import json
from pathlib import Path

from ruamel.yaml import YAML

from ablation_lab import files

# What training writes; equal cells have equal bytes in all of them but TIMING.
WEIGHTS = "network.weights.h5"
ARCHITECTURE = "architecture.json"
HISTORY = "history.csv"
PREDICTIONS = "predictions.npz"
UNTRAINED = "untrained.npz"  # probabilities of a few test pictures before training, and their positions in that part
RESULT = "cell.json"
TIMING = "timing.json"


def folder(variant: str, seed: int, root: Path = Path()) -> Path:
    """Where a cell's files are."""
    return root / "cells" / variant / f"seed-{seed}"


def training_code(root: Path = Path()) -> dict[str, str]:
    """The source files that the `train` stage depends on, as dvc.yaml lists them, each with its sha256."""
    pipeline = YAML(typ="safe", pure=True).load((root / "dvc.yaml").read_text(encoding="utf-8"))
    paths = sorted(path for path in pipeline["stages"]["train"]["deps"] if path.endswith(".py"))
    return {path: hashlib.sha256((root / path).read_bytes()).hexdigest() for path in paths}


def cell_hash(plan_hash: str, seed: int, data_digest: str, code: dict[str, str]) -> str:
    """The sha256 of all that fixes a cell's result: resolved configuration, seed, processed data and training code."""
    identity = {"plan": plan_hash, "seed": seed, "data": data_digest, "code": code}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def history(folder: Path) -> list[dict[str, float]]:
    """A cell's epochs: the rows of `history.csv`, each with its `epoch_seconds`."""
    seconds = files.read_json(folder / TIMING)["epoch_seconds"]
    with (folder / HISTORY).open(encoding="utf-8", newline="") as file:
        rows = [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)]
    return [row | {"epoch_seconds": spent} for row, spent in zip(rows, seconds, strict=True)]


def finished_twin(cells: Path, here: Path, wanted: str) -> Path | None:
    """Another folder that holds the finished cell with this hash: a variant that resolves to the same network."""
    for result in sorted(cells.glob(f"*/seed-*[0-9]/{RESULT}")):  # not the .part of another process
        if result.parent == here:
            continue
        try:
            if json.loads(result.read_text(encoding="utf-8"))["cell_hash"] == wanted:
                return result.parent
        except (OSError, ValueError, KeyError):
            continue  # another process is writing it
    return None
