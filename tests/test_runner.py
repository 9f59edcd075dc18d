"""A prepared cell is taken without what a training needs."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from ablation_lab import cell, files, params, resume, runner

# As DVC calls the stage, and then what of the large libraries it has imported.
TAKE = """
import runpy, sys
sys.argv = ["stages.train", "baseline", "0"]
runpy.run_module("stages.train", run_name="__main__")
large = {"keras", "matplotlib", "mlflow", "numpy", "pandas", "scipy", "sklearn", "tensorflow"}
print(sorted(large & sys.modules.keys()))
"""
RESULT = {"status": "ok", "validation_accuracy": 0.5, "validation_loss": 1.0}


def prepared(root: Path) -> dict[str, str]:
    """A project with a cell in its place, as `ablab repro` leaves it."""
    for name in ("dvc.yaml", "src", "stages"):
        (root / name).symlink_to(ROOT / name)
    files.write_json(root / "plan/baseline.json", {"train": {}})
    files.write_json(root / runner.DATA / "card.json", {"digest": "d" * 64})
    hashes = runner.identify("baseline", 0, root)
    place = root / resume.FOLDER / hashes["cell_hash"]
    files.write_json(place / resume.READY / cell.RESULT, RESULT | hashes)
    resume.leave(place)
    return hashes


def test_a_prepared_cell_is_taken_without_large_imports(tmp_path, monkeypatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    hashes = prepared(tmp_path)
    done = subprocess.run([sys.executable, "-c", TAKE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["baseline-0: trained already", "[]"]
    kept = json.loads((tmp_path / "cells/baseline/seed-0/cell.json").read_text())
    assert kept["cell_hash"] == hashes["cell_hash"] and not (tmp_path / "mlruns").exists()
    assert json.loads((tmp_path / "validation/baseline/seed-0.json").read_text())["validation_accuracy"] == 0.5


def test_what_is_prepared_stays_until_dvc_has_it(tmp_path, monkeypatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    hashes = prepared(tmp_path)
    for _ in range(2):  # killed in between
        assert runner.take("train", "baseline", 0)
        assert cell.is_finished(tmp_path / "cells/baseline/seed-0", hashes["cell_hash"])
        assert (tmp_path / "validation/baseline/seed-0.json").exists()
    runner.taken(hashes["cell_hash"])
    assert not list((tmp_path / resume.FOLDER).glob("*/"))
    assert not runner.take("train", "baseline", 0)
    assert cell.is_finished(tmp_path / "cells/baseline/seed-0", hashes["cell_hash"])


def test_a_twin_has_the_same_seed(tmp_path):
    for name, seed, found in (("other", 1, "a"), ("other", 0, "b"), ("same", 0, "a"), ("this", 0, "a")):
        files.write_json(cell.folder(name, seed, tmp_path) / cell.RESULT, {"cell_hash": params.digest(found)})
    assert cell.finished_twin("this", 0, params.digest("a"), tmp_path) == cell.folder("same", 0, tmp_path)
    assert cell.finished_twin("this", 0, params.digest("c"), tmp_path) is None
