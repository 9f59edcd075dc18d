import copy
import json
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
from ablation_lab.jobs import Job, View

# Networks that fail in their cells alone: the plan tries them too.
BROKEN = """
import os
from keras import Model, layers, saving

@saving.register_keras_serializable()
class Broken(layers.Layer):
    def call(self, x, training=False):
        if training and os.environ["DVC_STAGE"].startswith("train@"):
            raise MemoryError("no room for this")
        return x

def build(image_shape, classes):
    inputs = layers.Input(image_shape)
    return Model(inputs, layers.Dense(classes, activation="softmax")(layers.Flatten()(Broken()(inputs))))
"""


MOODY = """
import os
from keras import Model, layers, saving

@saving.register_keras_serializable()
class Moody(layers.Layer):
    def call(self, x, training=False):
        if training and os.environ["DVC_STAGE"].startswith("train@"):
            raise ValueError("I am in no mood for this.\\nTry again tomorrow.")
        return x

def build(image_shape, classes):
    inputs = layers.Input(image_shape)
    return Model(inputs, layers.Dense(classes, activation="softmax")(layers.Flatten()(Moody()(inputs))))
"""

# The memory that its process has is all that it gets.
STARVED = """
import os, resource
from keras import Model, layers, saving

@saving.register_keras_serializable()
class Starved(layers.Layer):
    def call(self, x, training=False):
        if training and os.environ["DVC_STAGE"].startswith("train@"):
            size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        return x

def build(image_shape, classes):
    inputs = layers.Input(image_shape)
    hidden = layers.Dense(4096)(layers.Dense(4096)(layers.Flatten()(Starved()(inputs))))
    return Model(inputs, layers.Dense(classes, activation="softmax")(hidden))
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
    assert "3 cells, 2 at a time" in done.stderr and "1 cell, 2 at a time" in done.stderr
    assert re.search(r"^baseline-0: \d+ (s|min), validation accuracy [\d.]+% \(\d of 3", done.stderr, re.MULTILINE)
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
        assert "1 cell, 2 at a time" in done.stderr and "no_dropout-0: " in done.stderr
    finally:
        write_params(project, phases())
    done = run(project, "ablab", "repro")  # put back: from DVC's cache
    passed(done)
    assert "at a time" not in done.stderr


def failing(project: Path, *names: str) -> dict:
    """A study of one seed with the baseline, a variant that diverges, and those of these networks before them."""
    study = copy.deepcopy(TINY)
    study["seeds"], study["variants"] = [0], {}
    for name in names:
        (project / f"networks/{name}.py").write_text({"broken": BROKEN, "moody": MOODY, "starved": STARVED}[name])
        own = {"builder": f"networks.{name}:build", "dropout": None, "blocks": None, "head": None}
        study["variants"][name] = {"model": own}
    study["variants"] |= {"baseline": {}, "wild": {"train": {"optimizer": {"learning_rate": 1e30}}}}
    return study


def test_a_cell_that_fails_leaves_the_others_alone(project: Path):
    """Two that fail are equal, and come first. One that diverges has not failed."""
    study = failing(project, "broken", "moody")
    study["variants"] = {"same": copy.deepcopy(study["variants"]["broken"])} | study["variants"]
    write_params(project, study)
    earlier = project / "reports/report.html"
    earlier.parent.mkdir()
    earlier.write_text("an earlier one")
    done = run(project, "ablab", "repro", "-j", "2")
    assert done.returncode == 1
    for name in ("broken", "same"):
        assert f"error: train@{name}-0: memory: Expected more of it. Found: no room for this. End" in done.stderr
    assert (project / "cells/baseline/seed-0/cell.json").exists()
    names = [f"train@{name}-0" for name in study["variants"]]
    assert due(project, names) == ["train@same-0", "train@broken-0", "train@moody-0"]
    assert re.search(r"^wild-0: \d+ (s|min), diverged in epoch 1 \(", done.stderr, re.MULTILINE)

    # The network's own words, and where it said them, without Keras' frame and colours; in MLflow too.
    reason = "networks/moody.py, line 9, in call: ValueError: I am in no mood for this."
    assert f"moody-0: failed: {reason} (" in done.stderr
    assert f"error: train@moody-0: {reason}\nTry again tomorrow. (all of it: " in done.stderr
    client = client_of(project)
    found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], max_results=100)
    told = {one.data.tags.get("ablab.reason") for one in found if one.data.tags["ablab.variant"] == "moody"}
    assert told == {f"{reason}\nTry again tomorrow."}

    # What is there is reported.
    partial = project / "reports/partial"
    assert "Partial report: reports/partial/report.html, 2 of 5 cells" in done.stdout
    assert "remove them from params.yaml and run `ablab repro`" in done.stderr
    results = json.loads((partial / "results.json").read_text())
    assert list(results["variants"]) == ["baseline", "wild"]
    assert results["variants"]["wild"]["delta"]["verdict"] == "diverged"
    states = {one["cell"]: one["state"] for one in results["partial"]["missing"]}
    assert states == {"same-0": "failed", "broken-0": "failed", "moody-0": "failed"}
    assert "I am in no mood for this." in (partial / "report.md").read_text()
    assert earlier.read_text() == "an earlier one"
    assert "reports/report.html is the report of an earlier state: it was not made again." in done.stderr


@pytest.mark.slow
def test_without_the_variant_that_failed_the_report_is_whole_and_nothing_is_trained(project: Path):
    write_params(project, failing(project, "starved"))
    done = run(project, "ablab", "repro")
    # However TensorFlow ends without memory, and it has several ways.
    (starved,) = (line for line in done.stderr.splitlines() if line.startswith("error: train@starved-0: "))
    assert done.returncode == 1 and re.search("memory: Expected more of it|out of memory: |gets no memory", starved)
    assert "ewer cells at" in starved and "remove it from params.yaml" in done.stderr
    assert (project / "reports/partial/report.html").exists() and not (project / "reports/report.html").exists()
    write_params(project, failing(project))
    again = run(project, "ablab", "repro")
    passed(again)
    assert "at a time" not in again.stderr and "Running stage 'train" not in again.stdout
    assert (project / "reports/report.html").exists() and not (project / "reports/partial").exists()

    # DVC has nothing to do with the folder of the partial report.
    passed(run(project, "ablab", "report", "--partial"))
    assert "Data and pipelines are up to date." in passed(run(project, "dvc", "status"))
    assert "Data and pipelines are up to date." in passed(run(project, "dvc", "repro"))
    assert (project / "reports/partial/report.html").exists()


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
        (
            -6,
            "terminate called after throwing an instance of 'std::bad_alloc'",
            "out of memory: TensorFlow ended by SIG",
        ),
        (-6, "LLVM ERROR: pthread_create failed: Resource temporarily unavailable", "out of memory: TensorFlow ended"),
        (-11, "OOM when allocating tensor", "out of memory: TensorFlow ended by SIGSEGV"),
        (-11, "no_zoom-0\nRandomZoom\nmushroom, NO_ZOOM", "ended by SIGSEGV, as TensorFlow may when it gets no memory"),
        (-11, "", "ended by SIGSEGV, as TensorFlow may when it gets no memory. Fewer cells at a time"),
        (1, "epoch 1\nerror: disk: Expected room.\n       Free some.\n", "disk: Expected room.\n       Free some."),
        (1, "Traceback\nValueError: what\n", "ValueError: what (all of it: "),
        (3, "", "exit status 3"),
    ],
)
def test_why_a_cell_failed_is_told(exitcode, text, told, tmp_path):
    (tmp_path / "log").write_text(text)
    assert parallel._reason(exitcode, tmp_path / "log").startswith(told)


def test_what_is_left_is_told_in_seconds_where_it_is_short():
    waiting = [Job("train", "baseline", seed, "hash", 1.0, 1, 1, 1, 1) for seed in (0, 1)]
    view = View(waiting, 1)
    waiting[0].seconds = 30
    view.done = waiting[:1]
    assert view._left() == ", about 30 s left"


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
