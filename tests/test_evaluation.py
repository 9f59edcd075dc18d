import csv
import dataclasses
import json
import shutil

import fabricate
import numpy as np
import pytest
from sklearn import metrics

from ablation_lab import evaluation
from ablation_lab.errors import LabError


def read(root, name):
    return json.loads((root / "evaluation" / name).read_text())


def test_score_agrees_with_scikit_learn():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(5), 300).astype(np.float32)
    labels = random.integers(0, 4, 300)  # class 4 is absent
    predicted = probabilities.argmax(axis=1)
    scores = evaluation.score(probabilities, labels)
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert scores["loss"] == pytest.approx(-np.log(probabilities[np.arange(300), labels]).mean(), rel=1e-5)
    assert scores["confusion"] == metrics.confusion_matrix(labels, predicted, labels=range(5)).tolist()
    options = {"labels": range(5), "average": None, "zero_division": 0}
    assert scores["per_class"]["precision"] == pytest.approx(metrics.precision_score(labels, predicted, **options))
    assert scores["per_class"]["recall"] == pytest.approx(metrics.recall_score(labels, predicted, **options))
    assert scores["per_class"]["f1"] == pytest.approx(metrics.f1_score(labels, predicted, **options))
    assert scores["macro_f1"] == pytest.approx(np.mean(scores["per_class"]["f1"]))
    assert "roc_auc" not in scores


def test_score_of_two_classes_has_a_positive_one():
    random = np.random.default_rng(1)
    positive = random.random(200).astype(np.float32)
    probabilities = np.stack([1 - positive, positive], axis=1)
    labels = random.integers(0, 2, 200)
    scores = evaluation.score(probabilities, labels)
    assert scores["precision"] == pytest.approx(metrics.precision_score(labels, positive > 0.5))
    assert scores["recall"] == pytest.approx(metrics.recall_score(labels, positive > 0.5))
    assert scores["roc_auc"] == pytest.approx(metrics.roc_auc_score(labels, positive))
    assert evaluation.score(probabilities, np.zeros(200, int))["roc_auc"] is None


def test_score_of_certain_mistakes_is_finite():
    scores = evaluation.score(np.eye(3, dtype=np.float32), np.array([1, 2, 0]))
    assert scores["accuracy"] == 0 and np.isfinite(scores["loss"])


def test_score_of_a_diverged_training_is_none():
    assert evaluation.score(np.full((4, 3), np.nan, np.float32), np.zeros(4, int)) is None
    assert evaluation.score(np.zeros((4, 3), np.float32), np.zeros(4, int)) is None


def test_evaluate_writes_one_row_a_cell_and_an_epoch(tmp_path):
    study = fabricate.study()
    fabricate.write(tmp_path, study)
    shutil.copytree(tmp_path / "cells/baseline", tmp_path / "cells/no_longer_studied")
    shutil.copytree(tmp_path / "cells/baseline/seed-0", tmp_path / "cells/baseline/seed-99")
    evaluation.evaluate(study, tmp_path)
    cells = read(tmp_path, "cells.json")
    assert [(cell["variant"], cell["seed"]) for cell in cells] == study.cells
    rows = list(csv.DictReader((tmp_path / "evaluation/cells.csv").read_text().splitlines()))
    assert float(rows[4]["test_accuracy"]) == cells[4]["test"]["accuracy"]
    curves = list(csv.DictReader((tmp_path / "evaluation/curves.csv").read_text().splitlines()))
    assert len(curves) == 9 * 6
    assert list(curves[0]) == ["variant", "seed", "epoch", "loss", "accuracy", "val_loss", "val_accuracy"]
    correct = np.load(tmp_path / "evaluation/correct.npy")
    assert correct.mean(axis=1).tolist() == pytest.approx([cell["test"]["accuracy"] for cell in cells])
    confusion = list(csv.DictReader((tmp_path / "evaluation/confusion.csv").read_text().splitlines()))
    hits = [row["actual"] == row["predicted"] for row in confusion]
    assert len(hits) == 200 and np.mean(hits) == pytest.approx(cells[0]["test"]["accuracy"])


def test_evaluate_writes_means_for_dvc(tmp_path):
    study = fabricate.study(seeds=(3, 5))
    fabricate.write(tmp_path, study, diverged=[("big_pool", 5)])
    evaluation.evaluate(study, tmp_path)
    cells, means = read(tmp_path, "cells.json"), read(tmp_path, "metrics.json")
    accuracies = [cell["test"]["accuracy"] for cell in cells[:2]]
    assert means["baseline"]["test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert means["baseline"]["test_accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert means["baseline"]["parameters"] == 12_345
    assert means["big_pool"] == {
        "validation_accuracy": None,
        "test_accuracy": None,
        "test_loss": None,
        "macro_f1": None,
        "test_accuracy_std": None,
        "parameters": 14_345,
    }
    assert cells[-1]["status"] == "diverged" and cells[-1]["test"] is None and cells[-2]["test"]


def sealed(study):
    return dataclasses.replace(study, study=study.study.model_copy(update={"test": "sealed"}))


def test_a_sealed_test_part_is_not_scored(tmp_path):
    study = fabricate.study(seeds=(3, 5))
    fabricate.write(tmp_path, study, diverged=[("big_pool", 5)])
    evaluation.evaluate(study, tmp_path)
    open_cells = read(tmp_path, "cells.json")
    evaluation.evaluate(sealed(study), tmp_path)
    cells = read(tmp_path, "cells.json")
    assert [cell["test"] for cell in cells] == [None] * 6
    assert [cell["status"] for cell in cells] == ["ok"] * 5 + ["diverged"]
    assert [cell["validation"] for cell in cells] == [cell["validation"] for cell in open_cells]
    means = read(tmp_path, "metrics.json")
    assert [set(mean) for mean in means.values()] == [{"validation_accuracy", "parameters"}] * 3
    assert means["big_pool"]["validation_accuracy"] is None
    assert means["baseline"]["validation_accuracy"] == pytest.approx(
        np.mean([cell["validation"]["accuracy"] for cell in cells[:2]])
    )
    assert np.load(tmp_path / "evaluation/correct.npy").shape == (6, 0)
    assert (tmp_path / "evaluation/confusion.csv").read_text() == "actual,predicted\n"
    rows = list(csv.DictReader((tmp_path / "evaluation/cells.csv").read_text().splitlines()))
    assert {row[key] for row in rows for key in row if key.startswith("test_")} == {""}
    assert float(rows[0]["validation_accuracy"]) == cells[0]["validation"]["accuracy"]


def test_evaluate_gives_the_same_bytes_twice(tmp_path):
    study = fabricate.study()
    fabricate.write(tmp_path, study)
    evaluation.evaluate(study, tmp_path)
    once = {path.name: path.read_bytes() for path in (tmp_path / "evaluation").iterdir()}
    evaluation.evaluate(study, tmp_path)
    assert once == {path.name: path.read_bytes() for path in (tmp_path / "evaluation").iterdir()}
    assert b"\r" not in once["cells.csv"]


def test_a_missing_cell_is_named(tmp_path):
    study = fabricate.study()
    fabricate.write(tmp_path, study)
    shutil.rmtree(tmp_path / "cells/big_pool/seed-2")
    with pytest.raises(LabError, match=r"cells/big_pool/seed-2/.*Found: no such folder\. Run `dvc repro`"):
        evaluation.evaluate(study, tmp_path)


@pytest.mark.parametrize("name", ["cell.json", "history.csv", "predictions.npz"])
def test_a_missing_file_is_named(tmp_path, name):
    study = fabricate.study()
    fabricate.write(tmp_path, study)
    (tmp_path / "cells/big_pool/seed-2" / name).unlink()
    with pytest.raises(LabError, match=rf"big_pool/seed-2/{name}: .*Found: no such file\. Run `dvc repro`"):
        evaluation.evaluate(study, tmp_path)


def test_a_cell_of_another_plan_is_refused(tmp_path):
    study = fabricate.study()
    fabricate.write(tmp_path, study)
    result = tmp_path / "cells/big_pool/seed-2/cell.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"plan_hash": "another"}))
    with pytest.raises(LabError, match=r"big_pool/seed-2: Expected the cell of today's plan\. Found: another plan's"):
        evaluation.evaluate(study, tmp_path)


def test_predictions_that_do_not_fit_are_refused(tmp_path):
    study = fabricate.study(seeds=(0,))
    fabricate.write(tmp_path, study)
    path = tmp_path / "cells/big_pool/seed-0/predictions.npz"
    arrays = dict(np.load(path))
    np.savez(path, **(arrays | {"test_labels": arrays["test_labels"][::-1]}))
    with pytest.raises(LabError, match="Expected the same test pictures as in the other cells"):
        evaluation.evaluate(study, tmp_path)
    np.savez(path, **(arrays | {"test_probabilities": arrays["test_probabilities"][:, :3]}))
    with pytest.raises(LabError, match=r"Expected test_probabilities of shape \(200, 10\).*Found: \(200, 3\)"):
        evaluation.evaluate(study, tmp_path)
    path.write_bytes(b"not a zip file")
    with pytest.raises(LabError, match=r"predictions\.npz: Expected the arrays"):
        evaluation.evaluate(study, tmp_path)


def test_no_class_is_a_formula(tmp_path):
    study = fabricate.study(("baseline",), seeds=(0,))
    fabricate.write(tmp_path, study, classes=["=1+1", "-1+2", "two\nlines", "a, b"], pictures=40)
    evaluation.evaluate(study, tmp_path)
    with (tmp_path / "evaluation/confusion.csv").open(encoding="utf-8", newline="") as file:
        found = {row["actual"] for row in csv.DictReader(file)}
    assert found == {"'=1+1", "'-1+2", "two\nlines", "a, b"}
