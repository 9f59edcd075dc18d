import copy
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, agree, client_of, environment, new_project, passed, run, write_params
from ruamel.yaml import YAML
from test_killed import content

from ablation_lab import parallel
from ablation_lab.dvc_command import due, put_in_order
from ablation_lab.jobs import Job

BROKEN = """
from keras import Model, layers, saving

@saving.register_keras_serializable()
class Broken(layers.Layer):
    def call(self, x, training=False):
        if training:
            raise MemoryError("no room for this")
        return x

def build(image_shape, classes):
    inputs = layers.Input(image_shape)
    return Model(inputs, layers.Dense(classes, activation="softmax")(layers.Flatten()(Broken()(inputs))))
"""


# In dvc.lock, the hash and the size of a dependency or an output that has times in it.
TIMED = re.compile(r"(    - path: (?:cells|evaluation|reports)\b.*\n      hash: md5\n)      md5: .*\n      size: .*\n")


def phases() -> dict:
    """Four cells, two of which are the same training, and a second phase."""
    study = copy.deepcopy(TINY)
    study["variants"] = {"baseline": {}, "no_dropout": {"model": {"dropout": 0}}, "same": {"model": {"dropout": 0.0}}}
    study["seeds"] = [0]
    study["finetune"] = {"variants": {"slower": {"train": {"optimizer": {"learning_rate": 0.001}}}}}
    return study


def lock(project: Path) -> dict:
    """What dvc.lock says, but for the hashes of what has times in it."""
    stages = YAML(typ="safe").load((project / "dvc.lock").read_text())["stages"]
    for stage in stages.values():
        for one in [*stage.get("deps", ()), *stage["outs"]]:
            if re.match("cells|reports|mlruns|evaluation", one["path"]):
                one.clear()
    return stages


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, Path]:
    """The same study by `dvc repro` and by `ablab repro`."""
    folder = tmp_path_factory.mktemp("both")
    projects = folder / "one" / "project", folder / "two" / "project"
    study = phases()
    study["variants"]["smooth"] = {"model": {"activation": "elu"}}  # after two that are one training
    for project in projects:
        new_project(project)
        write_params(project, study)
    passed(run(projects[0], "dvc", "repro"))
    done = run(projects[1], "ablab", "repro", "-j", "2")
    passed(done)
    # no_dropout and same are one training
    assert "3 cells, 2 at a time" in done.stderr and "1 cells, 2 at a time" in done.stderr
    assert re.search(r"^baseline-0: \d+ s, validation accuracy [\d.]+% \(\d of 3", done.stderr, re.MULTILINE)
    return projects


@pytest.mark.slow
def test_side_by_side_is_what_dvc_makes(both):
    one, two = (content(project) for project in both)
    assert [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)] == []
    assert lock(both[0]) == lock(both[1])
    # Line by line: of what has times in it, the hashes and the sizes differ.
    lines = [TIMED.sub(r"\1", (project / "dvc.lock").read_text()) for project in both]
    assert lines[0] == lines[1] and lines[0].count("\n") > 300
    assert "Data and pipelines are up to date." in passed(run(both[1], "dvc", "repro"))
    assert not list((both[1] / "resume").glob("*/"))


def test_stages_that_are_new_in_dvc_lock_come_in_the_order_of_dvc_yaml(project: Path):
    def locked(*names: str) -> str:
        return "schema: '2.0'\nstages:\n" + "".join(f"  {name}:\n    cmd: {name}\n" for name in names)

    old, new = ("report", "train@baseline-1"), ("train@no_dropout-0", "evaluate", "train@baseline-0", "plan")
    (project / "dvc.lock").write_text(locked(*old, *new))
    put_in_order(project, list(old))
    ordered = ("plan", "train@baseline-0", "train@no_dropout-0", "evaluate")
    assert (project / "dvc.lock").read_text() == locked(*old, *ordered)


@pytest.mark.slow
def test_side_by_side_is_tracked_like_what_dvc_makes(both):
    runs = []
    for project in both:
        agree(project)
        client = client_of(project)
        found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], max_results=100)
        volatile = {"ablab.pid", "mlflow.parentRunId", "ablab.cells"}
        keys = {"train_accuracy", "validation_accuracy", "test_accuracy", "best_epoch"}
        runs.append(
            sorted(
                (
                    one.info.run_name,
                    one.info.status,
                    sorted(one.data.params.items()),
                    sorted((key, value) for key, value in one.data.metrics.items() if key in keys),
                    sorted(one.data.tags.keys() - volatile),
                    one.data.tags.get("dvc.stage"),
                )
                for one in found
            )
        )
    assert runs[0] == runs[1]


@pytest.mark.slow
def test_only_what_is_due_is_trained(both):
    project = both[1]
    study = phases()
    assert due(project, ["train@baseline-0", "train@same-0"]) == []
    study["variants"]["no_dropout"]["model"]["dropout"] = 0.1
    write_params(project, study)
    try:
        done = run(project, "ablab", "repro", "-j", "2")
        passed(done)
        assert "1 cells, 2 at a time" in done.stderr and "no_dropout-0: " in done.stderr
    finally:
        write_params(project, phases())
    done = run(project, "ablab", "repro")  # put back: from DVC's cache
    passed(done)
    assert "at a time" not in done.stderr


def test_a_cell_that_fails_leaves_the_others_alone(project: Path):
    """Two that fail are equal, and come first."""
    (project / "networks/broken.py").write_text(BROKEN)
    study = copy.deepcopy(TINY)
    own = {"builder": "networks.broken:build", "dropout": None, "blocks": None, "head": None}
    study["seeds"] = [0]
    study["variants"] = {"broken": {"model": own}, "same": {"model": dict(own)}, "baseline": {}}
    write_params(project, study)
    done = run(project, "ablab", "repro", "-j", "2")
    assert done.returncode == 1
    for name in ("broken", "same"):
        assert f"error: train@{name}-0: memory: Expected more of it. Found: " in done.stderr
    assert (project / "cells/baseline/seed-0/cell.json").exists()
    names = [f"train@{name}-0" for name in study["variants"]]
    assert due(project, names) == ["train@broken-0", "train@same-0"]


def test_other_code_than_the_projects_is_refused(project: Path):
    done = run(project, "ablab", "repro", PYTHONPATH=str(ROOT / "src"))
    assert done.returncode == 1 and "Expected this project's own `ablab`" in done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_all_and_the_next_call_goes_on(project: Path):
    study = copy.deepcopy(TINY)
    study["train"]["epochs"] = 2000
    write_params(project, study)
    process = subprocess.Popen(
        ["ablab", "repro", "-j", "2"],
        cwd=project,
        env=environment(project),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list(project.glob("resume/*/state"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted" in told and "Traceback" not in told
    deadline = time.monotonic() + 10  # the process that the others were forked from sees its pipe closed
    while subprocess.run(["pgrep", "-s", str(process.pid)], stdout=subprocess.DEVNULL, check=False).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    kept = {path.parents[1].name for path in project.glob("resume/*/state/*.npz")}
    assert len(kept) >= 2
    study["train"]["epochs"] = 2
    write_params(project, study)
    passed(run(project, "ablab", "repro", "-j", "2"))
    agree(project)


@pytest.mark.parametrize(
    ("exitcode", "text", "told"),
    [
        (-9, "", "killed, perhaps as the memory was full"),
        (1, "epoch 1\nerror: disk: Expected room.\n       Free some.\n", "disk: Expected room.\n       Free some."),
        (1, "Traceback\nValueError: what\n", "ValueError: what (all of it: "),
        (3, "", "exit status 3"),
    ],
)
def test_why_a_cell_failed_is_told(exitcode, text, told, tmp_path):
    (tmp_path / "log").write_text(text)
    assert parallel._reason(exitcode, tmp_path / "log").startswith(told)


def test_a_number_of_cells_is_asked_for(project: Path):
    done = run(project, "ablab", "repro", "-j", "many")
    assert done.returncode == 1 and "--jobs: Expected a number of cells, or auto. Found: many." in done.stderr


def test_small_cells_share_a_gpu_as_far_as_its_memory_goes(monkeypatch, tmp_path):
    job = Job("train", "baseline", 0, "hash", 1.0, 1, 1, 1, 3 * 10**9)
    assert [parallel.on_a_gpu([job], free) for free in (0, 10**9, 7 * 10**9, 10**12)] == [1, 1, 2, 4]
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$@" > "$0.asked"\necho 8000\necho 7000\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    monkeypatch.setattr(parallel, "_gpus", lambda: ["0", "2"])
    monkeypatch.setattr(parallel, "_cores", lambda: list(range(8)))
    assert parallel._room([job]) == 4  # two on each
    assert "--id=0,2" in (tmp_path / "nvidia-smi.asked").read_text()
    job.devices = 2
    assert parallel._room([job]) == 1
    tool.write_text("#!/bin/sh\nexit 9\n")
    job.devices = 1
    assert parallel._room([job]) == 2  # nobody knows: a GPU each
