"""MLflow made to agree with DVC's files: every cell of the study has one finished run with the final metrics."""

import csv
from pathlib import Path

from ablation_lab import cell, files, params, selection, tracking

# A run's final metrics, and their columns in evaluation/cells.csv.
FINAL = {name: name for name in ("train_accuracy", "best_epoch", "validation_accuracy", "test_accuracy", "test_loss")}
# The last three are of two classes.
FINAL |= {key: f"test_{key}" for key in ("macro_f1", "precision", "recall", "roc_auc")}


def sync(root: Path = Path()) -> dict[str, str]:
    """Close the runs whose process died, then go through the evaluated cells, in the order of the study.

    Raises:
        LabError: when MLflow's store does not work.
    Returns:
        MLflow's run ids by cell, for the receipt.
    """
    study = selection.both_phases(params.load(root / "params.yaml"), root)
    with (root / "evaluation" / "cells.csv").open(encoding="utf-8", newline="") as file:
        scores = {(row["variant"], int(row["seed"])): row for row in csv.DictReader(file)}
    receipt = {}
    tracking.close_orphans(study.study.name)
    for name, seed in study.cells:
        folder = cell.folder(name, seed, root)
        result = files.read_json(folder / cell.RESULT)
        plan = files.read_json(cell.plan_file(name, root))
        identity = tracking.Identity(study.study.name, name, seed, result["cell_hash"], plan)
        row = scores[name, seed]
        final = {key: float(row[column]) for key, column in FINAL.items() if row.get(column)}
        receipt[identity.name] = tracking.sync(identity, cell.history(folder), final)
    return receipt
