import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TINY, new_project, passed, run, write_params

from ablation_lab import cell, verify

NOISE = {"RandomFlip": {}, "RandomRotation": {"factor": 0.1}, "RandomContrast": {"factor": 0.2}}
HEAD = {"dense1": {"units": 4, "dropout": 0.5}}
# Every builder, with augmentation and dropout on.
BUILDERS = {
    "cnn": {"builder": "cnn", "dropout": 0.25, "blocks": {"block1": {"filters": 2}}, "head": HEAD},
    "mlp": {"builder": "mlp", "head": HEAD},
    "resnet": {
        "builder": "resnet",
        "stem": {"filters": 4},
        "stages": {"one": {"filters": 4}},
        "head": HEAD,
        "features_dropout": 0.5,
    },
    "transfer": {"builder": "transfer", "backbone": "SqueezeNet", "weights": None, "trainable": "all", "head": HEAD},
    "own": {"builder": "networks.example:build", "filters": 4},
}


def test_a_cell_that_is_what_its_settings_say(trained_project: Path):
    done = run(trained_project, "ablab", "verify")
    assert (done.returncode, done.stdout) == (0, "baseline-0: the same bytes\n")
    assert not list((trained_project / "resume").glob("*/"))


def test_what_differs_is_told_and_from_where_on(trained_project: Path, tmp_path: Path):
    kept, again = trained_project / "cells/baseline/seed-0", tmp_path / "again"
    assert verify.differences(kept, kept) == []
    shutil.copytree(kept, again)
    lines = (again / cell.HISTORY).read_text().splitlines()
    second = lines[2].split(",")
    second[3] = "0.5"
    (again / cell.HISTORY).write_text("\n".join([*lines[:2], ",".join(second), *lines[3:], ""]))
    with h5py.File(again / cell.WEIGHTS, "r+") as file:
        weight = file["layers/dense/vars/0"] if "layers/dense" in file else _first(file)
        weight[...] = weight[...] + 0.5
        name = weight.name.lstrip("/")
    with np.load(again / cell.PREDICTIONS) as content:
        arrays = dict(content)
    arrays["test_probabilities"] = arrays["test_probabilities"] + 0.25
    np.savez(again / cell.PREDICTIONS, **arrays)
    result = json.loads((again / cell.RESULT).read_text())
    (again / cell.RESULT).write_text(json.dumps(result | {"best_epoch": 77}))
    found = {line.partition(":")[0]: line.partition(": ")[2] for line in verify.differences(kept, again)}
    was = (kept / cell.HISTORY).read_text().splitlines()[2].split(",")[3]
    assert found[cell.HISTORY] == f"from epoch 2 on: val_loss {was}, now 0.5"
    assert found[cell.WEIGHTS] == f"{name} by 0.5"
    assert found[cell.PREDICTIONS] == "test_probabilities by 0.25"
    assert found[cell.RESULT] == f"best_epoch {result['best_epoch']}, now 77"
    assert found.keys() == {cell.HISTORY, cell.WEIGHTS, cell.PREDICTIONS, cell.RESULT}
    (again / cell.ARCHITECTURE).unlink()
    assert f"{cell.ARCHITECTURE}: not there" in verify.differences(again, kept)


def test_damaged_files_are_told(trained_project: Path, tmp_path: Path):
    kept, again = trained_project / "cells/baseline/seed-0", tmp_path / "again"
    shutil.copytree(kept, again)
    for name in (cell.PREDICTIONS, cell.WEIGHTS):
        content = (again / name).read_bytes()
        (again / name).write_bytes(content[: len(content) // 2])
    assert [line.partition(" (")[0] for line in verify.differences(again, kept)] == [
        f"{cell.WEIGHTS}: can't be read",
        f"{cell.PREDICTIONS}: can't be read",
    ]


def _first(file: h5py.File) -> h5py.Dataset:
    found: list = []
    file.visititems(lambda name, one: found.append(one) if isinstance(one, h5py.Dataset) and one.ndim else None)
    return found[0]


@pytest.mark.slow
def test_a_cell_that_was_altered_fails(trained_project: Path, tmp_path: Path):
    project = tmp_path / "project"
    shutil.copytree(trained_project, project, symlinks=True)
    history = project / "cells/no_dropout/seed-1/history.csv"
    history.write_text(history.read_text().replace("\n1,", "\n1,9"))
    timing = project / "cells/no_dropout/seed-1/timing.json"
    made = json.loads(timing.read_text())
    made["made"]["ablab.keras"] = "3.0.0"
    timing.write_text(json.dumps(made))
    done = run(project, "ablab", "verify", "baseline-1", "no_dropout-1")
    assert done.returncode == 1
    assert "baseline-1: the same bytes\n" in done.stdout
    assert "no_dropout-1: differs\n  history.csv: from epoch 1 on: loss 9" in done.stdout
    assert "It was trained with keras 3.0.0" in done.stdout


def test_a_cell_that_there_is_not_or_that_is_old_is_told(trained_project: Path, tmp_path: Path):
    project = tmp_path / "project"
    shutil.copytree(trained_project, project, symlinks=True)
    done = run(project, "ablab", "verify", "basline-0")
    assert done.returncode == 1
    assert "Expected a variant with a seed: baseline-0, baseline-1, no_dropout-0" in done.stderr
    assert "Found: basline-0" in done.stderr
    plan = project / "plan/baseline.json"
    plan.write_text(plan.read_text().replace('"epochs": 2', '"epochs": 3'))
    done = run(project, "ablab", "verify")
    assert "baseline-0: Expected a cell made from today's plan, data and code. Found: an older one." in done.stderr
    shutil.rmtree(project / "cells/no_dropout/seed-0")
    done = run(project, "ablab", "verify", "no_dropout-0")
    assert "Run `dvc repro` to make it." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("builder", BUILDERS)
def test_every_builder_with_augmentation_and_dropout(builder: str, tmp_path: Path):
    project = new_project(tmp_path / "project")
    study = TINY | {"model": BUILDERS[builder], "input": {"rescale": "unit", "augment": NOISE}, "seeds": [3]}
    study = study | {"variants": {"baseline": {}, "slower": {"train": {"optimizer": {"learning_rate": 0.001}}}}}
    if builder == "transfer":
        data = TINY["data"] | {"image_size": [32, 32], "color": "rgb"}
        study = study | {"data": data, "input": {"rescale": "backbone", "augment": NOISE}}
        phase = {"last": {"model": {"trainable": {"last": 4}}}}
        study["finetune"] = {"select": {"by": "validation_accuracy"}, "variants": phase}
    write_params(project, study)
    passed(run(project, "dvc", "repro"))
    told = passed(run(project, "ablab", "verify", "--all"))
    assert told.count("the same bytes") == (3 if builder == "transfer" else 2)
