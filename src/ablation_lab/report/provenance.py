"""Where the numbers come from: what each cell was trained with, as its own `timing.json` tells it.

Nothing in it is of the moment in which the report is made, so that the same inputs give the same bytes.
"""

from pathlib import Path
from typing import Any

from ablation_lab import cell, files
from ablation_lab.params import Params
from ablation_lab.report.results import Material

VERSIONS = ("python", "tensorflow", "keras", "numpy", "dvc", "mlflow")


def gather(study: Params, material: Material, root: Path) -> dict[str, Any]:
    """What `provenance.json` holds. What a cell does not tell, as one that was trained without git, is None."""
    cells: dict[str, dict[str, Any]] = {name: {} for name in study.variants}
    for name, seed in (one for one in study.cells if one in material.cells):
        timing = files.read_json(cell.folder(name, seed, root) / cell.TIMING)
        made = timing.get("made", {})
        cells[name][str(seed)] = {
            "cell_hash": material.cells[name, seed]["cell_hash"],
            "plan_hash": material.cells[name, seed]["plan_hash"],
            "commit": made.get("git.commit"),
            "dirty": {"true": True, "false": False}.get(made.get("git.dirty")),
            "experiment": made.get("dvc.exp_name"),
            "host": made.get("ablab.host"),
            "platform": made.get("ablab.platform"),
            "device": timing.get("device"),
            "threads": timing.get("threads"),
            "versions": {one: made.get(f"ablab.{one}") for one in VERSIONS},
        }
    data = {key: material.card[key] for key in ("name", "digest")}
    return {"study": study.study.name, "data": data, "cells": cells}
