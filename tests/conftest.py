"""What tests share: a copy of the project in a folder of its own, and commands run in it."""

import atexit
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import ablation_lab.tracking  # noqa: F401 - before MLflow, whose telemetry it switches off, as in every command

# isort: split
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
CODE = (
    "dvc.yaml",
    "stages",
    "src",
    "networks",
    "weights/README.md",
    "studies",
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvc/plots",
    ".dvcignore",
    ".gitignore",
)

LONG = (
    *("test_study.py", "test_report.py", "test_mirror.py", "test_two_phases.py", "test_training.py", "test_ui.py"),
    *("test_resume.py", "test_devices.py", "test_cli.py", "test_search.py", "test_frozen.py", "test_verify.py"),
    *("test_page.py", "test_parallel.py", "test_tracking.py", "test_fuzz.py", "test_faults.py"),
)

# As installers write it: processes that a command starts import its script, too.
SCRIPT = """#!{python}
import sys
from {module} import {function}
if __name__ == "__main__":
    sys.exit({function}())
"""

# A study that trains in seconds: real pictures, real training, one epoch of few steps.
TINY = {
    "study": {"name": "tiny", "title": "A tiny study", "baseline": "baseline"},
    "data": {"dataset": "digits", "path": None, "limit": 12, "split": {"validation": 0.2, "test": 0.2, "seed": 0}},
    "input": {"rescale": "unit"},
    "model": {
        "builder": "cnn",
        "dropout": 0.25,
        "blocks": {"block1": {"filters": 2}},
        "head": {"dense1": {"units": 4}},
    },
    "train": {"epochs": 2, "batch_size": 32, "optimizer": {"name": "adam", "learning_rate": 0.01}},
    "seeds": [0, 1],
    "variants": {"baseline": {}, "no_dropout": {"model": {"dropout": 0}}},
}


def write_params(folder: Path, study: dict) -> None:
    """Make a study the params.yaml of a folder; the order of keys is kept."""
    yaml = YAML(typ="safe", pure=True)
    yaml.sort_base_mapping_type_on_output = False
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(study, file)


def environment(folder: Path) -> dict[str, str]:
    """What a user's shell has after `source .venv/bin/activate` in a project, and nothing else.

    PATH begins with the environment of the project that the folder lies in. HOME is a folder beside that project:
    downloads, tokens and settings that programs keep there last as long as the test does. What else a command needs
    the product sets. A folder outside of any project, and the working tree itself, have the running environment.
    """
    project = next((one for one in (folder, *folder.parents) if (one / "src/ablation_lab").is_dir()), None)
    if project is None or project == ROOT:
        scripts, home = [Path(sys.executable).parent], _home()
    else:
        # The running environment has the tools that the project's own lacks, such as rclone.
        scripts, home = [_installed(project), Path(sys.executable).parent], project.parent / "home"
        (home / ".cache").mkdir(parents=True, exist_ok=True)
        if not (fonts := home / ".cache/matplotlib").is_symlink():
            fonts.symlink_to(_home() / ".cache/matplotlib")  # its list of fonts takes seconds to make
    return {
        "PATH": os.pathsep.join([*map(str, scripts), os.environ["PATH"]]),
        "HOME": str(home),
        "LANG": "C.UTF-8",
        # Where the machine's owner sets it, an older OpenBLAS computes wrong results without.
        **{key: value for key, value in os.environ.items() if key == "OPENBLAS_CORETYPE"},
    }


@cache
def _home() -> Path:
    """The home that commands outside of any project's copy share."""
    home = Path(tempfile.mkdtemp(prefix="ablab-home-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    (home / ".cache/matplotlib").mkdir(parents=True)
    return home


def _installed(project: Path) -> Path:
    """Install a copy of the project as `make setup` does, its source editable, into a `.venv` of its own whose other
    packages are those of the running environment; that takes milliseconds.

    Returns:
        The folder with the scripts.
    """
    folder = project / ".venv"
    packages = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    listed = "\n".join([str(project / "src"), *packages, ""])
    found = list(folder.glob("lib/python*/site-packages/project.pth"))
    if found and found[0].read_text() == listed:
        return folder / "bin"
    shutil.rmtree(folder, ignore_errors=True)  # a moved or copied project's
    venv.create(folder, symlinks=True)
    for name in ("ablab", "dvc", "mlflow", "ray", "uvicorn"):  # the last one serves MLflow's models
        for entry in entry_points(group="console_scripts", name=name):
            script = folder / "bin" / name
            script.write_text(SCRIPT.format(python=folder / "bin/python", module=entry.module, function=entry.attr))
            script.chmod(0o755)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "project.pth").write_text(listed)
    return folder / "bin"


def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment (`dvc`, `ablab`, `git`, `python`) in a folder, as a user does in a new shell."""
    bare = environment(folder) | variables
    return subprocess.run(command, cwd=folder, env=bare, capture_output=True, text=True, check=False, timeout=600)


def passed(done: subprocess.CompletedProcess[str]) -> str:
    """The output of a command that must have ended well."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def trained(output: str) -> list[str]:
    """The cells whose training was started, by DVC's own word."""
    return re.findall(r"^Running stage 'train@(.+)'", output, re.MULTILINE)


def retrained(project: Path, study: dict) -> list[str]:
    """The cells that are trained once a study has become params.yaml."""
    write_params(project, study)
    return trained(passed(run(project, "dvc", "repro", "train")))


def client_of(project: Path) -> MlflowClient:
    """A project's own store, as a user's script opens it."""
    return MlflowClient(f"sqlite:///{project}/mlruns/mlflow.db")


def in_mlflow(project: Path, study: str = "tiny", client: MlflowClient | None = None) -> dict[str, Run]:
    """The finished runs of cells, by name."""
    client = client or client_of(project)
    experiment = client.get_experiment_by_name(study)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    cells = [run for run in found if "ablab.seed" in run.data.tags and run.info.status == "FINISHED"]
    return {run.info.run_name: run for run in cells}


def agree(project: Path, study: str = "tiny", client: MlflowClient | None = None) -> None:
    """Every cell of params.yaml has exactly one finished run, whose metrics are those of its files; none is RUNNING."""
    client = client or client_of(project)
    found = client.search_runs([client.get_experiment_by_name(study).experiment_id], max_results=1000)
    assert [run.info.run_name for run in found if run.info.status == "RUNNING"] == []
    with (project / "evaluation/cells.csv").open(encoding="utf-8", newline="") as file:
        scored = list(csv.DictReader(file))
    for row in scored:
        folder = project / f"cells/{row['variant']}/seed-{row['seed']}"
        result = json.loads((folder / "cell.json").read_text())
        wanted = {"ablab.cell_hash": result["cell_hash"], "ablab.variant": row["variant"], "ablab.seed": row["seed"]}
        (run,) = (run for run in found if run.info.status == "FINISHED" and wanted.items() <= run.data.tags.items())
        for key in ("train_accuracy", "validation_accuracy", "test_accuracy", "test_loss"):
            assert run.data.metrics[key] == float(row[key])
        seconds = json.loads((folder / "timing.json").read_text())["epoch_seconds"]
        with (folder / "history.csv").open(encoding="utf-8", newline="") as file:
            history = {int(epoch["epoch"]): epoch for epoch in csv.DictReader(file)}
        for key in ("loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"):
            logged = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, key)]
            assert sorted(logged) == [(epoch, float(values[key])) for epoch, values in history.items()]
        logged = client.get_metric_history(run.info.run_id, "epoch_seconds")
        assert [one.value for one in sorted(logged, key=lambda one: one.step)] == seconds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no worker is left with one of them at the end."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture(scope="module")
def trained_project(tmp_path_factory) -> Path:
    """The tiny study, run by its stages in this process, all but `track`."""
    # They bring TensorFlow, whose number of threads is fixed before its first operation.
    import one_thread  # noqa: F401

    from stages import download, evaluate, plan, preprocess, report, select, train

    folder = new_project(tmp_path_factory.mktemp("mirror") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for stage in (download, preprocess, plan):
            stage.main()
        for name in TINY["variants"]:
            for seed in TINY["seeds"]:
                train.main(name, seed)
        for stage in (select, evaluate, report):
            stage.main()
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A fresh clone of the project with the tiny study committed."""
    return new_project(tmp_path / "project")


def new_project(folder: Path) -> Path:
    """Copy the code as it is in the working tree into a git repository of its own."""
    for name in CODE:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copyfile(source, target)
    write_params(folder, TINY)
    for command in (
        ("git", "init", "--quiet"),
        ("git", "config", "user.name", "test"),
        ("git", "config", "user.email", "test@example.org"),
        ("git", "add", "--all"),
        ("git", "commit", "--quiet", "--message", "start"),
    ):
        passed(run(folder, *command))
    return folder
