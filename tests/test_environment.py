"""What `run` calls has what a user's shell has, so that a variable that only tests set hides nothing."""

import re
from pathlib import Path

from conftest import ROOT, environment, passed, run

ANYWHERE = {"PWD", "SHLVL", "_"}  # a shell's own
# Whose processes have this one's environment, and why.
INHERITED = {
    "test_cluster.py": "nodes of a cluster, until they are started as a user starts them",
    "test_team.py": "servers, until they are started as docs/team.md says",
}


def test_a_command_has_nothing_of_the_environment_that_the_tests_run_in(project: Path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "MLFLOW_TRACKING_URI", "PYTHONPATH", "ABLAB_CACHE", "CI"):
        monkeypatch.setenv(name, "set by whoever runs the tests")
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    told = passed(run(project, "sh", "-c", "env"))
    assert {line.partition("=")[0] for line in told.splitlines()} - ANYWHERE == {"PATH", "HOME", "LANG"}
    assert set(environment(ROOT)) == {"PATH", "HOME", "LANG"}


def test_a_project_has_its_own_source_installed_and_a_home_of_its_own(project: Path, tmp_path: Path):
    script = "import sys, ablation_lab; print(ablation_lab.__file__, sys.prefix, sys.executable, sep='\\n')"
    source, prefix, python = passed(run(project / "studies", "python", "-c", script)).splitlines()
    assert Path(source).is_relative_to(project / "src") and Path(prefix) == project / ".venv"
    assert Path(python) == project / ".venv/bin/python"
    assert passed(run(project, "sh", "-c", "echo $HOME")).strip() == str(tmp_path / "home")
    assert passed(run(project, "sh", "-c", "for one in ablab dvc mlflow python; do command -v $one; done")).split() == [
        str(project / ".venv/bin" / name) for name in ("ablab", "dvc", "mlflow", "python")
    ]
    assert "no such command" not in passed(run(project, "ablab", "--help")).lower()
    moved = project.rename(tmp_path / "moved")
    assert passed(run(moved, "python", "-c", script)).startswith(str(moved))


def test_no_test_hands_its_own_environment_on():
    tests = {path.name: path.read_text() for path in Path(__file__).parent.glob("*.py") if path != Path(__file__)}
    found = {name for name, text in tests.items() if re.search(r"os\.environ \||os\.environ\.(items|copy)\(", text)}
    assert found - set(INHERITED) - {"conftest.py"} == set()
