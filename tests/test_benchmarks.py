import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import common, run

SCRIPTS = ROOT / "benchmarks"


def script(name: str, *arguments: str) -> str:
    """The output of a benchmark that must end well."""
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_is_what_was_kept():
    assert run.PAGE.read_text(encoding="utf-8") == run.page(run.kept()), "python benchmarks/run.py --page"


def test_every_benchmark_is_in_the_suite():
    assert {path.stem for path in SCRIPTS.glob("*.py")} - {"common", "run"} == set(run.NAMES)


def test_a_missed_bound_is_told():
    assert common.Figure("slow", 3.14159, "s", at_most=3).bound == "at most 3 s: **missed**"
    assert common.Figure("quick", 2.5, "s", at_most=3).bound == "at most 3 s: met"
    figure = common.ratio("ours : theirs", [1.0, 2.0, 6.0], [2.0, 4.0, 3.0], at_most=0.6)
    assert figure.measured == "0.667 (0.500 to 2.00, n = 3)" and "missed" in figure.bound


def test_the_page_tells_what_was_found(tmp_path):
    figures = tmp_path / "figures.json"
    script("coverage", "2", "--figures", str(figures))
    result = {"date": "2026-11-22", "minutes": 3.2, "commit": "abc", "arguments": ["--times", "2"]}
    result |= {"machine": "a machine", "versions": {"dvc": "3"}}
    found = [*json.loads(figures.read_text()), {"what": "a | b", "value": 2048, "unit": "MiB", "at_most": 1000}]
    page = run.page({"coverage": result | {"figures": found}})
    assert "| [coverage](#coverage) | a \\| b | 2,048 MiB | at most 1,000 MiB: **missed** | 2026-11-22 |" in page
    command = "python benchmarks/run.py coverage -- --times 2"
    assert f"Measured on 2026-11-22 at commit abc in 3 minutes by `{command}`" in page
    assert page.count("Not measured yet") == len(run.NAMES) - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", run.NAMES)
def test_it_works(name, tmp_path: Path):
    script(name, "--small", "--figures", str(tmp_path / "figures.json"))
    assert all(common.Figure(**one).measured for one in json.loads((tmp_path / "figures.json").read_text()))
