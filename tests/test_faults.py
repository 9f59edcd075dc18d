"""What is finished survives: disks, memory, signals, clocks and stores that fail under each stage, for real.

After each fault what was there is as it was, the message says what to do, and the next run completes.
"""

import hashlib
import json
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path

import fabricate
import pytest
from conftest import TINY, agree, client_of, environment, new_project, passed, run, write_params
from namespaces import full_disk, read_only

TWO_PHASES = TINY | {"seeds": [0], "finetune": {"variants": {"longer": {"train": {"epochs": 1}}}}}

# What a stage writes while it is in the middle of its work, and a library that it imports first.
STAGES = {
    "download": ("open raw.part", "import pydantic"),
    "preprocess": ("open processed.part", "import numpy"),
    "plan": ("open plan.part", "import tensorflow"),
    "train@baseline-0": ("open cell.part", "import keras"),
    "select": ("open selection.part", "import numpy"),
    "finetune@longer-0": ("open cell.part", "import tensorflow"),
    "evaluate": ("open evaluation.part", "import sklearn"),
    "report": ("open reports.part", "import matplotlib"),
    "track": ("open confusion_matrix", "import mlflow"),
}

# Python imports it when it starts. The signal comes at a moment of the stage's own work; its children get none.
SIGNAL = """
import os, signal, sys
event, _, part = os.environ.get("STOP_AT", "").partition(" ")
def stop(name, arguments):
    global event
    if name == event and part in str(arguments[0]):
        event = ""
        number = int(os.environ["STOP_WITH"])
        os.kill(0 if number == signal.SIGINT else os.getpid(), number)  # Ctrl-C is for the whole process group
if event and any(word.startswith("stages.") for word in sys.orig_argv):
    sys.addaudithook(stop)
"""

CLOCK = """
import sys, time
if any(word.startswith(("stages.", "ablation_lab.")) for word in sys.orig_argv):
    clock, calls = time.time, [0]
    def jumping():
        calls[0] += 1
        return clock() + (86_400 if calls[0] % 3 else -86_400)
    time.time = jumping
"""


def customized(folder: Path, script: str) -> dict[str, str]:
    """The environment in which Python runs a script first."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(script)
    return {"PYTHONPATH": str(folder)}


def stopped(project: Path, moment: str, number: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process group of its own and send it a signal at a moment of the stage."""
    first = customized(project.parent / "signal", SIGNAL)
    return run(project, "setsid", "--wait", *command, STOP_AT=moment, STOP_WITH=str(int(number)), **first)


def module(stage: str) -> tuple[str, ...]:
    """The command of a stage without DVC."""
    name, _, cell = stage.partition("@")
    return "python", "-m", f"stages.{name}", *cell.split("-")[: 2 if cell else 0]


def contents(project: Path, *left_out: str) -> dict[str, str]:
    """The sha256 of every file of the results; those of a cell that DVC removes before it trains it may be left out."""
    folders = ("data", "plan", "cells", "validation", "selection", "evaluation", "reports")
    files = [file for folder in folders for file in (project / folder).rglob("*") if file.is_file()]
    files.append(project / "dvc.lock")
    paths = {str(file.relative_to(project)): file for file in files if file.exists()}
    kept = {path: file for path, file in paths.items() if not path.startswith(left_out or ("nothing",))}
    return {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in kept.items()}


def parts(project: Path) -> list[str]:
    return [str(path) for ending in ("part", "old") for path in project.rglob(f"*.{ending}")]


@pytest.fixture(scope="module")
def fabricated(tmp_path_factory) -> Path:
    """A project whose cells were made with numpy, evaluated and reported."""
    folder = new_project(tmp_path_factory.mktemp("fabricated") / "project")
    raw = {key: value for key, value in TINY.items() if key != "input"} | {"seeds": [0]}
    fabricate.write(folder, fabricate.study(("baseline", "no_dropout"), seeds=(0,)), classes=3, pictures=30)
    write_params(folder, raw)
    for stage in ("evaluate", "report"):
        passed(run(folder, *module(stage)))
    return folder


@pytest.mark.parametrize(
    ("stage", "fault", "message"),
    [
        ("evaluate", "full", "evaluation: Expected room on the disk. Found: No space left on device"),
        ("report", "read-only", "reports.part: Expected a folder that can be written to. Found: Read-only file system"),
        ("evaluate", "import sklearn", "interrupted: what was finished is kept"),
        ("report", "open reports.part", "interrupted: what was finished is kept"),
    ],
)
def test_a_stage_that_fails_leaves_what_was_there(fabricated: Path, stage: str, fault: str, message: str):
    before = contents(fabricated)
    if fault == "full":
        done = run(fabricated, *full_disk(fabricated, 8, *module(stage)))
    elif fault == "read-only":
        done = run(fabricated, *read_only(fabricated, *module(stage)))
    else:
        done = stopped(fabricated, fault, signal.SIGTERM, *module(stage))
    assert done.returncode == (143 if message.startswith("interrupted") else 1)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert contents(fabricated) == before and parts(fabricated) == []


@pytest.mark.slow
def test_evaluation_and_report_complete_afterwards(fabricated: Path):
    before = contents(fabricated)
    for stage in ("evaluate", "report"):
        passed(run(fabricated, *module(stage)))
    assert contents(fabricated) == before


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A study of two phases, run by DVC and committed."""
    folder = new_project(tmp_path_factory.mktemp("faults") / "project")
    write_params(folder, TWO_PHASES)
    passed(run(folder, "dvc", "repro"))
    passed(run(folder, "git", "add", "--all"))
    passed(run(folder, "git", "commit", "--quiet", "--message", "results"))
    agree(folder)
    return folder


@pytest.fixture
def project(shared: Path):
    """The same for each test, which may change params.yaml."""
    before = (shared / "params.yaml").read_bytes()
    yield shared
    if (shared / "params.yaml").read_bytes() != before:
        (shared / "params.yaml").write_bytes(before)
        passed(run(shared, "dvc", "repro"))


def completes(project: Path, stage: str) -> None:
    """A stage runs on top of what a fault has left, and the whole agrees with it."""
    passed(run(project, "dvc", "repro", "--force", "--single-item", stage))
    passed(run(project, "dvc", "repro"))
    assert parts(project) == []
    agree(project)


def cell_of(stage: str) -> tuple[str, ...]:
    variant = stage.partition("@")[2].partition("-")[0]
    return (f"cells/{variant}/", f"validation/{variant}/") if variant else ()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_and_sigterm(project: Path, stage: str):
    before, killed = contents(project, *cell_of(stage)), len(runs_of(project, "KILLED"))
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        for moment in STAGES[stage]:
            if stage == "track":
                (project / "mlruns/receipt.json").unlink(missing_ok=True)
                for name in project.glob("mlruns/mlflow.db*"):
                    name.unlink()
            done = stopped(project, moment, number, "dvc", "repro", "--force", "--single-item", stage)
            assert done.returncode == 255 and f"exited with {status}" in done.stderr, done.stderr
            assert done.stderr.count("interrupted: what was finished is kept") == 1
            assert "Traceback" not in done.stderr
            assert contents(project, *cell_of(stage)) == before
            assert parts(project) == []
    if cell_of(stage):
        assert len(runs_of(project, "KILLED")) == killed + 2  # those that had begun to train
    completes(project, stage)


def runs_of(project: Path, status: str) -> list:
    client = client_of(project)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    return list(client.search_runs([experiment], f"attributes.status = '{status}'", max_results=1000))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "room"),
    [("plan", 8), ("train@baseline-0", 24), ("select", 4), ("finetune@longer-0", 24), ("report", 200)],
)
def test_a_disk_without_room_or_read_only(project: Path, stage: str, room: int):
    before = contents(project)
    refused = {
        "Expected room on the disk. Found: No space left on device": full_disk(project, room, *module(stage)),
        "Expected a folder that can be written to. Found: Read-only file": read_only(project, *module(stage)),
    }
    for message, command in refused.items():
        done = run(project, *command)
        assert done.returncode == 1, done.stderr
        assert done.stderr.count("error: ") == 1 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert contents(project) == before and parts(project) == []
    completes(project, stage)


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "stage"), [("cells", "train@baseline-0"), ("reports", "report")])
def test_a_folder_that_is_read_only(project: Path, folder: str, stage: str):
    before = contents(project)
    done = run(project, *read_only(project / folder, "dvc", "repro", "--force", "--single-item", stage))
    assert done.returncode == 255
    assert "Read-only file system" in done.stderr or "Device or resource busy" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert contents(project) == before
    completes(project, stage)


@pytest.mark.slow
def test_a_cache_of_dvcs_without_room(project: Path):
    write_params(project, TWO_PHASES | {"model": TINY["model"] | {"dropout": 0.3}})
    cache = project / ".dvc/cache"
    done = run(project, *full_disk(cache, 40, "dvc", "repro", "train@baseline-0"))
    assert done.returncode == 255
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
    whole(cache)
    passed(run(project, "dvc", "repro"))
    whole(cache)
    agree(project)


def whole(cache: Path) -> None:
    """Every file of DVC's cache is what its name says, but for what DVC was copying when the disk was full."""
    files = [file for file in (cache / "files/md5").rglob("*") if file.is_file() and file.suffix != ".tmp"]
    assert files
    for file in files:
        md5 = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
        assert md5 == f"{file.parent.name}{file.name.removesuffix('.dir')}"


@pytest.mark.slow
def test_a_database_that_is_held_while_a_cell_is_trained(project: Path):
    before = contents(project, "cells/baseline/seed-0/timing", "dvc.lock")
    for name in project.glob("mlruns/mlflow.db*"):
        name.unlink()
    passed(run(project, "python", "-c", "from ablation_lab.tracking import store; store.connect()"))
    with closing(sqlite3.connect(project / "mlruns/mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        done = run(project, "dvc", "repro", "--force", "--single-item", "train@baseline-0")
    passed(done)
    assert done.stderr.count("warning: MLflow ") in (1, 2) and "Traceback" not in done.stderr
    assert contents(project, "cells/baseline/seed-0/timing", "dvc.lock") == before
    passed(run(project, "ablab", "sync"))
    agree(project)


@pytest.mark.slow
def test_a_server_that_is_down_comes_after_the_report(project: Path):
    passed(run(project, "rm", "-r", "reports"))
    (project / "mlruns/receipt.json").unlink()
    nowhere = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = run(project, "dvc", "repro", **nowhere)
    assert done.returncode == 255
    assert "error: http://127.0.0.1:9: Expected MLflow's store." in done.stderr and "Traceback" not in done.stderr
    assert (project / "reports/report.html").exists()
    passed(run(project, "dvc", "repro"))
    agree(project)


HUGE = {"model": {"head": {"dense1": {"units": 12_000_000}}}}


@pytest.mark.slow
def test_a_cell_that_is_too_large_for_the_memory_leaves_the_others_alone(project: Path):
    study = TWO_PHASES | {"variants": {"baseline": {}, "huge": HUGE, "no_dropout": TINY["variants"]["no_dropout"]}}
    write_params(project, study | {"seeds": [0, 1]})
    # Not of the machine, which has other work to do: of each process.
    done = run(project, "sh", "-c", "ulimit -v 6500000; exec dvc repro -k train")
    assert done.returncode == 255
    assert done.stderr.count("error: memory: Expected more of it. Found: ") == 2, done.stderr
    assert "Traceback" not in done.stderr
    for variant in ("baseline", "no_dropout"):
        assert (project / f"cells/{variant}/seed-1/cell.json").exists()
    assert not (project / "cells/huge").exists() or not list((project / "cells/huge").rglob("*.json"))
    assert runs_of(project, "RUNNING") == []
    write_params(project, TWO_PHASES)
    passed(run(project, "dvc", "repro"))
    agree(project)


@pytest.mark.slow
def test_a_cell_that_is_killed_as_for_its_memory(project: Path):
    before = contents(project, *cell_of("train@baseline-0"))
    moment = STAGES["train@baseline-0"][0]
    done = stopped(project, moment, signal.SIGKILL, "dvc", "repro", "--force", "--single-item", "train@baseline-0")
    assert done.returncode == 255
    assert "exited with -9" in done.stderr or "exited with 137" in done.stderr, done.stderr
    assert contents(project, *cell_of("train@baseline-0")) == before
    deadline = time.monotonic() + 60
    while runs_of(project, "RUNNING"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    completes(project, "train@baseline-0")


@pytest.mark.slow
def test_a_clock_that_jumps(project: Path):
    measured = ("timing", "reports", "dvc.lock")
    before = {path: digest for path, digest in contents(project).items() if not any(one in path for one in measured)}
    done = run(project, "dvc", "repro", "--force", **customized(project.parent / "clock", CLOCK))
    passed(done)
    after = contents(project)
    assert {path: after[path] for path in before} == before
    numbers = list(leaves(json.loads((project / "reports/timings.json").read_text())))
    assert numbers and all(isinstance(number, str) or number > 0 for number in numbers)
    agree(project)
    for one in runs_of(project, "FINISHED"):
        assert one.info.end_time >= one.info.start_time


def leaves(value):
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from leaves(one)
    else:
        yield value


@pytest.mark.slow
def test_two_repros_at_once(project: Path):
    write_params(project, TWO_PHASES | {"model": TINY["model"] | {"dropout": 0.35}})
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    bare = environment(project)
    both = [subprocess.Popen(["dvc", "repro"], cwd=project, env=bare, text=True, **streams) for _ in range(2)]
    outputs = [one.communicate(timeout=500) for one in both]
    assert any(one.returncode for one in both)
    for one, (_, told) in zip(both, outputs, strict=True):
        assert "Traceback" not in told
        if one.returncode:
            assert "is busy, it is being blocked by" in told or "Unable to acquire lock" in told, told
    passed(run(project, "dvc", "repro"))
    whole(project / ".dvc/cache")
    agree(project)
