"""The whole pipeline, for real: DVC in a temporary repository, Keras, MLflow. What an edit retrains is counted."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, agree, client_of, in_mlflow, new_project, passed, retrained, run, trained, write_params

ALL = ["baseline-0", "baseline-1", "no_dropout-0", "no_dropout-1"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The tiny study, run once from nothing and committed."""
    folder = new_project(tmp_path_factory.mktemp("study") / "project")
    first = passed(run(folder, "dvc", "repro"))
    assert trained(first) == ALL
    passed(run(folder, "git", "add", "--all"))
    passed(run(folder, "git", "commit", "--quiet", "--message", "results"))
    return folder


@pytest.fixture
def study(project: Path):
    """A copy of the study to change; params.yaml is put back afterwards."""
    yield copy.deepcopy(TINY)
    write_params(project, TINY)


def test_everything_is_there(project: Path):
    results = json.loads((project / "reports/results.json").read_text())
    assert list(results["variants"]) == ["baseline", "no_dropout"]
    assert results["study"] == "tiny"
    for facts in results["variants"].values():
        for cell in facts["cells"].values():
            assert cell["status"] == "ok"
            assert 0 <= cell["test_accuracy"] <= 1
    assert (project / "reports/report.html").stat().st_size > 10_000
    assert "no_dropout" in (project / "reports/report.md").read_text()
    shown = json.loads(passed(run(project, "dvc", "metrics", "show", "--json")))
    metrics = shown[""]["data"]["evaluation/metrics.json"]["data"]
    assert metrics["baseline"]["test_accuracy"] == pytest.approx(
        results["variants"]["baseline"]["test_accuracy"]["mean"]
    )
    plots = json.loads(passed(run(project, "dvc", "plots", "show", "--json")))["data"]
    assert set(plots) >= {"Validation accuracy", "Validation loss", "Confusion of the baseline"}


def test_every_cell_is_a_finished_run_that_agrees_with_the_files(project: Path):
    agree(project)
    found = in_mlflow(project)
    assert sorted(found) == ALL
    results = json.loads((project / "reports/results.json").read_text())["variants"]
    for name, logged in found.items():
        variant, seed = name.rsplit("-", 1)
        cell = results[variant]["cells"][seed]
        assert logged.info.status == "FINISHED"
        assert logged.data.tags["ablab.cell_hash"] == cell["cell_hash"]
        for key in ("validation_accuracy", "test_accuracy", "test_loss", "macro_f1", "train_accuracy"):
            assert logged.data.metrics[key] == pytest.approx(cell[key])
        assert logged.data.params["train.epochs"] == "2"
        assert logged.data.tags["dvc.stage"] == f"train@{name}"


# What a user's script does with a logged model: the folder, the run's id and a place for the answer are its arguments.
SERVE = """
import sys, mlflow, numpy as np
project, run_id, out = sys.argv[1:]
mlflow.set_tracking_uri(f"sqlite:///{project}/mlruns/mlflow.db")
model = mlflow.pyfunc.load_model(f"runs:/{run_id}/model")
pictures = np.load(f"{project}/data/processed/images.npy")[np.load(f"{project}/data/processed/test.npy")]
assert pictures.dtype == np.uint8
assert model.metadata.metadata["classes"] == [str(digit) for digit in range(10)]
np.save(out, model.predict(pictures))
"""


def test_the_logged_model_takes_raw_pictures_and_gives_the_cells_predictions(project: Path, tmp_path: Path):
    logged = in_mlflow(project)["baseline-1"]
    answer = tmp_path / "answer.npy"
    passed(run(tmp_path, "python", "-c", SERVE, str(project), logged.info.run_id, str(answer)))
    with np.load(project / "cells/baseline/seed-1/predictions.npz") as predictions:
        np.testing.assert_allclose(np.load(answer), predictions["test_probabilities"], atol=1e-6)


def test_a_second_run_runs_nothing(project: Path):
    output = passed(run(project, "dvc", "repro"))
    assert "Running stage" not in output
    assert "Data and pipelines are up to date." in output


def test_words_and_order_retrain_nothing(project: Path, study: dict):
    study["study"] |= {"title": "Another title", "notes": "Some notes"}
    study["variants"]["no_dropout"] |= {
        "note": "A note",
        "reported": {"test_accuracy": 0.5},
        "compared_with": "baseline",
    }
    study["variants"] = dict(reversed(study["variants"].items()))
    study["train"] = dict(reversed(study["train"].items()))
    assert retrained(project, study) == []
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(f"# a comment\n\n{text}")
    assert trained(passed(run(project, "dvc", "repro", "train"))) == []


def test_a_variants_own_value_retrains_its_cells(project: Path, study: dict):
    study["variants"]["no_dropout"]["model"]["dropout"] = 0.05
    assert retrained(project, study) == ["no_dropout-0", "no_dropout-1"]


def test_a_base_value_retrains_the_cells_that_do_not_override_it_and_putting_it_back_none(project: Path, study: dict):
    study["model"]["dropout"] = 0.2
    assert retrained(project, study) == ["baseline-0", "baseline-1"]
    assert retrained(project, TINY) == []


@pytest.mark.slow
def test_a_new_seed_trains_that_seed(project: Path, study: dict):
    study["seeds"] = [2, 1, 0]
    assert sorted(retrained(project, study)) == ["baseline-2", "no_dropout-2"]


@pytest.mark.slow
def test_a_new_variant_trains_its_cells_and_a_removed_one_leaves_no_trace(project: Path, study: dict):
    study["variants"]["wide"] = {"model": {"blocks": {"block1": {"filters": 3}}}}
    assert retrained(project, study) == ["wide-0", "wide-1"]
    assert retrained(project, TINY) == []
    assert sorted(path.name for path in (project / "cells").iterdir()) == ["baseline", "no_dropout"]


@pytest.mark.slow
def test_a_variant_that_comes_out_as_another_shares_its_result(project: Path, study: dict):
    study["variants"]["twin"] = {"model": {"blocks": {"block1": {"dropout": 0}}}}
    write_params(project, study)
    done = run(project, "dvc", "repro", "train")
    assert "twin-0: the same training as no_dropout-0, result shared" in passed(done)
    assert "warning: twin: the same network as no_dropout, trained the same way" in done.stderr
    for seed in (0, 1):
        folders = [project / "cells" / name / f"seed-{seed}" for name in ("no_dropout", "twin")]
        names = sorted(path.name for path in folders[0].iterdir())
        assert names == sorted(path.name for path in folders[1].iterdir())
        assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)


@pytest.mark.slow
def test_an_experiment_trains_what_inherits_its_value_and_is_listed(project: Path, study: dict):
    output = passed(run(project, "dvc", "exp", "run", "--name", "less", "--set-param", "model.dropout=0.1"))
    assert trained(output) == ["baseline-0", "baseline-1"]
    listed = passed(run(project, "dvc", "exp", "show", "--csv"))
    assert any(line.startswith("less,") or ",less," in line for line in listed.splitlines())
    found = client_of(project).search_runs([in_mlflow(project)["baseline-0"].info.experiment_id])
    logged = [one for one in found if one.data.tags.get("dvc.exp_name") == "less" and "ablab.seed" in one.data.tags]
    assert sorted(one.info.run_name for one in logged) == ["baseline-0", "baseline-1"]
    assert {one.data.params["model.blocks.block1.dropout"] for one in logged} == {"0.1"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("train", "epochs"), "ten", 'train.epochs: Expected a valid integer. Found: "ten".'),
        (("model", "droput"), 0, "Did you mean dropout?"),
        (("train", "optimizer", "name"), "adm", "Expected a Keras optimizer. Found: adm. Did you mean adam?"),
        (("model", "pool"), 20, "variants.baseline, no_dropout: layer block1_pool (MaxPooling2D) does not fit"),
        (("study", "titel"), "x", "study.titel: Expected one of the keys name, title"),
        (("data", "dataset"), "image_folder", "data.path: Expected a folder or an archive"),
    ],
)
def test_a_mistake_ends_with_a_message_and_leaves_the_results(project: Path, study: dict, path, value, message):
    before = {
        file: file.read_bytes() for name in ("cells", "evaluation", "reports") for file in (project / name).rglob("*.*")
    }
    place = study
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    write_params(project, study)
    done = run(project, "dvc", "repro")
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert {file: file.read_bytes() for file in before} == before
