"""`ablab search`: what is proposed, and a whole search for real, whose trainings are counted."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import optuna
import pytest
from conftest import ROOT, TINY, client_of, environment, new_project, passed, run, write_params
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from ruamel.yaml import YAML

from ablation_lab import params, search
from ablation_lab.errors import LabError

SEALED = TINY | {
    "study": {"name": "tiny", "baseline": "mlp", "test": "sealed"},
    "model": {"builder": "mlp", "activation": "relu", "head_units": 4, "head_dropout": 0, "head": {"dense1": {}}},
    "seeds": [0],
    "variants": {"mlp": None},
}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("model.head_units=500,1000", CategoricalDistribution(["500", "1000"])),
        ("model.head_units=choice(500,1000)", CategoricalDistribution(["500", "1000"])),
        ("model.head={a:{units:3}},{}", CategoricalDistribution(["{a:{units:3}}", "{}"])),
        ("model.head_units=range(2,9,3)", IntDistribution(2, 8, step=3)),
        ("model.head_dropout=range(0,0.5,0.25)", FloatDistribution(0, 0.25, step=0.25)),
        ("model.head_dropout=interval(0.0,0.5)", FloatDistribution(0, 0.5)),
        ("model.head_units=int(interval(16,256))", IntDistribution(16, 256)),
        ("model.head_units=tag(log,int(interval(16,256)))", IntDistribution(16, 256, log=True)),
        ("train.optimizer.learning_rate=tag(log,interval(1e-4,1e-1))", FloatDistribution(1e-4, 1e-1, log=True)),
    ],
)
def test_a_range_in_hydras_grammar_is_a_distribution(values, expected):
    fixed, space = search.parse(["train.epochs=1", values], SEALED)
    assert fixed == ["train.epochs=1"]
    assert space == {values.partition("=")[0]: expected}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.head_unit=1,2"], "Found: model.head_unit. Did you mean model.head_units?"),
        (["data.limit=3,4"], "Expected a key that is in params.yaml, under input, model, train, variants. Found: data"),
        (["+model.l2=0,0.1"], "Expected a key that is in params.yaml"),
        (["model.head_units=interval(1"], r"-S model.head_units=interval\(1: Expected KEY=VALUES. Found: "),
        (["train.epochs=3"], "Expected at least one key with several values"),
        (["model.head_dropout=interval(0.5,0.0)"], "Expected values in a range that is not empty. Found: "),
        (["model.head_dropout=tag(log,interval(0,0.5))"], "Expected values in a range that is not empty. Found: "),
        (["model.head_units=range(3,3)"], "Expected values in a range that is not empty. Found: "),
    ],
)
def test_what_cannot_be_searched_is_told(overrides, message):
    with pytest.raises(LabError, match=message):
        search.parse(overrides, SEALED)


def test_the_documented_grid_is_one_of_valid_studies(tmp_path: Path):
    shutil.copyfile(ROOT / "studies/fashion_grid.yaml", tmp_path / "params.yaml")
    study = params.load(tmp_path / "params.yaml")
    assert study.study.test == "sealed" and study.study.notes
    line = "dvc exp run --queue " + study.study.notes.split("dvc exp run --queue ")[1].split("`")[0]
    assert line in (ROOT / "docs/search.md").read_text().replace("\\\n    ", "")
    _, space = search.parse(line.split(" -S ")[1:], YAML(typ="safe", pure=True).load(tmp_path / "params.yaml"))
    sizes = [len(one.choices) for one in space.values() if isinstance(one, CategoricalDistribution)]
    assert sizes == [3, 4, 2, 4]
    for place in (0, -1):
        point = [f"{key}={one.choices[place]}" for key, one in space.items()]
        assert search.changed(tmp_path, point).baseline.resolved() != (study.baseline.resolved() if place else None)


SPACE: dict[str, optuna.distributions.BaseDistribution] = {
    "rate": FloatDistribution(1e-5, 1, log=True),
    "units": IntDistribution(1, 64),
    "kind": CategoricalDistribution(["a", "b"]),
}


def proposed(trials: int, seed: int, space=SPACE) -> list[dict[str, str]]:
    tried: list[dict[str, str]] = []

    def objective(values: dict[str, str]) -> float:
        tried.append(values)
        return -abs(int(values["units"]) - 20) - 10 * (values["kind"] == "b")

    search.maximise(space, objective, trials, seed)
    return tried


def test_the_same_seed_proposes_the_same_and_more_trials_go_on_from_fewer():
    assert proposed(20, seed=3)[:12] == proposed(12, seed=3)
    assert proposed(12, seed=3) != proposed(12, seed=4)
    later = proposed(40, seed=3)[20:]
    assert sum(values["kind"] == "a" for values in later) > 15
    assert all(1e-5 <= float(values["rate"]) <= 1 and len(values["rate"]) <= 9 for values in later)


def test_no_combination_is_proposed_twice_and_a_finite_space_ends():
    space = SPACE | {"rate": CategoricalDistribution(["1", "2"]), "units": IntDistribution(19, 21)}
    tried = proposed(100, seed=0, space=space)
    assert len(tried) == len({tuple(values.values()) for values in tried}) == 2 * 3 * 2


def test_a_continuous_range_that_is_narrower_than_the_digits_of_a_value_ends():
    space = {"kind": CategoricalDistribution(["a"]), "units": IntDistribution(20, 20)}
    tried = proposed(100, seed=0, space=space | {"rate": FloatDistribution(0.999, 0.9995)})
    assert sorted(values["rate"] for values in tried) == ["0.999", "0.9991", "0.9992", "0.9993", "0.9994", "0.9995"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A study with a sealed test part, committed, its own cell trained."""
    folder = new_project(tmp_path_factory.mktemp("search") / "project")
    write_params(folder, SEALED)
    passed(run(folder, "dvc", "repro", "track"))
    passed(run(folder, "git", "add", "--all"))
    passed(run(folder, "git", "commit", "--quiet", "--message", "study"))
    return folder


def runs(project: Path) -> dict[str, dict[str, float]]:
    """The final metrics of all finished runs, by the experiment that trained them."""
    client = client_of(project)
    found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    finished = [one for one in found if one.info.status == "FINISHED" and "ablab.seed" in one.data.tags]
    return {one.data.tags.get("dvc.exp_name", ""): one.data.metrics for one in finished}


def state(project: Path) -> dict[str, bytes]:
    files = [project / "params.yaml", project / "dvc.lock", *(project / "evaluation").iterdir()]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.slow
def test_ctrl_c_leaves_everything_as_it_was(project: Path):
    write_params(project, SEALED | {"train": SEALED["train"] | {"epochs": 10_000}})
    before = state(project)
    command = ["ablab", "search", "-S", "model.head_units=5,6", "--trials", "2"]
    temporary = project / ".dvc/tmp/exps/standalone"
    process = subprocess.Popen(command, cwd=project, env=environment(project), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not list(temporary.glob("*/cells/mlp/seed-0.part")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "interrupted: the finished trials are kept, the same command goes on from there" in told
    assert state(project) == before
    assert not list(temporary.glob("tmp*"))
    assert "search-" not in passed(run(project, "dvc", "exp", "list", "--name-only", "--all"))


@pytest.mark.slow
def test_a_search_trains_each_combination_once_and_the_test_part_is_scored_for_the_selected_one(project: Path):
    write_params(project, SEALED)
    before = state(project)
    # Of the four combinations one is what is trained already, and two can't be built.
    command = ["ablab", "search", "-S", "model.head_units=4,8", "-S", "model.activation=relu,rleu"]
    first = passed(run(project, *command, "--trials", "2", "--seed", "4"))
    whole = passed(run(project, *command, "--trials", "9", "--seed", "4"))
    assert (first + whole).count("1 cell trained") == 1
    assert (first + whole).count("nothing trained") == 1
    assert whole.count("failed: ") == 2
    assert "Expected a Keras activation. Found: rleu. Did you mean relu?" in whole
    assert "There are no more than these 4 combinations." in whole
    assert whole.count("(known)") == 2 and "trained)" not in whole
    assert state(project) == before

    best = whole.split("dvc exp apply ")[1].split()[0]
    logged = runs(project)
    assert len(logged) == 2
    assert not any(key.startswith(("test_", "macro")) for metrics in logged.values() for key in metrics)
    listed = passed(run(project, "dvc", "exp", "show", "--csv")).splitlines()
    assert not any("test_accuracy" in line for line in listed)
    assert any(line.startswith(f"{best},") for line in listed)

    passed(run(project, "dvc", "exp", "apply", best))
    scoring = passed(run(project, "dvc", "exp", "run", "-S", "study.test=scored"))
    assert "Running stage 'train@" not in scoring
    assert "Running stage 'evaluate'" in scoring
    scores = json.loads((project / "evaluation/metrics.json").read_text())["mlp"]
    scored = [metrics for metrics in runs(project).values() if "test_accuracy" in metrics]
    assert len(runs(project)) == 2
    assert [metrics["test_accuracy"] for metrics in scored] == [scores["test_accuracy"]]
    assert scored[0]["macro_f1"] == scores["macro_f1"]


def test_a_search_needs_a_sealed_test_part(tmp_path: Path):
    write_params(tmp_path, SEALED | {"study": {"name": "tiny", "baseline": "mlp"}})
    with pytest.raises(LabError, match=r"study\.test: Expected sealed\. Found: scored\. .* Write `test: sealed` under"):
        search.search(tmp_path, ["model.head_units=4,8"], 2, 0)


def test_what_a_failed_stage_has_said_is_told():
    output = "Running stage 'plan':\nwarning: x\n\nerror: a: Expected b. Found: c.\n       d\nERROR: failed to run"
    assert search._reason(output) == "a: Expected b. Found: c.\n       d"
    assert search._reason("killed\nERROR: failed to run") == "\nkilled\nERROR: failed to run"


def test_a_search_whose_first_combination_is_no_study_runs_nothing(project: Path):
    write_params(project, SEALED)
    done = run(project, "ablab", "search", "-S", "model.head_units=interval(4,9)", "--trials", "2")
    assert done.returncode == 1
    assert "model.head_units: Expected a valid integer. Found: " in done.stderr
    assert "For whole numbers write int(interval(16, 256))" in done.stderr
    assert "Traceback" not in done.stderr
