"""Is a cell what its settings say? It is trained once more in a clean place and compared byte for byte."""

import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from ablation_lab import cell, files, params, resume, runner
from ablation_lab.dvc_command import environment
from ablation_lab.errors import LabError
from ablation_lab.tracking import live

COMPARED = (cell.HISTORY, cell.WEIGHTS, cell.PREDICTIONS, cell.UNTRAINED, cell.ARCHITECTURE, cell.RESULT)
NAMED = 3  # of the weights that differ
# The project's own code, whatever is installed: a cell's hash covers it.
TRAINING = """
import sys
sys.path.insert(0, "src")
from ablation_lab import verify
verify.train_again(sys.argv[1], int(sys.argv[2]), sys.argv[3])
"""


def verify(names: list[str], root: Path, every: bool = False) -> int:
    """Verify cells one after the other, and print of each whether it is the same, or what differs.

    Args:
        names: as in MLflow, such as `no_dropout-0`; by default the baseline with the study's first seed.
        every: all cells of the study.

    Returns:
        0 when all are the same, else 1.

    Raises:
        LabError: for a cell that there isn't, or that is not up to date.
    """
    study = params.load(root / "params.yaml")
    variants = [*study.variants, *study.second_names]
    seeds = {f"{variant}-{seed}": (variant, seed) for variant in variants for seed in study.seeds}
    for name in names:
        if name not in seeds:
            raise LabError(f"CELL: Expected a variant with a seed: {', '.join(seeds)}. Found: {name}.")
    chosen = list(seeds) if every else names or [f"{study.study.baseline}-{study.seeds[0]}"]
    for name in chosen:
        _up_to_date(name, *seeds[name], root)
    different = 0
    scratch = root / resume.FOLDER  # on the project's disk: features may take gigabytes
    scratch.mkdir(exist_ok=True)
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="verify-", dir=scratch) as place:
            command = [sys.executable, "-c", TRAINING, seeds[name][0], str(seeds[name][1]), place]
            done = subprocess.run(command, cwd=root, env=environment(), check=False)
            if done.returncode:
                raise LabError(f"{name}: Expected a training that ends well. Found: the messages above.")
            found = differences(cell.folder(*seeds[name], root), Path(place) / "cell")
        different += bool(found)
        print(f"{name}: {'differs' if found else 'the same bytes'}" + "".join(f"\n  {line}" for line in found))
        if found and (elsewhere := _made_elsewhere(cell.folder(*seeds[name], root))):
            print(f"  It was trained with {elsewhere}: that may be why (docs/reproducibility.md).")
    return 1 if different else 0


def train_again(variant: str, seed: int, place: str) -> None:
    """Train a cell into a folder `cell` of an empty place, untracked, with nothing from any cache.

    Called in a process of its own, since how many threads TensorFlow has is fixed before its first operation.
    """
    from ablation_lab import errors, training

    with errors.explained():
        plan = files.read_json(cell.plan_file(variant))
        start = cell.start(seed) if "start" in plan else None
        out = Path(place) / "cell"
        out.mkdir()
        features = Path(place) / "features"
        result = training.train(
            plan, seed, runner.DATA, out, f"{variant}-{seed}", lambda row: None, start, features=features
        )
        files.write_json(out / cell.RESULT, result | runner.identify(variant, seed))


def differences(kept: Path, again: Path) -> list[str]:
    """What of a cell's files is not the same in another folder, a line each, and where it begins."""
    found = []
    for name in COMPARED:
        if not (kept / name).exists():
            found.append(f"{name}: not there")
        elif (kept / name).read_bytes() != (again / name).read_bytes():
            found.append(f"{name}: {_told(kept / name, again / name)}")
    return found


def _told(kept: Path, again: Path) -> str:
    tellers = {".csv": _epochs, ".h5": _weights, ".npz": _arrays, ".json": _keys}
    try:
        return tellers[kept.suffix](kept, again)
    except (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        return f"can't be read ({str(error).partition(chr(10))[0]})"


def _epochs(kept: Path, again: Path) -> str:
    first, second = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in (kept, again))
    for number, (one, other) in enumerate(zip(first.to_dict("records"), second.to_dict("records"), strict=False), 1):
        changed = [f"{key} {one[key]}, now {other.get(key)}" for key in one if one[key] != other.get(key)]
        if changed:
            return f"from epoch {number} on: {', '.join(changed)}"
    return f"{len(first)} epochs, now {len(second)}"


def _weights(kept: Path, again: Path) -> str:
    first, second = _datasets(kept), _datasets(again)
    if first.keys() != second.keys():
        return "other layers"
    apart = {name: _apart(first[name], second[name]) for name in first}
    return _ranked({name: value for name, value in apart.items() if value})


def _datasets(path: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, one: found.update({name: one[()]}) if isinstance(one, h5py.Dataset) else None)
    return found


def _arrays(kept: Path, again: Path) -> str:
    with kept.open("rb") as one, again.open("rb") as other:  # NumPy leaves what is broken open
        first, second = np.load(one, allow_pickle=False), np.load(other, allow_pickle=False)
        if sorted(first) != sorted(second):
            return "other arrays"
        apart = {name: _apart(first[name], second[name]) for name in first}
    return _ranked({name: value for name, value in apart.items() if value})


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    if one.shape != other.shape:
        return float("inf")
    same = np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return 0.0 if same else float(np.nan_to_num(np.abs(one.astype(float) - other.astype(float)), nan=np.inf).max())


def _ranked(apart: dict[str, float]) -> str:
    if not apart:
        return "equal numbers, written otherwise"
    most = sorted(apart, key=lambda name: -apart[name])[:NAMED]
    more = f" and {len(apart) - NAMED} more" if len(apart) > NAMED else ""
    return ", ".join(f"{name} by {apart[name]:.2g}" for name in most) + more


def _keys(kept: Path, again: Path) -> str:
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in (kept, again))
    changed = [key for key in first.keys() | second.keys() if first.get(key) != second.get(key)]
    return ", ".join(f"{key} {_short(first.get(key))}, now {_short(second.get(key))}" for key in sorted(changed))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 30 else f"{text[:30]}…"


def _up_to_date(name: str, variant: str, seed: int, root: Path) -> None:
    there = files.read_json(cell.folder(variant, seed, root) / cell.RESULT)
    if there.get("cell_hash") != runner.identify(variant, seed, root)["cell_hash"]:
        raise LabError(
            f"{name}: Expected a cell made from today's plan, data and code. Found: an older one. Run `dvc repro`."
        )


def _made_elsewhere(folder: Path) -> str:
    """What a cell was trained with, as far as it is not what is here."""
    made, here = files.read_json(folder / cell.TIMING).get("made", {}), live.provenance()
    keys = ("ablab.platform", "ablab.python", "ablab.tensorflow", "ablab.keras", "ablab.numpy")
    return ", ".join(
        f"{key.partition('.')[2]} {made[key]}" for key in keys if made.get(key) not in (None, here.get(key))
    )
