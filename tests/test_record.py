"""DVC and MLflow as one record, whatever happens to either: every cell has one finished run that agrees with its files.

Each test goes on where the one before it ended; `make test-slow` runs them.
"""

import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import TINY, agree, client_of, environment, in_mlflow, new_project, passed, run, trained, write_params

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = new_project(tmp_path_factory.mktemp("record") / "project")
    assert len(trained(passed(run(folder, "dvc", "repro")))) == 4
    passed(run(folder, "git", "add", "--all"))
    passed(run(folder, "git", "commit", "--quiet", "--message", "results"))
    return folder


def test_a_normal_repro(project: Path):
    agree(project)
    assert not any("ablab.from" in one.data.tags for one in in_mlflow(project).values())


def test_a_repro_from_the_cache_into_an_empty_store(project: Path):
    shutil.rmtree(project / "mlruns")
    shutil.rmtree(project / "cells")
    assert trained(passed(run(project, "dvc", "repro"))) == []
    agree(project)
    assert all(one.data.tags["ablab.from"] == "files" for one in in_mlflow(project).values())


def test_a_clone_that_shares_the_cache(project: Path, tmp_path: Path):
    clone = tmp_path / "clone"
    passed(run(tmp_path, "git", "clone", "--quiet", str(project), str(clone)))
    passed(run(clone, "dvc", "cache", "dir", "--local", str(project / ".dvc/cache")))
    assert trained(passed(run(clone, "dvc", "repro"))) == []
    agree(clone)


def test_deleting_the_store_and_syncing(project: Path):
    shutil.rmtree(project / "mlruns")
    passed(run(project, "ablab", "sync"))
    agree(project)


def test_kill_9_in_mid_training_then_repro(project: Path):
    long = TINY | {"train": TINY["train"] | {"epochs": 500}}
    write_params(project, long)
    with subprocess.Popen(
        ["dvc", "repro"],
        cwd=project,
        env=environment(project),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as dvc:
        deadline = time.monotonic() + 120
        while not (alive := [one for one in _runs(project, "RUNNING") if one.data.metrics.get("loss")]):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        for process in [*psutil.Process(dvc.pid).children(recursive=True), psutil.Process(dvc.pid)]:
            with suppress(psutil.NoSuchProcess):
                if "tracking.logger" not in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)
    write_params(project, TINY)
    passed(run(project, "dvc", "repro"))
    agree(project)
    (killed,) = (one for one in _runs(project, "KILLED") if one.info.run_id == alive[0].info.run_id)
    assert killed.data.tags["ablab.reason"].startswith("the process ended after epoch ")


def _runs(project: Path, status: str) -> list:
    client = client_of(project)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    return list(client.search_runs([experiment], f"attributes.status = '{status}'", max_results=1000))


def test_a_value_changed_and_put_back(project: Path):
    write_params(project, TINY | {"model": TINY["model"] | {"dropout": 0.4}})
    assert trained(passed(run(project, "dvc", "repro"))) == ["baseline-0", "baseline-1"]
    agree(project)
    write_params(project, TINY)
    assert trained(passed(run(project, "dvc", "repro"))) == []
    agree(project)


def test_force_keeps_one_run_a_cell(project: Path):
    passed(run(project, "dvc", "repro", "--force"))
    agree(project)


def test_four_queued_experiments_on_two_workers_into_a_store_that_is_not_there_yet(project: Path):
    passed(run(project, "git", "add", "--all"))
    passed(run(project, "git", "commit", "--quiet", "--allow-empty", "--message", "before the queue"))
    shutil.rmtree(project / "mlruns")
    values = "0.1,0.15,0.2,0.3"
    passed(run(project, "dvc", "exp", "run", "--queue", "-S", f"model.dropout={values}"))
    passed(run(project, "dvc", "exp", "run", "--run-all", "-j", "2"))
    deadline = time.monotonic() + 600
    while "Running" in (status := passed(run(project, "dvc", "queue", "status"))) or "Queued" in status:
        assert time.monotonic() < deadline
        time.sleep(2)
    assert status.count("Success") == 4, status
    names = [line.split()[1] for line in status.splitlines() if "Success" in line]
    found = {name: _cells_of(project, name) for name in names}
    # no_dropout overrides it: its cells come from DVC's cache, and were trained by none of the four.
    assert sum(len(one) for one in found.values()) == 8
    assert _runs(project, "RUNNING") == []
    for name in names:
        passed(run(project, "dvc", "exp", "apply", name))
        assert trained(passed(run(project, "dvc", "repro"))) == []
        agree(project)
    passed(run(project, "dvc", "exp", "branch", names[0], "kept"))


def _cells_of(project: Path, experiment: str) -> list:
    cells = [one for one in _runs(project, "FINISHED") if "ablab.seed" in one.data.tags]
    return [one for one in cells if one.data.tags.get("dvc.exp_name") == experiment]


def test_moving_the_repository(project: Path):
    moved = project.with_name("moved")
    project.rename(moved)
    passed(run(moved, "ablab", "sync"))
    agree(moved)
    picture = "one.png"
    script = "import numpy; from PIL import Image; Image.fromarray(numpy.zeros((8, 8), 'uint8')).save('one.png')"
    passed(run(moved, "python", "-c", script))
    passed(run(moved, "ablab", "predict", "--variant", "models:/tiny@champion", picture))
