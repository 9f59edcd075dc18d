"""A study that is killed again and again ends as if nothing had happened. `make test-slow` runs this."""

import copy
import os
import re
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import agree, environment, passed, run
from test_two_phases import STUDY, photographs

from ablation_lab.dvc_command import mend

pytestmark = pytest.mark.slow

# The stage in which a run is killed, 20 times: each one at least once, trainings more often.
STAGES = ("download", "preprocess", "plan", *["train"] * 8, "select", *["finetune"] * 4, "evaluate", "report", "track")
KILLS = (*STAGES, "train")
FOLDERS = ("data", "plan", "cells", "validation", "selection", "evaluation", "reports")


def long_study() -> dict:
    """The study of two phases with trainings of some seconds, dropout and augmentation on, whose heads stop early."""
    study = copy.deepcopy(STUDY)
    study["model"] |= {"head_dropout": 0.3}
    study["train"] |= {"epochs": 400, "early_stopping": {"patience": 390}, "reduce_lr": {"patience": 3}}
    study["variants"]["flipped"] = {"input": {"augment": {"RandomFlip": {}}}, "train": {"epochs": 12}}
    study["finetune"]["variants"]["deeper"]["train"] |= {"epochs": 20}
    return study


def content(project: Path) -> dict[str, bytes]:
    """All outputs but what a clock has measured and where the trainings were made: `timing*`, `provenance.json`, and in
    the report the seconds. Of report.html this test compares the parts: figures, tables."""
    found = {}
    for path in sorted(path for folder in FOLDERS for path in (project / folder).rglob("*") if path.is_file()):
        name = path.relative_to(project).as_posix()
        if path.name.startswith("timing") or name in ("reports/provenance.json", "reports/report.html"):
            continue
        found[name] = path.read_bytes()
        if name == "reports/report.md":
            lines = [line for line in found[name].splitlines() if b"timing_pareto" not in line]
            found[name] = re.sub(rb"[\d.,]+", b"#", b"\n".join(lines))
    return found


def states(project: Path) -> dict[str, int]:
    """The epochs that are kept of each cell that is not done."""
    found = {}
    for path in sorted(project.glob("resume/*/state/*.npz")):
        found[path.parents[1].name] = int(path.name.partition("-")[0])  # its name begins with its epochs
    return found


def killed(project: Path, stage: str, seconds: float, whole_group: bool, in_epochs: bool) -> list[str]:
    """Run `dvc repro` and kill it, alone or with all that it has started, so many seconds after a stage has begun or,
    `in_epochs`, after a training has kept an epoch.

    Returns:
        The lines that it has printed.
    """
    mend(project)  # as `make repro` and `ablab repro` do
    process = subprocess.Popen(
        ["dvc", "repro"],
        cwd=project,
        env=environment(project) | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: list[str] = []
    begun, over = threading.Event(), threading.Event()

    def read():
        with process.stdout as output:  # what DVC has started may go on writing into it
            for line in output:
                lines.append(line)
                if line.startswith(f"Running stage '{stage}"):
                    begun.set()
                elif line.startswith("Running stage") and begun.is_set():
                    over.set()
        begun.set()  # it has ended without
        over.set()

    reader = threading.Thread(target=read)
    reader.start()
    before = states(project)
    assert begun.wait(300)
    while in_epochs and not over.is_set() and states(project) in (before, {}):
        time.sleep(0.05)
    time.sleep(seconds)
    with suppress(ProcessLookupError):  # it has ended
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    if whole_group:
        reader.join()
    return lines


def test_twenty_kills_at_random_moments(tmp_path: Path):
    undisturbed, project = (
        photographs(tmp_path / name / "project", long_study()) for name in ("undisturbed", "killed")
    )
    passed(run(undisturbed, "dvc", "repro"))
    draw = np.random.default_rng(0)
    before: dict[str, int] = {}
    output: list[str] = []
    resumed: list[int] = []
    for number, stage in enumerate(KILLS):
        longest = {"train": 14, "finetune": 14, "plan": 8, "report": 8, "track": 8}.get(stage, 2)
        alone = stage in ("train", "finetune") and number % 3 == 0
        in_epochs = stage in ("train", "finetune") and number % 4 != 0
        seconds = draw.uniform(0, 0.2 if in_epochs else longest)
        output = killed(project, stage, seconds, not alone, in_epochs)
        after = states(project)
        # What was kept is used: a training that had k epochs has at least as many now, or is done.
        lost = {cell: (epochs, after[cell]) for cell, epochs in before.items() if after.get(cell, epochs) < epochs}
        assert lost == {}, output
        resumed += [int(epochs) for line in output for epochs in re.findall(r"goes on after epoch (\d+)", line)]
        before = after
    mend(project)
    passed(run(project, "dvc", "repro"))
    first, second = content(undisturbed), content(project)
    assert [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)] == []
    assert len(first) > 60
    assert resumed  # some of the kills were in the middle of a training
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(60)
    agree(project, "photographs")
    assert not list((project / "resume").glob("*/"))
    assert "Data and pipelines are up to date." in passed(run(project, "dvc", "repro"))


def test_a_long_cell_never_fits_an_epoch_twice(tmp_path: Path):
    project = photographs(tmp_path / "project", long_study())
    passed(run(project, "dvc", "repro", "plan"))
    fitted: list[int] = []
    spy = "import sys; from ablation_lab import training, backend; from stages import train\n"
    spy += "begin = training.Recorder.on_epoch_begin\n"
    spy += "def told(self, epoch, logs=None):\n    print('epoch', epoch + 1, flush=True); begin(self, epoch, logs)\n"
    spy += "training.Recorder.on_epoch_begin = told\ntrain.main('flipped', 0)\n"
    stops = [3, 4, 9, 99]
    for stop in stops:
        process = subprocess.Popen(
            ["python", "-c", spy], cwd=project, env=environment(project), stdout=subprocess.PIPE, text=True
        )
        for line in process.stdout:
            if not line.startswith("epoch"):
                continue
            epoch = int(line.split()[1])
            if epoch == stop:  # the epochs before it are finished, this one is not
                process.kill()
                break
            fitted.append(epoch)
        process.communicate()
    assert fitted == list(range(1, 13))
    assert (project / "cells/flipped/seed-0/cell.json").exists()


def test_the_result_of_a_training_that_nobody_waits_for_is_taken_later(tmp_path: Path):
    """DVC is killed, what it has started is not: what it makes will be asked for again."""
    project = photographs(tmp_path / "project", long_study())
    passed(run(project, "dvc", "repro", "plan"))
    parent = subprocess.Popen(
        ["sh", "-c", "python -m stages.train none 0; true"], cwd=project, env=environment(project)
    )
    while not states(project):
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    waited = passed(run(project, "python", "-m", "stages.train", "none", "0"))
    assert "none-0 is being trained here already, by process" in waited and "none-0: trained already" in waited
    assert (project / "cells/none/seed-0/cell.json").exists()
    assert not list((project / "resume").glob("*/"))
