"""dvc.yaml itself: DVC does not follow imports, so each stage's list must be its whole import closure, and no more."""

import re
from modulefinder import ModuleFinder
from pathlib import Path

import pytest
from conftest import ROOT
from ruamel.yaml import YAML

STAGES = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
TEMPLATES = {"report": {"script.js", "style.css", "report.html.jinja", "report.md.jinja"}}


def closure(stage: str) -> set[str]:
    """The project's own files that a stage runs, also those that a function imports when it is called."""
    finder = ModuleFinder(path=[str(ROOT / "src"), str(ROOT)])
    finder.run_script(str(ROOT / "stages" / f"{stage}.py"))
    files = {Path(module.__file__) for module in finder.modules.values() if module.__file__}
    own = {str(file.relative_to(ROOT)) for file in files if file.is_relative_to(ROOT)}
    own |= {f"src/ablation_lab/report/{name}" for name in TEMPLATES.get(stage, ())}
    return own | {"stages/__init__.py"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_it_imports(stage: str):
    listed = [path for path in STAGES[stage]["deps"] if path.startswith(("src/", "stages/"))]
    assert sorted(listed) == sorted(closure(stage))


def test_all_templates_are_dependencies():
    found = {
        path.name for path in (ROOT / "src/ablation_lab/report").iterdir() if path.suffix in (".jinja", ".css", ".js")
    }
    assert found == TEMPLATES["report"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_called_like_its_script(stage: str):
    assert STAGES[stage]["cmd"].split()[:3] == ["python", "-m", f"stages.{stage}"]


def test_only_what_trains_or_builds_networks_knows_tensorflow():
    with_tensorflow = {stage for stage in STAGES if "src/ablation_lab/backend.py" in STAGES[stage]["deps"]}
    assert with_tensorflow == {"plan", "train", "finetune"}


def test_only_tracking_imports_mlflow():
    importing = [
        path
        for path in (ROOT / "src").rglob("*.py")
        if re.search(r"^ *(import|from) mlflow\b", path.read_text(), re.MULTILINE)
    ]
    assert {path.parent.name for path in importing} == {"tracking"}
    assert "live.py" not in {path.name for path in importing}  # a training waits for no import of it
