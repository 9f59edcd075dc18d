"""`ablab report --partial`: the report of a study of which cells are missing."""

import json
import shutil
from pathlib import Path

import fabricate
import pytest
from conftest import TINY, new_project, passed, run, write_params

from ablation_lab import cell, files, params
from ablation_lab.report import partial as partial_report
from ablation_lab.report import writing

PAGES = ("report.html", "report.md")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The tiny study with cells made by numpy, as up to date as trained ones, evaluated and reported."""
    folder = new_project(tmp_path_factory.mktemp("partial") / "project")
    study = params.load(folder / "params.yaml")
    fabricate.write(folder, study, pictures=60)
    (folder / "data/processed/settings.json").write_text(params.canonical_json(study.data.model_dump()))
    for name, variant in study.variants.items():
        plan, network = folder / f"plan/{name}.json", folder / f"plan/networks/{name}.json"
        plan.write_text(params.canonical_json(variant.resolved()))
        files.write_json(network, files.read_json(network) | {"plan_hash": files.sha256(plan)})
        for seed in study.seeds:
            result = cell.folder(name, seed, folder) / cell.RESULT
            hashes = cell.hashes(files.sha256(plan), seed, "d" * 64, folder)
            files.write_json(result, files.read_json(result) | hashes)
    for stage in ("evaluate", "report"):
        passed(run(folder, "python", "-m", f"stages.{stage}"))
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "project", symlinks=True))


def partial(project: Path) -> tuple[str, dict]:
    output = passed(run(project, "ablab", "report", "--partial"))
    return output, json.loads((project / "reports/partial/results.json").read_text())


def test_the_cells_that_are_there_are_reported_and_the_others_named(project: Path):
    shutil.rmtree(project / "cells/no_dropout/seed-1")
    before = {path: path.read_bytes() for path in (project / "reports").rglob("*") if path.is_file()}
    evaluated = (project / "evaluation/cells.json").read_bytes()
    (project / "reports/partial").mkdir()
    (project / "reports/partial/mine.txt").write_text("a user's")
    output, found = partial(project)
    assert "Partial report: reports/partial/report.html, 3 of 4 cells" in output and "no_dropout-1: missing" in output
    missing = [{"cell": "no_dropout-1", "state": "missing", "reason": ""}]
    assert found["partial"] == {"cells": 3, "of": 4, "missing": missing}
    assert {name: list(one["cells"]) for name, one in found["variants"].items()} == {
        "baseline": ["0", "1"],
        "no_dropout": ["0"],
    }
    delta = found["variants"]["no_dropout"]["delta"]
    accuracies = [found["variants"][name]["cells"]["0"]["test_accuracy"] for name in ("no_dropout", "baseline")]
    assert delta["mean"] == pytest.approx(accuracies[0] - accuracies[1]) and delta["verdict"] == "undetermined"
    for page in PAGES:
        text = (project / "reports/partial" / page).read_text().replace("<wbr>", "")
        assert text.count("PARTIAL REPORT: 3 of 4 cells") > 10 and "no_dropout-1" in text
        assert "PARTIAL" not in (project / "reports" / page).read_text()
    for table in (project / "reports/partial/tables").glob("*.tex"):
        assert "PARTIAL REPORT" in table.read_text()
    # Nothing else is written.
    assert {path: path.read_bytes() for path in before} == before
    assert (project / "evaluation/cells.json").read_bytes() == evaluated
    assert (project / "reports/partial/mine.txt").read_text() == "a user's"


def test_a_later_partial_report_keeps_why_a_cell_failed(project: Path):
    shutil.rmtree(project / "cells/no_dropout/seed-1")
    failed = {("no_dropout", 1): "the network's own words"}
    partial_report.write_partial(params.load(project / "params.yaml"), project, failed)
    output, found = partial(project)
    assert "no_dropout-1: failed: the network's own words" in output
    assert [one["state"] for one in found["partial"]["missing"]] == ["failed"]


def test_the_whole_report_removes_the_partial_one_and_nothing_of_the_users(project: Path):
    lost, place = project / "cells/no_dropout/seed-1", project / "resume"
    lost.rename(place)
    partial(project)
    place.rename(lost)
    for path in ("reports/partial/mine.txt", "reports/notes/a.txt", "reports/b.txt"):
        (project / path).parent.mkdir(exist_ok=True)
        (project / path).write_text(path)
    passed(run(project, "python", "-m", "stages.report"))
    assert sorted(path.name for path in (project / "reports/partial").iterdir()) == ["mine.txt"]
    assert (project / "reports/notes/a.txt").read_text() == "reports/notes/a.txt"
    assert (project / "reports/b.txt").exists()
    assert json.loads((project / "reports/results.json").read_text())["partial"] is None


def test_without_the_baseline_nothing_is_compared(project: Path):
    shutil.rmtree(project / "cells/baseline")
    output, found = partial(project)
    assert "baseline-0, baseline-1: missing" in output
    assert found["variants"]["baseline"]["cells"] == {}
    assert found["variants"]["no_dropout"]["delta"]["verdict"] == "undetermined"
    assert found["variants"]["no_dropout"]["test_accuracy"]["mean"] is not None
    for page in PAGES:
        text = (project / "reports/partial" / page).read_text()
        assert "The baseline is missing, so nothing can be compared with it." in text
        assert "since the baseline is missing" in text and "diverged" not in text.partition("<body>")[2]


def test_what_is_out_of_date_is_left_out_and_sealed_stays_sealed(project: Path):
    study = TINY | {"study": TINY["study"] | {"test": "sealed"}}
    study["variants"] = {"baseline": {}, "no_dropout": {"model": {"dropout": 0.1}}, "new": {"model": {"dropout": 0.2}}}
    study["finetune"] = {"variants": {"longer": {"train": {"epochs": 3}}}}
    write_params(project, study)
    for name in ("plan/new.json", "plan/networks/new.json"):
        shutil.copyfile(project / name.replace("new.", "no_dropout."), project / name)
    output, found = partial(project)
    assert "no_dropout-0, no_dropout-1: out of date: its settings in params.yaml have changed" in output
    assert "new-0, new-1: missing" in output
    assert "longer-0, longer-1: missing: the first phase is not complete" in output
    assert list(found["variants"]) == ["baseline"]
    assert {cell["test_accuracy"] for cell in found["variants"]["baseline"]["cells"].values()} == {None}
    assert "The test part is sealed" in (project / "reports/partial/report.md").read_text()


@pytest.mark.parametrize(
    ("model", "planned"),
    [
        ({"builder": "networks.own:build"}, lambda digest: {"code": {"networks/own.py": digest}}),
        (
            {"builder": "transfer", "backbone": "MobileNetV2", "weights": "networks/own.py"},
            lambda digest: {"weights": {"file": "own.py", "hash": f"sha256:{digest}", "url": None}},
        ),
    ],
)
def test_cells_of_another_code_or_other_weights_are_out_of_date(model, planned, tmp_path: Path, monkeypatch):
    own, plan = tmp_path / "networks/own.py", tmp_path / "plan/baseline.json"
    files.write_json(own, "as it was trained")
    write_params(tmp_path, TINY | {"model": model, "variants": {"baseline": {}}, "seeds": [0]})
    study = params.load(tmp_path / "params.yaml")
    files.write_json(tmp_path / "data/processed/settings.json", study.data.model_dump())
    files.write_json(tmp_path / "data/processed/card.json", {"digest": "d"})
    files.write_json(plan, study.baseline.resolved() | planned(files.sha256(own)))
    files.write_json(tmp_path / "dvc.yaml", {"stages": {"train": {"deps": []}}})
    monkeypatch.chdir(tmp_path)
    result = cell.hashes(files.sha256(plan), 0, "d", tmp_path)
    files.write_json(cell.folder("baseline", 0, tmp_path) / cell.RESULT, result)
    assert partial_report._missing(study, tmp_path) == {}
    files.write_json(own, "edited")
    reason = "its own code or weights have changed"
    assert partial_report._missing(study, tmp_path) == {("baseline", 0): ("out of date", reason)}


def test_what_a_killed_partial_report_left_is_not_the_users(tmp_path: Path):
    for path in ("partial.part/report.md", "partial.part/mine.txt", "partial.old/report.md", "partial.old/mine.txt"):
        (tmp_path / "reports" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "reports" / path).touch()
    for number, kept in enumerate((["partial", "partial/mine.txt"], [])):
        out = tmp_path / f"out{number}"
        out.mkdir()
        writing._keep_the_users(tmp_path / "reports", out)
        assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == kept
        (tmp_path / "reports/partial").mkdir(exist_ok=True)  # the next one was put there: it has the user's files


def test_without_a_cell_there_is_no_report(project: Path):
    shutil.rmtree(project / "cells")
    done = run(project, "ablab", "report", "--partial")
    assert done.returncode == 1 and not (project / "reports/partial").exists()
    assert "cells: Expected at least one trained cell. Found: none; baseline-0 is missing. Run `ablab repro`." in (
        done.stderr
    )
    whole = run(project, "ablab", "report")
    assert (
        whole.returncode == 1 and "Expected --partial. The whole report is made by `dvc repro report`" in whole.stderr
    )
